"""Locks between processes: short critical sections, and who may work on a cache at the same time.

Every lock is an `flock`: the kernel drops it when its process ends, however it ends. A folder whose file system has no
such locks is refused in one sentence.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from palcache.errors import CacheError, PalcacheWarning, StorageError
from palcache.files import storage_errors

WRITERS: Final = ".writers"
"""File that writers of a cache lock together, and whoever rewrites the cache locks alone."""
POLL_SECONDS: Final = 0.2
_NO_LOCKS: Final = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


def take_lock(file: int | IO[bytes], path: Path, *, wait: bool = True, shared: bool = False) -> bool:
    """Lock an open file and return True, or False where another process holds it and `wait` is off.

    Raises:
        StorageError: the file system has no locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise StorageError(
                f"{path.parent} is on a file system without file locks ({error.strerror}), which writers need; put "
                "it on a local disk, or have it mounted with locks (NFS: its lock service, Lustre: flock)."
            ) from error
        raise
    return True


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file for a short critical section; waits for other holders.

    Temporary files beside it are removed: whoever writes one holds this lock, so they are a killed writer's.

    Raises:
        StorageError: the folder cannot be written, or its file system has no locks.
    """
    descriptor = _open(path)
    try:
        take_lock(descriptor, path)
        for leftover in path.parent.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Hold a cache as one of its writers: they may be many, and wait while someone rewrites the cache.

    Raises:
        StorageError: the folder cannot be written, or its file system has no locks.

    Warns:
        PalcacheWarning: someone rewrites the cache now.
    """
    path = cache / WRITERS
    descriptor = _open(path)
    try:
        if not take_lock(descriptor, path, wait=False, shared=True):
            warnings.warn(
                f"{cache} is being compacted, merged or repaired by another process; waiting for it to end.",
                PalcacheWarning,
                stacklevel=2,
            )
            while not take_lock(descriptor, path, wait=False, shared=True):
                time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def holding(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock on a file for long; yields False at once where another process holds it.

    Raises:
        StorageError: the folder cannot be written, or its file system has no locks.
    """
    descriptor = _open(path)
    try:
        yield take_lock(descriptor, path, wait=False)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def rewriting(cache: Path) -> Iterator[None]:
    """Hold a cache alone, to move or remove what stands in it; readers are not disturbed.

    Raises:
        CacheError: another process writes or rewrites it.
        StorageError: the folder cannot be written, or its file system has no locks.
    """
    with holding(cache / WRITERS) as held:
        if not held:
            raise CacheError(
                f"{cache} is being written by another process; wait for it to end, then run the same command again."
            )
        yield


def _open(path: Path) -> int:
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
