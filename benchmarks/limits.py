"""A memory limit that counts what a process really takes, file pages included: a control group of its own.

`RLIMIT_AS` and `RLIMIT_DATA` are no substitute: they count the address space of the cache's copy-on-write maps, which
takes no memory, and so refuse what would fit.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

_ROOT: Final = Path("/sys/fs/cgroup")


class NoLimitError(Exception):
    """This machine lets us set no memory limit."""


@final
@dataclass(frozen=True, slots=True)
class Limit:
    """A memory limit for the processes started in it.

    Attributes:
        how: what sets it, for people.
        command: what starts a command within the limit, to be put before it.
        group: the control group's folder, where it is known.
    """

    how: str
    command: tuple[str, ...]
    group: Path | None

    def peak(self) -> int | None:
        """Return the most bytes that were charged at once, where the system says."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError, ValueError):
                if self.group is not None:
                    return int((self.group / name).read_text())
        return None


@contextlib.contextmanager
def memory_limit(limit: int) -> Iterator[Limit]:
    """Yield a limit of some bytes of memory: a control group below our own, or a scope of systemd.

    Raises:
        NoLimitError: neither can be made.
    """
    group = _make_group(limit)
    if group is not None:
        try:
            join = ("sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(group))
            version = 2 if (group / "memory.max").exists() else 1
            yield Limit(f"a control group (v{version})", join, group)
        finally:
            _remove_group(group)
        return
    scope = _scope(limit)
    if scope is None:
        raise NoLimitError("no control group can be made here and systemd-run starts no scope")
    yield Limit("a systemd scope", scope, None)


def _make_group(limit: int) -> Path | None:
    """Make a control group with a memory limit below that of this process; None where that is not allowed."""
    for parent, files in _own_groups():
        group = parent / f"palcache-bench-{os.getpid()}"
        try:
            group.mkdir()
            for name, value in files:
                (group / name).write_text(value.format(limit=limit))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        return group
    return None


def _own_groups() -> Iterator[tuple[Path, tuple[tuple[str, str], ...]]]:
    """Yield the folders of our memory groups, each with the files that set a limit (v1, then v2)."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if "memory" in controllers.split(","):
                yield _ROOT / "memory" / path.lstrip("/"), (("memory.limit_in_bytes", "{limit}"),)
            elif not controllers:
                yield _ROOT / path.lstrip("/"), (("memory.max", "{limit}"), ("memory.swap.max", "0"))


def _remove_group(group: Path) -> None:
    for _ in range(50):  # the last process may still be leaving
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def _scope(limit: int) -> tuple[str, ...] | None:
    if shutil.which("systemd-run") is None:
        return None
    user = () if os.geteuid() == 0 else ("--user",)
    properties = ("-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0")
    command = ("systemd-run", "--quiet", "--scope", *user, *properties)
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if tried.returncode == 0 else None


def forget_pages(folder: Path) -> None:
    """Drop the files under a folder from the page cache, so that whoever reads them next is charged for them."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
