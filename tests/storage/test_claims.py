"""Claims: who writes which shard, and what happens when a writer dies."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palcache.errors import StorageError
from palcache.fingerprints import Keys
from palcache.storage.claims import Claim, adoptable, make_claim, next_sequence, survey
from palcache.storage.indexes import KeyIndex
from palcache.storage.locks import locked
from tests.children import CONTEXT, finish, start


def keys_of(count: int, seed: int = 0) -> Keys:
    """Return random keys, (count, 16)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def hold(folder: Path, sequence: int, count: int, ready: Any) -> None:
    """Claim a shard, say so, and wait for death."""
    claim = make_claim(folder, sequence, keys_of(count, sequence))
    claim.partial.write_bytes(b"rows")
    ready.put(sequence)
    time.sleep(60)


def adopt(folder: Path, lock: Path, gate: Any, results: Any) -> None:
    """Take over what is stale as soon as all processes are there, and hold it until all have looked."""
    gate.wait()
    with locked(lock):
        stale = survey(folder).stale
    results.put([claim.sequence for claim in stale])
    gate.wait()


def test_a_claim_keeps_its_keys_and_names(tmp_path: Path) -> None:
    """A claim's file holds its keys; it names the shard that it stands for."""
    claim = make_claim(tmp_path, 7, keys_of(3))
    assert (claim.path.name, claim.partial.name) == ("000007.claim", "000007.partial")
    claim.release()
    (found,) = survey(tmp_path).stale
    assert found.sequence == 7
    assert found.keys.tolist() == keys_of(3).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["000007.claim"]


def test_a_living_writers_claim_is_left_alone(tmp_path: Path) -> None:
    """What this very process claims is live as well, so its next claim is of other keys."""
    first, second = make_claim(tmp_path, 1, keys_of(3)), make_claim(tmp_path, 2, keys_of(5, seed=1))
    standing = survey(tmp_path)
    assert standing.stale == ()
    assert standing.live.tolist() == [*keys_of(3).tolist(), *keys_of(5, seed=1).tolist()]
    first.release()
    second.release()
    second.release()
    assert [claim.sequence for claim in survey(tmp_path).stale] == [1, 2]


def test_claims_die_with_their_process(tmp_path: Path) -> None:
    """A claim is live while its process is, and stale as soon as the process is killed; its rows are kept."""
    ready = CONTEXT.Queue()
    process = start(hold, tmp_path, 4, 3, ready)
    assert ready.get(timeout=60) == 4
    assert survey(tmp_path).live.tolist() == keys_of(3, 4).tolist()
    process.kill()
    finish(process)
    (claim,) = survey(tmp_path).stale
    assert claim.partial.read_bytes() == b"rows"
    assert survey(tmp_path).stale == (), "it is ours now"


def test_two_processes_never_take_over_the_same_claim(tmp_path: Path) -> None:
    """Of four that look at once, exactly one gets each stale claim."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for sequence in (1, 2, 3):
        make_claim(folder, sequence, keys_of(2, sequence)).release()
    gate, results = CONTEXT.Barrier(4, timeout=60), CONTEXT.Queue()
    processes = [start(adopt, folder, tmp_path / ".lock", gate, results) for _ in range(4)]
    found = [results.get(timeout=60) for _ in processes]
    assert [finish(process) for process in processes] == [0] * 4
    assert sorted(found) == [[], [], [], [1, 2, 3]]


def test_commit_publishes_and_ends_the_claim(tmp_path: Path) -> None:
    """Afterwards only the sealed shard is there."""
    claim = make_claim(tmp_path, 12, keys_of(2))
    claim.partial.write_bytes(b"sealed")
    path = claim.commit("0123456789abcdef")
    assert path == tmp_path / "000012-0123456789abcdef.h5"
    assert path.read_bytes() == b"sealed"
    assert list(tmp_path.iterdir()) == [path]
    assert claim.file.closed


def test_a_claim_whose_shard_is_sealed_is_removed(tmp_path: Path) -> None:
    """A writer killed between the seal and the end of its claim leaves no work behind."""
    make_claim(tmp_path, 3, keys_of(2)).release()
    sealed = tmp_path / "000003-0123456789abcdef.h5"
    sealed.write_bytes(b"")
    standing = survey(tmp_path)
    assert (len(standing.live), standing.stale) == (0, ())
    assert list(tmp_path.iterdir()) == [sealed]


def test_rows_from_before_the_last_boot_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks may have reached the disk before rows did, so the shard starts anew; its keys are kept."""
    monkeypatch.setattr("palcache.storage.claims._boot_id", lambda: "yesterday")
    claim = make_claim(tmp_path, 1, keys_of(2))
    claim.partial.write_bytes(b"rows")
    claim.release()
    monkeypatch.undo()
    (found,) = survey(tmp_path).stale
    assert not found.partial.exists()
    assert found.keys.tolist() == keys_of(2).tolist()


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 90, b'{"boot":"x"}\n', b"[1]\n" + b"k" * 16, b'{"boot":"x"}\nshort']
)
def test_a_claim_that_a_power_cut_left_is_removed(tmp_path: Path, content: bytes) -> None:
    """An empty or torn claim stops nobody."""
    (tmp_path / "000001.claim").write_bytes(content)
    (tmp_path / "000001.partial").write_bytes(b"rows")
    assert survey(tmp_path).stale == ()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    """A living writer's draft stays; those of killed writers go, and other files are nobody's business."""
    claim = make_claim(tmp_path, 2, keys_of(2))
    for name in (".000001.claim.tmp", ".000002.partial.tmp", ".000003.partial.tmp", "notes.txt", "note.claim"):
        (tmp_path / name).write_bytes(b"draft")
    survey(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "000002.claim",
        ".000002.partial.tmp",
        "notes.txt",
        "note.claim",
    }
    claim.release()


def test_a_claim_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk leaves no claim."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StorageError, match=r"The disk is full while writing .*000001.claim"):
        make_claim(tmp_path, 1, keys_of(2))
    assert list(tmp_path.glob("*.claim")) == []


def test_only_who_has_all_texts_can_go_on(tmp_path: Path) -> None:
    """A claim of texts that the caller lacks is for somebody else."""
    claim = make_claim(tmp_path, 1, keys_of(4))
    assert adoptable(claim, KeyIndex.build(np.concatenate([keys_of(3, seed=9), keys_of(4)])))
    assert not adoptable(claim, KeyIndex.build(keys_of(4)[:3]))
    claim.release()


@pytest.mark.parametrize(
    ("names", "number"),
    [
        ([], 1),
        (["000003.claim"], 4),
        (["000001-ab.h5", "000012-cd.h5", "000004.partial"], 13),
        ([".000009.claim.tmp"], 1),
    ],
)
def test_sequence_numbers_go_on(tmp_path: Path, names: list[str], number: int) -> None:
    """Sealed and claimed shards count, temporary files do not."""
    for name in names:
        (tmp_path / name).touch()
    assert next_sequence(tmp_path) == number


def test_a_lock_excludes_and_sweeps(tmp_path: Path) -> None:
    """One holder at a time, also among threads; temporary files beside the lock are gone once it is held."""
    inside, most = 0, 0
    (tmp_path / ".index.h5.99.tmp").touch()

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with locked(tmp_path / ".lock"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_lock_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder says so."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("palcache.storage.claims.os.open", refuse)
    with pytest.raises(StorageError, match=r"cannot be written \(Read-only file system\)"), locked(tmp_path / ".lock"):
        pass


def test_claims_are_told_apart_by_identity(tmp_path: Path) -> None:
    """Two claims of the same keys are two claims."""
    first, second = (Claim(tmp_path, 1, keys_of(2), (tmp_path / "x").open("ab")) for _ in range(2))
    assert first != second
    first.release()
    second.release()
