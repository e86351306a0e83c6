"""Which device, and how much memory is free on it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import torch

from palcache.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
KEPT_BYTES: Final = 1 << 30
_NO_MEMORY: Final = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
"""What errors say that are no `OutOfMemoryError`: of the CPU, of MPS and of CUDA's own calls, of cuBLAS and cuDNN."""
_TRIM_THRESHOLD: Final = -1
_MMAP_THRESHOLD: Final = -3
"""Options of glibc's `mallopt`, as in malloc.h."""


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
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (found.index or 0) >= counts.get(found.type, 0):
        raise InputError(f"The device {device} is not on this machine; choose --device auto or cpu.")
    return found


def parse_devices(text: str, *, option: str = "--devices") -> list[str]:
    """Return the devices in `cuda:0,cuda:1` or `cpu:2`, one per worker: `cpu:2` stands for two workers on the CPU.

    `option` is what people gave them with.

    Raises:
        InputError: the list is empty, names a device twice, or one that is not on this machine.
    """
    devices: list[str] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        kind, _, count = part.partition(":")
        if kind == "cpu" and count:
            if not count.isdigit() or int(count) < 1:
                raise InputError(f"Got {option} {part}; expected cpu:N with N workers of at least 1.")
            devices += ["cpu"] * int(count)
        else:
            devices.append(str(resolve_device(part)))
    if not devices:
        raise InputError(f"Got {option} {text!r}; expected devices such as cuda:0,cuda:1 or cpu:2.")
    twice = sorted({device for device in devices if device != "cpu" and devices.count(device) > 1})
    if twice:
        raise InputError(f"Got {option} {text} with {', '.join(twice)} twice; name each GPU once.")
    return devices


def free_memory(device: torch.device) -> int:
    """Return the bytes that can be taken on a device now: free GPU memory, or what system and limits leave to a process."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_available_memory(), _left_by_limits())


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that the memory of a device, or of the system, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(mark in str(error) for mark in _NO_MEMORY)


def free_cached_memory() -> None:
    """Give back what torch keeps of freed tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _available_memory() -> int:
    """Return what the system calls available, or all the memory of a system that does not say."""
    try:
        return _table("/proc/meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_by_limits() -> int:
    """Return what is left under the process's own limits (control groups, RLIMIT_DATA), or a very large number."""
    import resource

    left = [2**62]
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    with contextlib.suppress(OSError, KeyError, ValueError):
        if soft != resource.RLIM_INFINITY:
            left.append(soft - _table("/proc/self/status")["VmData"] * 1024)
    for folder, limits, held in _control_groups():
        for name in limits:
            with contextlib.suppress(OSError, KeyError, ValueError):  # v2 says `max` where there is none
                found = _table(str(folder / "memory.stat"))
                left.append(int((folder / name).read_text()) - sum(found.get(part, 0) for part in held))
    return max(0, min(left))


_GROUPS: Final[dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]]] = {
    "": ("/sys/fs/cgroup", ("memory.max", "memory.high"), ("anon", "shmem")),
    "memory": ("/sys/fs/cgroup/memory", ("memory.limit_in_bytes",), ("total_rss", "total_shmem")),
}
"""Of control groups of version 2 and 1: the root, files of limits, and what the processes hold in `memory.stat`."""


def _control_groups() -> Iterator[tuple[Path, tuple[str, ...], tuple[str, ...]]]:
    """Yield the memory groups that the process is in, up to the root: folder, files of limits, what its processes hold.

    A container sees its own group as the root, or the names of folders above it that it does not see.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    for line in lines:
        _, controllers, path = line.split(":", 2)
        found = _GROUPS.get("memory" if "memory" in controllers.split(",") else controllers)
        if found is None:
            continue
        root, limits, held = found
        inside = Path(path.strip("/"))
        for part in (inside, *inside.parents) if inside.parts else (inside,):
            yield Path(root) / part, limits, held


def _table(path: str) -> dict[str, int]:
    """Return the whole numbers in one of the kernel's tables of names and numbers."""
    rows = (line.replace(":", " ").split() for line in Path(path).read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


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


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for this process's next tensors; without glibc nothing happens.

    By default glibc gives large blocks back at once, and every operation on a stack of heads then waits for the kernel to
    find and clear its pages again. It changes the whole process, so only the command line calls it; in a program of your
    own call it once before `run_sweep` or `fit_stack` on a CPU.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            library.mallopt(option, KEPT_BYTES)
