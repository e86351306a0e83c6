"""Timing things in turn, and the machine on which they were timed."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, final

import torch

Job = Callable[[], float]
"""Does something and returns the seconds that count of it."""

_VERSIONS: Final = ("torch", "sentence-transformers", "transformers", "numpy", "pyarrow", "h5py")


def clock(action: Callable[[], object]) -> float:
    """Return the wall seconds of an action."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(jobs: Mapping[str, Job], rounds: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Return the seconds of each job in each round.

    Each round runs every job once; the order is turned round from one round to the next, so that a machine that grows
    slower or faster favours none.

    Args:
        jobs: by name.
        rounds: how many times.
        warm: run each job once before, uncounted.
    """
    names = list(jobs)
    if warm:
        for name in names:
            jobs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(jobs[name]())
    return seconds


@final
@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast (or as large) one thing is as another.

    Attributes:
        value: median over the rounds.
        low: least of the rounds.
        high: greatest of the rounds.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        digits = 2 if self.value < 20 else 0
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Return the ratio of two things measured in the same rounds."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


@final
@dataclass(frozen=True, slots=True)
class Machine:
    """Where something was measured.

    Attributes:
        cpu: the processor's name.
        cores: cores that this process may use.
        threads: threads of torch.
        memory: bytes of main memory.
        gpu: name of the first CUDA device, or None.
        versions: of Python and of the libraries.
    """

    cpu: str
    cores: int
    threads: int
    memory: int
    gpu: str | None
    versions: Mapping[str, str]

    @classmethod
    def here(cls) -> Machine:
        """Describe this machine."""
        return cls(
            cpu=_cpuinfo("model name") or platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            threads=torch.get_num_threads(),
            memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            versions={"python": platform.python_version(), **_installed()},
        )

    @property
    def name(self) -> str:
        """One name for people: GPU, processor, cores."""
        return ", ".join([*([self.gpu] if self.gpu else []), self.cpu, f"{self.cores} cores"])

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def _installed() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpuinfo(key: str) -> str:
    """Return the first value of a key in /proc/cpuinfo, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")


def has_bfloat16(device: str) -> bool:
    """Return whether a device multiplies matrices in bfloat16 in hardware."""
    if device == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    flags = {*_cpuinfo("flags").split(), *_cpuinfo("Features").split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def devices() -> list[str]:
    """Return the devices to measure on: the CPU, and CUDA where it is there."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def finish(device: str) -> None:
    """Wait for what a device still has to do."""
    if device == "cuda":
        torch.cuda.synchronize()
