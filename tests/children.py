"""Processes that embed with the stub encoder, to be killed at random or at chosen moments.

They are forked from a server that has imported everything once, so that a kill costs milliseconds and not an import.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final

import h5py
import numpy.typing as npt

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import embed_comparisons
from palcache.errors import PalcacheError
from palcache.storage.shards import ShardWriter
from tests.stubs import StubEncoder

CONTEXT: Final = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytest", "tests.children"])
DIED: Final = 9
_Array = npt.NDArray[Any]
_EVENTS: Final = {"open", "os.rename", "os.remove", "os.mkdir", "fcntl.flock", "mmap.__new__", "palcache.test"}


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Start a function of this module in a process of its own."""
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: ForkServerProcess, timeout: float = 60.0) -> int:
    """Wait for a process and return its exit code; one that hangs is an error."""
    process.join(timeout)
    code = process.exitcode
    if code is None:
        process.kill()
        raise TimeoutError(f"the process did not end within {timeout} seconds")
    return code


def embed(cache: Path, table: Comparisons, encoder: StubEncoder, config: EmbedConfig) -> None:
    """Embed a table; a refusal is written beside the cache."""
    try:
        embed_comparisons(table, encoder, Cache.create(cache), name="table", config=config)
    except PalcacheError as error:
        cache.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
        sys.exit(1)


def embed_together(cache: Path, table: Comparisons, encoder: StubEncoder, config: EmbedConfig, gate: Any) -> None:
    """Embed a table as soon as all processes at the gate are there."""
    gate.wait()
    embed(cache, table, encoder, config)


def embed_limited(cache: Path, table: Comparisons, encoder: StubEncoder, config: EmbedConfig, limit: int) -> None:
    """Embed a table where no file may grow beyond `limit` bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    embed(cache, table, encoder, config)


def embed_until(cache: Path, table: Comparisons, encoder: StubEncoder, config: EmbedConfig, moment: int) -> None:
    """Embed a table and die without a trace just before the file operation of that number.

    File operations are what Python's audit events tell of opening, renaming, removing, locking and mapping, and what
    `_audit_more` adds. A run that does not die leaves their number in `CACHE.count`.
    """
    _audit_more()
    count = itertools.count(1)
    passed = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal passed
        if event in _EVENTS and _concerns(cache, event, arguments):
            passed = next(count)
            if passed == moment:
                os._exit(DIED)

    sys.addaudithook(hook)
    embed(cache, table, encoder, config)
    cache.with_suffix(".count").write_text(str(passed))


def _concerns(cache: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    return event not in {"open", "os.rename", "os.remove", "os.mkdir"} or str(arguments[0]).startswith(str(cache))


def _audit_more() -> None:
    """Tell of what Python does not audit, and tear writes of rows apart: half of a batch is there when the kill comes."""

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any) -> Any:
            sys.audit("palcache.test")
            return function(*arguments)

        return wrapper

    write = ShardWriter.write

    def torn(self: ShardWriter, rows: _Array, vectors: _Array, norms: _Array, more: Mapping[str, _Array]) -> None:
        half = len(rows) // 2
        write(self, rows[:half], vectors[:half], norms[:half], {name: values[:half] for name, values in more.items()})
        sys.audit("palcache.test")
        write(self, rows, vectors, norms, more)

    os.fsync = told(os.fsync)
    os.posix_fallocate = told(os.posix_fallocate)
    h5py.File.close = told(h5py.File.close)
    setattr(ShardWriter, "write", torn)  # noqa: B010 - a method is replaced on purpose
    setattr(ShardWriter, "seal", told(ShardWriter.seal))  # noqa: B010
    setattr(ShardWriter, "fail", told(ShardWriter.fail))  # noqa: B010
