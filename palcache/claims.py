"""Who writes which shard: claims that die with their process, so that several writers share one cache.

A claim is a file `NNNNNN.claim` that holds the keys of one shard to be. Its writer keeps an exclusive `flock` on it;
the kernel drops the lock when the process ends, however it ends, and the next writer takes the claim over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt

from palcache.errors import CacheError
from palcache.files import publish, storage_errors
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json
from palcache.indexes import KeyIndex

CLAIM: Final = ".claim"
PARTIAL: Final = ".partial"


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write one shard, held until `release`.

    Attributes:
        folder: the space's folder of shards.
        sequence: the shard's number.
        keys: its row keys in row order, (N, 16).
        descriptor: the locked file.
    """

    folder: Path
    sequence: int
    keys: Keys
    descriptor: int

    @property
    def path(self) -> Path:
        """The claim's own file."""
        return self.folder / f"{self.sequence:06d}{CLAIM}"

    @property
    def partial(self) -> Path:
        """The unsealed shard."""
        return self.folder / f"{self.sequence:06d}{PARTIAL}"

    def commit(self, digest: str) -> Path:
        """Give the sealed shard its name for good and end the claim; return the new path."""
        final_path = self.folder / f"{self.sequence:06d}-{digest}.h5"
        publish(self.partial, final_path)
        self.drop()
        return final_path

    def drop(self) -> None:
        """End the claim and remove its files."""
        self.partial.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let go of the claim; its files stay for whoever resumes."""
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file for a short critical section; waits for other holders.

    Raises:
        StorageError: the folder cannot be written.
    """
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Standing:
    """What stands in a folder of shards besides sealed ones.

    Attributes:
        live: keys that living writers work on, (m, 16).
        stale: claims of dead writers, now held by the caller.
    """

    live: Keys
    stale: tuple[Claim, ...]


def survey(folder: Path) -> Standing:
    """Return the claims in a folder; those whose writer is dead are taken over. Call under the folder's lock."""
    live, stale = [np.empty((0, KEY_BYTES), np.uint8)], []
    for path in sorted(folder.glob(f"*{CLAIM}")):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # its writer has just sealed the shard
            continue
        head, keys = _read(path, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            live.append(keys)
            continue
        claim = Claim(folder, int(path.stem), keys, descriptor)
        if any(folder.glob(f"{path.stem}-*.h5")):  # killed between sealing the shard and ending the claim
            claim.drop()
            continue
        if head["boot"] != _boot_id():  # after a power cut the rows marked done may never have reached the disk
            claim.partial.unlink(missing_ok=True)
        stale.append(claim)
    return Standing(np.concatenate(live), tuple(stale))


def make_claim(folder: Path, sequence: int, keys: Keys) -> Claim:
    """Claim a new shard for some keys. Call under the folder's lock.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = folder / f"{sequence:06d}{CLAIM}"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    head = {"boot": _boot_id(), "host": os.uname().nodename, "pid": os.getpid()}
    with storage_errors(path):
        temporary.write_bytes(canonical_json(head) + b"\n" + np.ascontiguousarray(keys).tobytes())
        descriptor = os.open(temporary, os.O_RDWR)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        temporary.replace(path)
    return Claim(folder, sequence, keys, descriptor)


def adoptable(claim: Claim, wanted: KeyIndex) -> bool:
    """Return whether the caller has the texts of every row of a dead writer's shard, so that it can go on with it."""
    return bool(np.all(wanted.find(claim.keys) >= 0))


def next_sequence(folder: Path) -> int:
    """Return the number after the highest one in use in a folder of shards."""
    numbers = [int(path.name[:6]) for path in folder.iterdir() if path.name[:6].isdigit()]
    return max(numbers, default=0) + 1


def _read(path: Path, descriptor: int) -> tuple[dict[str, Any], npt.NDArray[np.uint8]]:
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        return head, np.frombuffer(body, np.uint8).reshape(-1, KEY_BYTES)
    except ValueError as error:
        os.close(descriptor)
        raise CacheError(
            f"{path} is not a claim ({error}); delete it and run the same palcache embed again."
        ) from error


def _boot_id() -> str:
    """Return a name of this run of the operating system, empty where the system gives none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
