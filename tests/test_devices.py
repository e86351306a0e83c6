"""A device is one that is there, or one sentence; free memory is what the system and its limits leave."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from palcache.devices import free_memory, resolve_device
from palcache.errors import InputError

CPU = torch.device("cpu")
GIB = 2**30


def machine(monkeypatch: pytest.MonkeyPatch, *, gpus: int = 0, mps: bool = False) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)


def kernel(monkeypatch: pytest.MonkeyPatch, files: dict[str, str], *, data_limit: int = resource.RLIM_INFINITY) -> None:
    """Let the kernel's tables say what `files` says, and nothing else."""
    read = Path.read_text

    def read_text(path: Path, encoding: str | None = None, errors: str | None = None) -> str:
        if str(path).startswith(("/proc", "/sys")):
            if str(path) not in files:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return files[str(path)]
        return read(path, encoding, errors)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (data_limit, data_limit))


@pytest.mark.parametrize(
    ("gpus", "mps", "expected"), [(0, False, "cpu"), (0, True, "mps"), (1, False, "cuda"), (3, True, "cuda")]
)
def test_auto_is_the_best_there_is(monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, expected: str) -> None:
    machine(monkeypatch, gpus=gpus, mps=mps)
    assert resolve_device("auto") == torch.device(expected)


@pytest.mark.parametrize("device", ["cpu", "cpu:0", "cuda", "cuda:0", "cuda:1", "mps"])
def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    machine(monkeypatch, gpus=2, mps=True)
    assert resolve_device(device) == torch.device(device)


@pytest.mark.parametrize(
    ("device", "gpus"),
    [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:2", 2), ("mps", 1), ("cpu:1", 2), ("meta", 1)],
)
def test_devices_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch, device: str, gpus: int) -> None:
    machine(monkeypatch, gpus=gpus)
    expected = rf"^The device {device} is not on this machine; choose --device auto or cpu\.$"
    with pytest.raises(InputError, match=expected):
        resolve_device(device)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:one", "cuda:-1", "", "cuda 0"])
def test_unknown_devices_are_refused(device: str) -> None:
    with pytest.raises(InputError, match=rf"^Got the device '{device}'; expected auto, cpu, cuda, cuda:N or mps\.$"):
        resolve_device(device)


def test_free_memory_of_this_machine() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(CPU) <= total


def test_free_memory_is_what_the_system_calls_available(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(monkeypatch, {"/proc/meminfo": "MemTotal:  16777216 kB\nMemAvailable:  3145728 kB\nHugePages_Total:  0\n"})
    assert free_memory(CPU) == 3 * GIB


def test_free_memory_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS there is no /proc: all its memory is the best guess."""
    kernel(monkeypatch, {})
    assert free_memory(CPU) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("maximum", "high", "expected"),
    [("max", "max", 8), ("5", "max", 3), ("5", "4", 2), ("max", "4", 2), ("1", "max", 0)],
)
def test_free_memory_in_a_control_group(
    monkeypatch: pytest.MonkeyPatch, maximum: str, high: str, expected: int
) -> None:
    """What the group's processes hold counts; its page cache can be taken back."""
    limits = {"memory.max": maximum, "memory.high": high}
    files = {f"/sys/fs/cgroup/jobs/7/{name}": str(int(n) * GIB) if n != "max" else n for name, n in limits.items()}
    files["/sys/fs/cgroup/jobs/7/memory.stat"] = f"anon {2 * GIB}\nfile {9 * GIB}\n"
    files["/proc/self/cgroup"] = "0::/jobs/7\n"
    files["/proc/meminfo"] = f"MemAvailable: {8 * GIB // 1024} kB\n"
    kernel(monkeypatch, files)
    assert free_memory(CPU) == expected * GIB


@pytest.mark.parametrize(("own", "above", "expected"), [(5, 9, 3), (9, 4, 1), (9, 9, 6)])
def test_free_memory_in_a_control_group_of_version_1(
    monkeypatch: pytest.MonkeyPatch, own: int, above: int, expected: int
) -> None:
    """Every group up to the root may limit; what other processes of a group hold counts against it."""
    root = "/sys/fs/cgroup/memory"
    kernel(
        monkeypatch,
        {
            "/proc/self/cgroup": "9:name=systemd:/\n4:cpu,memory:/jobs/7\n0::/\n",
            f"{root}/jobs/7/memory.limit_in_bytes": f"{own * GIB}\n",
            f"{root}/jobs/7/memory.stat": f"rss 1\ntotal_rss {2 * GIB}\n",
            f"{root}/jobs/memory.limit_in_bytes": f"{above * GIB}\n",
            f"{root}/jobs/memory.stat": f"rss 1\ntotal_rss {3 * GIB}\n",
            f"{root}/memory.limit_in_bytes": "9223372036854771712\n",
            f"{root}/memory.stat": f"total_rss {6 * GIB}\n",
            "/proc/meminfo": f"MemAvailable: {8 * GIB // 1024} kB\n",
        },
    )
    assert free_memory(CPU) == expected * GIB


@pytest.mark.parametrize("path", ["/", "/docker/of-the-host"])
def test_free_memory_in_a_container(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A container's own group is the root that it sees, whatever its name on the host."""
    kernel(
        monkeypatch,
        {
            "/proc/self/cgroup": f"0::{path}\n",
            "/sys/fs/cgroup/memory.max": str(3 * GIB),
            "/sys/fs/cgroup/memory.stat": f"anon {GIB}\n",
            "/proc/meminfo": f"MemAvailable: {8 * GIB // 1024} kB\n",
        },
    )
    assert free_memory(CPU) == 2 * GIB


def test_free_memory_under_a_limit_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    status = f"Name:\tpython\nVmData:\t {GIB // 1024} kB\n"
    meminfo = f"MemAvailable: {8 * GIB // 1024} kB\n"
    kernel(monkeypatch, {"/proc/self/status": status, "/proc/meminfo": meminfo}, data_limit=4 * GIB)
    assert free_memory(CPU) == 3 * GIB


def test_free_memory_of_a_gpu_is_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (5 + (device.index or 0), 80))
    assert free_memory(torch.device("cuda", 2)) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_free_memory_of_a_real_gpu() -> None:
    assert 0 < free_memory(resolve_device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
