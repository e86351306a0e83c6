"""A worker process per device, each claiming and writing its own shards; the parent only listens, and never hangs.

Workers share nothing but the cache: each has a pipe of its own to the parent (a queue's lock would be lost with a killed
worker), and the shard of one that dies is taken over like that of any dead writer.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import pickle
import signal
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Final, final

import torch

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import count_references, embed_comparisons, store_table
from palcache.embedding.summaries import EmbedProgress, EmbedSummary, OnProgress
from palcache.embedding.workers import Failure, Job, MakeEncoder, Ready, run_worker, write_sides
from palcache.errors import InputError, MismatchError, ModelError, PalcacheWarning
from palcache.storage.locks import writing
from palcache.storage.spaces import differing_fields

POLL_SECONDS: Final = 1.0
END_SECONDS: Final = 10.0
_GUARD: Final = 'in a script whose own function loads the model, call palcache under if __name__ == "__main__"'


def embed_with_workers(  # noqa: PLR0913 - keyword-only options
    comparisons: Comparisons,
    cache: Cache,
    *,
    devices: Sequence[str],
    make_encoder: MakeEncoder,
    name: str,
    config: EmbedConfig,
    about: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    summary: EmbedSummary | None = None,
) -> EmbedSummary:
    """Encode every text of a table that the cache lacks with a process per device, then store the table.

    A worker that dies is noticed, and the others take its shards over; where all were killed, this process goes on alone.
    However the call ends, no worker outlives it.

    Args:
        comparisons: the table.
        cache: where to.
        devices: one worker each, as `parse_devices` returns them.
        make_encoder: loads the model in a worker.
        name: of the table in the cache.
        config: the model and how it computes; `device` is each worker's own.
        about: how the table was read and split.
        on_progress: called with the progress of all workers together.
        summary: to be added to.

    Raises:
        InputError: an option or path is not what was expected.
        MismatchError: two devices would fill different spaces; the message names the fields that differ.
        ModelError: the model cannot be loaded, or fails in every worker.
        NumericsError: a vector is not finite or does not fit the stored type.
        StorageError: the disk is full or read-only.

    Warns:
        PalcacheWarning: a worker was lost.
    """
    cache.check_name(name)
    summary = summary or EmbedSummary()
    summary.workers = len(devices)
    with summary.timed("total"), tempfile.TemporaryDirectory(prefix="palcache-") as folder, writing(cache.path):
        with summary.timed("keys"):
            sides = write_sides(comparisons, config, Path(folder))
            summary.references += count_references(comparisons, config)
        threads = max(1, torch.get_num_threads() // max(1, list(devices).count("cpu")))
        jobs = [
            Job(cache.path, name, replace(config, device=device), make_encoder, sides, len(devices), threads)
            for device in devices
        ]
        parent = _Parent(on_progress)
        if not parent.run(jobs, summary):
            warnings.warn(
                f"All {len(devices)} workers were lost ({parent.losses()}); this process goes on alone on {devices[0]}.",
                PalcacheWarning,
                stacklevel=2,
            )
            alone = replace(config, device=devices[0])
            return embed_comparisons(
                comparisons, make_encoder(alone), cache, name=name, config=alone, about=about, on_progress=on_progress,
                summary=replace(summary, references=0, hits=0),
            )  # fmt: skip
        store_table(comparisons, Cache(cache.path), summary, name=name, about=about)
    return summary


@final
@dataclass(slots=True, eq=False)
class _Worker:
    """A worker as the parent sees it."""

    device: str
    process: SpawnProcess
    pipe: Connection
    ready: Ready | None = None
    done: EmbedSummary | None = None
    failure: Failure | None = None
    progress: dict[str, EmbedProgress] = field(default_factory=dict)
    open: bool = True

    def loss(self) -> str:
        """Return how the worker ended that did not finish."""
        if self.failure is not None:
            return str(self.failure.error)
        code = self.process.exitcode
        return (
            f"it was killed by signal {-code}" if code is not None and code < 0 else f"it ended with exit code {code}"
        )


@final
class _Parent:
    """Starts workers, listens, and ends them."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self.on_progress, self.started = on_progress, time.perf_counter()
        self.workers: list[_Worker] = []
        self._said: set[str] = set()

    def run(self, jobs: Sequence[Job], summary: EmbedSummary) -> bool:
        """Return whether a worker saw all shards sealed; False where all were killed. The summary gets what they did."""
        try:
            with _signals_held():
                for job in jobs:
                    self.workers.append(_start(job))
            while running := [worker for worker in self.workers if worker.open]:
                waited: list[Any] = [*(w.pipe for w in running), *(w.process.sentinel for w in running)]
                wait(waited, timeout=POLL_SECONDS)
                for worker in running:
                    self._listen(worker)
        finally:
            self._end()
            for worker in self.workers:
                summary.add_work(worker.done or _partial(worker))
        self._count(summary)
        if any(worker.done for worker in self.workers):
            return True
        failures = [worker.failure for worker in self.workers if worker.failure is not None]
        if failures:
            raise failures[0].error
        if not any(worker.ready or (worker.process.exitcode or 0) < 0 for worker in self.workers):
            raise InputError(f"No worker came up ({self.losses()}, see above); {_GUARD}.")
        return False

    def losses(self) -> str:
        """Return how the workers ended."""
        return "; ".join(sorted({worker.loss() for worker in self.workers}))

    def _listen(self, worker: _Worker) -> None:
        """Take in what a worker has said; what it said before it died counts."""
        dead = not worker.process.is_alive()
        try:
            while worker.pipe.poll():
                self._take(worker, worker.pipe.recv())
        except (EOFError, OSError, pickle.UnpicklingError):
            worker.process.join(END_SECONDS)
            dead = True
        if dead:
            worker.open = False
            worker.pipe.close()
            others = sum(other.open or other.done is not None for other in self.workers)
            if worker.done is None and others:
                self._warn(
                    f"The worker on {worker.device} was lost ({worker.loss()}); the others take its shards over."
                )

    def _take(self, worker: _Worker, message: Any) -> None:
        if isinstance(message, EmbedProgress):
            worker.progress[message.role] = message
            if self.on_progress:
                self.on_progress(self._together(message))
        elif isinstance(message, Ready):
            worker.ready = message
            self._compare_specs()
        elif isinstance(message, EmbedSummary):
            worker.done = message
        elif isinstance(message, Failure):
            worker.failure = message
            if message.early or not isinstance(message.error, ModelError):
                raise message.error  # what no other worker would do better
        else:
            self._warn(str(message))

    def _warn(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            warnings.warn(text, PalcacheWarning, stacklevel=2)

    def _compare_specs(self) -> None:
        """Refuse devices that would fill different spaces, such as GPUs of which only some have bfloat16."""
        ready = [worker for worker in self.workers if worker.ready is not None]
        first = ready[0]
        for other in ready[1:]:
            for role, spec in first.ready.specs.items() if first.ready else ():
                theirs = other.ready.specs[role] if other.ready else spec
                if fields := differing_fields(spec, theirs):
                    raise MismatchError(
                        f"The devices {first.device} and {other.device} would fill different spaces: their encoder specs "
                        f"differ in {', '.join(fields)}; choose one type for all, for example with --compute-dtype float32."
                    )

    def _count(self, summary: EmbedSummary) -> None:
        """Take from the worker that looked first what the cache had."""
        ready = [worker.ready.counts for worker in self.workers if worker.ready is not None]
        if ready:
            least = min(ready, key=lambda counts: counts.hits)
            summary.hits, summary.distinct, summary.spaces = least.hits, least.distinct, least.spaces

    def _together(self, event: EmbedProgress) -> EmbedProgress:
        """Return the progress of all workers in a role."""
        all_ = [worker.progress[event.role] for worker in self.workers if event.role in worker.progress]
        tokens = sum(one.tokens for one in all_)
        return EmbedProgress(
            event.role,
            sum(one.texts for one in all_),
            max(one.texts_total for one in all_),
            tokens,
            max(tokens, sum(one.tokens_total for one in all_) // len(all_)),
            self.started,
            waiting=all(one.waiting for one in all_),
        )

    def _end(self) -> None:
        """End every worker: asked first, killed if that does not help."""
        with _signals_held():
            for worker in self.workers:
                if worker.process.is_alive():
                    worker.process.terminate()
            until = time.monotonic() + END_SECONDS
            for worker in self.workers:
                worker.process.join(max(0.0, until - time.monotonic()))
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()
                worker.pipe.close()


def _partial(worker: _Worker) -> EmbedSummary:
    """Return what is known of the work of a worker that was lost."""
    events = worker.progress.values()
    return EmbedSummary(encoded=sum(event.texts for event in events), tokens=sum(event.tokens for event in events))


def _start(job: Job) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=run_worker, args=(theirs, job), daemon=True, name=f"palcache-{job.config.device}")
    try:
        with _main_left_out(job.make_encoder):
            process.start()
    except RuntimeError as error:
        if "bootstrapping" not in str(error):
            raise
        raise InputError(
            f"A worker has imported the script that asks for workers, which asks again; {_GUARD}."
        ) from error
    finally:
        theirs.close()
    return _Worker(job.config.device, process, ours)


@contextlib.contextmanager
def _main_left_out(make_encoder: MakeEncoder) -> Iterator[None]:
    """Let a process that is started now not run the parent's script again, which it would do to find functions there.

    A script then needs no `if __name__ == "__main__":`, unless what loads the model is a function of its own.
    """
    function = make_encoder.func if isinstance(make_encoder, functools.partial) else make_encoder
    main = sys.modules["__main__"]
    if getattr(function, "__module__", "__main__") != "__main__":
        sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back meanwhile, so that no worker is started and not known, or left running.

    A started worker inherits this: it never sees Ctrl-C, and takes SIGTERM once it is ready to.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
