"""Files that are either whole or absent, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Final

from palcache.errors import CacheError, StorageError

HDF5_BYTES: Final = 64 << 10
"""What one of palcache's HDF5 files takes at most beside its arrays."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG}


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `path`, or a place where no file can stand, into one sentence.

    Raises:
        StorageError: the disk is full, or `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise StorageError(
                f"The disk is full while writing {path}; free some space and run the same command again: "
                "what was finished is kept."
            ) from error
        if error.errno in _NO_ACCESS:
            raise StorageError(
                f"{path} cannot be written ({error.strerror}); choose a folder you may write."
            ) from error
        raise


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Make the bytes of `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished temporary file its name, durably: fsync, rename, fsync of the folder.

    Raises:
        StorageError: the disk is full, or `path` cannot be written.
    """
    with storage_errors(path):
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` puts into a temporary file beside it; on failure the old file stays.

    Raises:
        StorageError: the disk is full, or `path` cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)  # of a killed process whose number came round again, as in containers
        try:
            write(temporary)
            publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def holds_nothing(folder: Path, *, but: Collection[str] = ()) -> bool:
    """Return whether a folder is empty but for some names and for temporary files, which a killed process may leave."""
    return all(entry.name in but or entry.match(".*.tmp") for entry in folder.iterdir())


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `write_with` in a folder that no other living process of this machine writes."""
    for leftover in folder.glob(".*.*.tmp"):
        number = leftover.name.split(".")[-2]
        if number.isdigit() and (int(number) == os.getpid() or not _is_alive(int(number))):
            leftover.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of someone else
        return True
    return True


def check_space(path: Path, size: int) -> None:
    """Find out that `size` bytes fit under `path`, a name that is free and stays so.

    For writers of HDF5, inside `storage_errors`: where the disk fills up while h5py closes a file, the process crashes.

    Raises:
        OSError: they do not fit, or `path` cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        elif shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(descriptor)
        path.unlink()


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step."""
    write_with(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as readable JSON with sorted keys; the same value gives the same bytes."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path, what: str) -> Any:
    """Return the JSON value in `path`.

    Raises:
        CacheError: the file is missing or is not JSON; `what` names it in the message.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CacheError(f"{path} is missing, so this is not {what}.") from error
    except (ValueError, OSError) as error:
        raise CacheError(f"{path} cannot be read as {what}: {error}.") from error
