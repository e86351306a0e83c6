"""Which device, and how much memory is free on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from palcache.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


def resolve_device(device: str) -> torch.device:
    """Return a device that is there; `auto` is CUDA, then MPS, then the CPU.

    Raises:
        InputError: the device is unknown or not on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"Got the device {device!r}; expected auto, cpu, cuda, cuda:N or mps.") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(found.type, False) or (found.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"The device {device} is not on this machine; choose --device auto or cpu.")
    return found


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be taken on a device now: free GPU memory, or what the system calls available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limit = _memory_limit()
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    return min(available, limit)


def _memory_limit() -> int:
    """Return what is left under the process's own limits (control group, RLIMIT_DATA), or a very large number."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [soft] if soft != resource.RLIM_INFINITY else []
    for name in ("memory.max", "memory.high"):
        try:
            group = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].strip()
            limits.append(int(Path(f"/sys/fs/cgroup{group}/{name}").read_text()))
        except (OSError, ValueError):
            continue
    return min(limits, default=2**62)


def side_by_side(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """Yield the result of each item, in order; on a CPU several at once, on one thread each.

    Small tensors gain little from threads that share one operation and must wait for each other in each.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(threads, "palcache-chunk", initializer=torch.set_num_threads, initargs=(1,))
    try:
        with torch.no_grad():
            yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's share becomes the default of the process
