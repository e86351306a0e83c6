"""Forward passes of one shard: ahead of the writing where that pays, and timed, so that idle devices show."""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import final

import numpy as np
import numpy.typing as npt
import torch

from palcache.encoders import States, TokenizedTexts

Rows = npt.NDArray[np.int64]
Forward = Callable[[], States]
"""Returns what the encoder made of a batch, on the CPU, or raises what it raised."""
Encode = Callable[[TokenizedTexts, Rows], States]


@final
class BusyClock:
    """Seconds in which at least one of several threads was inside the block."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._active, self._since, self._lock = 0, 0.0, threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._active == 0:
                self._since = time.perf_counter()
            self._active += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._active -= 1
            if self._active == 0:
                self.seconds += time.perf_counter() - self._since

    def add(self, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        with self._lock:
            self.seconds += seconds


@final
class Forwards:
    """Computes what an encoder makes of batches, in their order.

    On a CPU several threads compute ahead where the encoder says so. On CUDA one thread launches ahead, and vectors come
    back by asynchronous copies into pinned memory, so that the device need not wait for the disk.

    Args:
        encode: returns what the encoder makes of some rows of a window.
        workers: how many threads may call it at once with profit.
    """

    def __init__(self, encode: Encode, workers: int) -> None:
        self.encode, self.workers = encode, workers
        self.clock = BusyClock()
        self._cuda: torch.device | None = None

    def one(self, window: TokenizedTexts, rows: Rows) -> States:
        """Return what the encoder makes of some rows."""
        return self._launch(window, rows)()

    def all(self, window: TokenizedTexts, batches: Iterable[Rows]) -> Iterator[tuple[Rows, Forward]]:
        """Yield batches in order with what returns their vectors."""
        remaining = iter(batches)
        workers, ahead = self.workers, 2 * self.workers
        if workers == 1:
            for rows in remaining:
                yield rows, functools.partial(self.one, window, rows)
                if self._cuda is not None:  # the first vectors came from a GPU
                    break
            else:
                return
        yield from self._ahead(window, remaining, workers, ahead)

    def _ahead(
        self, window: TokenizedTexts, batches: Iterable[Rows], workers: int, depth: int
    ) -> Iterator[tuple[Rows, Forward]]:
        threads = torch.get_num_threads()
        share = max(1, threads // workers)
        pool = ThreadPoolExecutor(workers, "palcache-forward", initializer=torch.set_num_threads, initargs=(share,))
        waiting: deque[tuple[Rows, Future[Forward]]] = deque()
        try:
            for rows in batches:
                waiting.append((rows, pool.submit(self._launch, window, rows)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, functools.partial(_finish, future)
            yield from ((rows, functools.partial(_finish, future)) for rows, future in waiting)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # a worker's share becomes the default of the process

    def _launch(self, window: TokenizedTexts, rows: Rows) -> Forward:
        """Start a batch; what is returned waits for it."""
        if self._cuda is None:
            with self.clock:
                states = self.encode(window, rows)
                if states.pooled.device.type == "cuda":
                    self._cuda = states.pooled.device
                    states = _on_host(states, pinned=False)
            return lambda: states
        with torch.cuda.device(self._cuda):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            host = _on_host(self.encode(window, rows), pinned=True)
            end.record()

        def wait() -> States:
            end.synchronize()
            self.clock.add(begin.elapsed_time(end) / 1e3)
            return host

        return wait


def _on_host(states: States, *, pinned: bool) -> States:
    """Return states on the CPU; in pinned memory they arrive later, when the device has come so far."""

    def move(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None or not pinned or values.device.type != "cuda":
            return None if values is None else values.cpu()
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        return host.copy_(values, non_blocking=True)

    pooled = move(states.pooled)
    return States(states.pooled if pooled is None else pooled, move(states.prompt), move(states.tokens))


def _finish(future: Future[Forward]) -> States:
    return future.result()()
