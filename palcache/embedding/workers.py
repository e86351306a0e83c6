"""What a worker process does: load the model, fill spaces, and tell its parent how it goes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import pyarrow as pa
import torch

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import Side, count_works, fill_spaces, find_sides, find_works
from palcache.embedding.summaries import EmbedProgress, EmbedSummary
from palcache.encoders import Encoder, Role
from palcache.errors import ModelError, PalcacheError, PalcacheWarning
from palcache.storage.locks import writing

MakeEncoder = Callable[[EmbedConfig], Encoder]
"""Loads the model on `config.device`; a function of a module, because workers import it by its name."""
REPORT_SECONDS: Final = 0.1


@final
@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is told; everything in it can be pickled."""

    cache: Path
    name: str
    config: EmbedConfig
    make_encoder: MakeEncoder
    sides: Mapping[Role, Path]
    parts: int
    threads: int


def write_sides(comparisons: Comparisons, config: EmbedConfig, folder: Path) -> dict[Role, Path]:
    """Put the distinct items and keys of each role into files that all workers map."""
    paths: dict[Role, Path] = {}
    for side in find_sides(comparisons, config):
        paths[side.role] = folder / f"{side.role}.arrow"
        columns = {"text": side.texts} if side.prompts is None else {"text": side.texts, "prompt": side.prompts}
        batch = pa.record_batch([_plain(column) for column in columns.values()], names=list(columns))
        with pa.OSFile(str(paths[side.role]), "wb") as file, pa.ipc.new_file(file, batch.schema) as out:
            out.write_batch(batch)
        np.save(paths[side.role].with_suffix(".npy"), side.keys, allow_pickle=False)
    return paths


def _plain(texts: pa.Array) -> pa.Array:
    """Return texts as they can be written; those by reference stay so."""
    if isinstance(texts, pa.DictionaryArray):
        return texts
    return pa.concat_arrays([texts.cast(pa.large_string())])


def _read_sides(paths: Mapping[Role, Path]) -> list[Side]:
    sides = []
    for role, path in paths.items():
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        keys = np.load(path.with_suffix(".npy"), mmap_mode="r", allow_pickle=False)
        sides.append(Side(role, batch.column(0), keys, batch.column(1) if batch.num_columns > 1 else None))
    return sides


@final
@dataclass(frozen=True, slots=True)
class Ready:
    """A worker has its model: the specs of its spaces by role, and what the cache had."""

    specs: Mapping[Role, Mapping[str, Any]]
    counts: EmbedSummary


@final
@dataclass(frozen=True, slots=True)
class Failure:
    """A worker's exception; `early` before it had its model."""

    error: PalcacheError
    early: bool


def run_worker(pipe: Connection, job: Job) -> None:
    """Fill spaces until all is sealed, telling the parent how it goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send = _Sender(pipe)
    ready = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", PalcacheWarning)
            warnings.showwarning = send.warning
            if job.config.device == "cpu":
                torch.set_num_threads(job.threads)
            encoder = job.make_encoder(job.config)
            cache, summary, counts = Cache(job.cache), EmbedSummary(), EmbedSummary()
            with writing(job.cache):
                works = find_works(_read_sides(job.sides), encoder, cache, job.config, name=job.name)
                count_works(counts, works)
                pipe.send(Ready({work.role: dict(work.space.spec) for work in works}, counts))
                ready = True
                fill_spaces(works, encoder, cache, job.config, summary, on_progress=send.progress, parts=job.parts)
        pipe.send(summary)
    except Exception as error:
        pipe.send(Failure(_portable(error), early=not ready))
    finally:
        pipe.close()


def _portable(error: Exception) -> PalcacheError:
    """Return an error that can be sent to the parent."""
    if isinstance(error, PalcacheError):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own object
            if isinstance(copy, PalcacheError):
                return error
        return PalcacheError(str(error))
    return ModelError(f"A worker ended with {type(error).__name__}: {error}.")


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@final
class _Sender:
    """Sends progress now and then, and warnings."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._next = pipe, 0.0

    def progress(self, event: EmbedProgress) -> None:
        now = time.monotonic()
        if now >= self._next or event.texts >= event.texts_total:
            self._next = now + REPORT_SECONDS
            self._pipe.send(event)

    def warning(self, message: Warning | str, category: type[Warning], *_args: Any, **_kwargs: Any) -> None:
        if issubclass(category, PalcacheWarning):
            self._pipe.send(str(message))
