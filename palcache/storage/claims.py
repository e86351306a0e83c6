"""Who writes which shard: claims that die with their process, so that several writers share one cache.

A claim is a file `NNNNNN.claim` that holds the keys of one shard to be. Its writer keeps an exclusive `flock` on it;
the kernel drops the lock when the process ends, however it ends, and the next writer takes the claim over. A claim names
its host, boot and process, and its writer touches it as it goes: on a network folder whose locks do not reach other
machines, a claim of another machine counts as living until it has not been touched for `STALE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, final

import numpy as np

from palcache.files import publish, storage_errors
from palcache.fingerprints import KEY_BYTES, Keys, canonical_json
from palcache.storage.indexes import KeyIndex
from palcache.storage.locks import take_lock

CLAIM: Final = ".claim"
PARTIAL: Final = ".partial"
BEAT_SECONDS: Final = 10.0
"""How often a writer touches its claim."""
STALE_SECONDS: Final = 300.0
"""After this long without a touch, a claim of another machine whose lock is free is a dead writer's."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """The right to write one shard, held until `release`.

    Attributes:
        folder: the space's folder of shards.
        sequence: the shard's number.
        keys: its row keys in row order, (N, 16).
        file: the claim's own file, open and locked.
    """

    folder: Path
    sequence: int
    keys: Keys
    file: BinaryIO

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

    def beat(self) -> None:
        """Touch the claim if that is due, so that other machines see that its writer lives."""
        status = os.fstat(self.file.fileno())
        if abs(time.time() - status.st_mtime) >= BEAT_SECONDS:
            os.utime(self.file.fileno())

    def release(self) -> None:
        """Let go of the claim; its files stay for whoever resumes. May be called twice."""
        self.file.close()


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """What stands in a folder of shards besides sealed ones.

    Attributes:
        live: keys that living writers work on, (m, 16).
        stale: claims of dead writers, now held by the caller.
        holders: the living writers, each "process 12 on host".
    """

    live: Keys
    stale: tuple[Claim, ...]
    holders: tuple[str, ...] = ()


def survey(folder: Path) -> Standing:
    """Return the claims in a folder; those whose writer is dead are taken over. Call under the space's lock.

    What dead writers left and nobody can go on with is removed: claims of shards that are sealed, claims that a power
    cut left empty, rows from before the last boot, temporary files.
    """
    live, stale, busy, holders = [np.empty((0, KEY_BYTES), np.uint8)], [], set(), []
    for path in sorted(folder.glob("[0-9]" * 6 + CLAIM)):
        try:
            file = path.open("r+b", buffering=0)
        except FileNotFoundError:  # its writer has just sealed the shard
            continue
        head, keys = _read(file)
        if not take_lock(file, path, wait=False) or _lives_elsewhere(head, file, folder):
            file.close()
            live.append(keys)
            busy.add(path.stem)
            holders.append(f"process {head.get('pid')} on {head.get('host')}")
            continue
        claim = Claim(folder, int(path.stem), keys, file)
        if not len(keys) or any(folder.glob(f"{path.stem}-*.h5")):  # sealed, then killed before the claim was ended
            claim.drop()
            continue
        if head.get("boot") != _boot_id():  # after a power cut the rows marked done may never have reached the disk
            claim.partial.unlink(missing_ok=True)
        stale.append(claim)
    for leftover in folder.glob(".*.tmp"):
        if leftover.name[1:7] not in busy:
            leftover.unlink(missing_ok=True)
    return Standing(np.concatenate(live), tuple(stale), tuple(holders))


def make_claim(folder: Path, sequence: int, keys: Keys) -> Claim:
    """Claim a new shard for some keys. Call under the space's lock.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = folder / f"{sequence:06d}{CLAIM}"
    temporary = folder / f".{path.name}.tmp"
    head = {"boot": _boot_id(), "host": os.uname().nodename, "pid": os.getpid()}
    with storage_errors(path):
        temporary.write_bytes(canonical_json(head) + b"\n" + np.ascontiguousarray(keys).tobytes())
        file = temporary.open("r+b", buffering=0)
        take_lock(file, path)
        temporary.replace(path)
    return Claim(folder, sequence, keys, file)


def adoptable(claim: Claim, wanted: KeyIndex) -> bool:
    """Return whether the caller has the texts of every row of a dead writer's shard, so that it can go on with it."""
    return bool(np.all(wanted.find(claim.keys) >= 0))


def next_sequence(folder: Path) -> int:
    """Return the number after the highest one in use in a folder of shards."""
    numbers = [int(path.name[:6]) for path in folder.iterdir() if path.name[:6].isdigit()]
    return max(numbers, default=0) + 1


def _lives_elsewhere(head: Mapping[str, Any], file: BinaryIO, folder: Path) -> bool:
    """Return whether a claim whose lock is free may still be a living writer's, on a machine that our locks do not reach."""
    if head.get("host") == os.uname().nodename or head.get("boot") in {_boot_id(), None}:
        return False
    clock = folder / ".clock"  # the file system's own time: clocks of machines differ
    clock.touch()
    age = clock.stat().st_mtime - os.fstat(file.fileno()).st_mtime
    clock.unlink(missing_ok=True)
    return age < STALE_SECONDS


def _read(file: BinaryIO) -> tuple[dict[str, Any], Keys]:
    """Return what a claim says of its writer, and its keys; none where a power cut or a stranger left something else."""
    line, _, body = file.read().partition(b"\n")
    try:
        head = json.loads(line)
        return {name: head[name] for name in ("boot", "host", "pid")}, np.frombuffer(body, np.uint8).reshape(
            -1, KEY_BYTES
        )
    except (ValueError, KeyError, TypeError):
        return {}, np.empty((0, KEY_BYTES), np.uint8)


def _boot_id() -> str:
    """Return a name of this run of the operating system, empty where the system gives none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
