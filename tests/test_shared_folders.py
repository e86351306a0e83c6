"""Folders without locks, that cannot be written, or that other machines share; claims of the dead and of the living."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from palcache.cache import Cache
from palcache.care.verification import verify_cache
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import embed_comparisons
from palcache.embedding.forwards import BusyClock
from palcache.embedding.summaries import EmbedSummary
from palcache.errors import CacheError, PalcacheWarning, StorageError
from palcache.fingerprints import text_keys
from palcache.storage.claims import STALE_SECONDS, make_claim, survey
from palcache.storage.locks import rewriting
from tests.stubs import StubEncoder, small_table

TABLE = small_table()
CONFIG = EmbedConfig(dtype="float32", shard_rows=4)


def embed(path: Path, encoder: StubEncoder | None = None, config: EmbedConfig = CONFIG) -> EmbedSummary:
    return embed_comparisons(TABLE, encoder or StubEncoder(), Cache.create(path), name="table", config=config)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def flock(_file: object, _operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        StorageError, match=r"is on a file system without file locks \(.+\), which writers .* local disk"
    ):
        embed(tmp_path / "c")


def test_other_errors_of_a_lock_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_file: object, _operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):
        embed(tmp_path / "c")


def test_a_read_only_folder_is_one_sentence_for_writers_and_none_for_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(tmp_path / "c")
    real = os.open

    def read_only(path: str | Path, flags: int, mode: int = 0o777, **options: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, flags, mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(
        StorageError, match=r"cannot be written \(Read-only file system\); choose a folder you may write"
    ):
        embed(tmp_path / "c")
    with pytest.raises(StorageError, match="Read-only file system"), rewriting(tmp_path / "c"):
        pass
    assert verify_cache(Cache(tmp_path / "c")).problems == ()


def claim_of_another_machine(folder: Path, age: float) -> None:
    """Leave a claim as a writer on another machine does, whose lock does not reach here."""
    folder.mkdir(parents=True)
    claim = make_claim(folder, 1, text_keys(TABLE.responses))
    claim.release()
    body = claim.path.read_bytes().partition(b"\n")[2]
    head = {"boot": "another-boot", "host": "another-host", "pid": 12}
    claim.path.write_bytes(json.dumps(head).encode() + b"\n" + body)
    os.utime(claim.path, (time.time() - age, time.time() - age))


def test_a_fresh_claim_of_another_machine_counts_as_living_though_its_lock_is_free(tmp_path: Path) -> None:
    claim_of_another_machine(tmp_path / "shards", STALE_SECONDS - 60)
    standing = survey(tmp_path / "shards")
    assert (len(standing.live), len(standing.stale)) == (13, 0)
    assert standing.holders == ("process 12 on another-host",)


def test_an_old_claim_of_another_machine_is_taken_over(tmp_path: Path) -> None:
    claim_of_another_machine(tmp_path / "shards", STALE_SECONDS + 60)
    standing = survey(tmp_path / "shards")
    assert (len(standing.live), len(standing.stale)) == (0, 1)
    for claim in standing.stale:
        claim.release()


def test_a_claim_of_this_machine_is_the_locks_alone(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    claim = make_claim(tmp_path / "shards", 1, text_keys(TABLE.responses))
    os.utime(claim.path, (0, 0))
    standing = survey(tmp_path / "shards")
    assert standing.holders == (f"process {os.getpid()} on {os.uname().nodename}",)
    claim.beat()
    assert time.time() - claim.path.stat().st_mtime < 60
    claim.release()
    (stale,) = survey(tmp_path / "shards").stale
    stale.release()


def test_a_model_that_changed_under_its_name_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(tmp_path / "c")
    spec = StubEncoder.spec
    monkeypatch.setattr(StubEncoder, "spec", lambda self, role: {**spec(self, role), "tokenizer": "new"})
    with pytest.warns(
        PalcacheWarning, match="The model stub is not the one that filled this cache: its tokenizer changed"
    ):
        embed(tmp_path / "c")
    assert len(Cache(tmp_path / "c").space_ids) == 4


@pytest.mark.filterwarnings("error::palcache.errors.PalcacheWarning")
def test_what_an_option_chose_is_no_change_of_the_model(tmp_path: Path) -> None:
    embed(tmp_path / "c")
    embed(tmp_path / "c", config=EmbedConfig(dtype="float16"))
    embed(tmp_path / "c", StubEncoder(compute_dtype="bfloat16"))
    assert len(Cache(tmp_path / "c").space_ids) == 6


def test_a_shard_of_another_spec_is_named_with_the_fields_that_differ(tmp_path: Path) -> None:
    embed(tmp_path / "c")
    embed(tmp_path / "c", config=EmbedConfig(dtype="bfloat16", shard_rows=4))
    cache = Cache(tmp_path / "c")
    first, second = (pair[1] for pair in cache.comparisons("table").spaces)
    strange = cache.shard_paths(second)[0]
    shutil.copy(strange, cache.shard_paths(first)[0].with_name(strange.name))
    with pytest.raises(CacheError, match=rf"belongs to the space {second}, not to {first}: .* differ in dtype; move"):
        cache.space(first)


def test_the_busy_clock_counts_overlapping_work_once() -> None:
    clock = BusyClock()
    with clock:
        time.sleep(0.02)
        with clock:
            time.sleep(0.02)
    time.sleep(0.02)
    assert 0.04 <= clock.seconds < 0.06
    clock.add(1.0)
    assert clock.seconds > 1.0


def test_the_summary_says_what_share_of_the_time_the_device_waited(tmp_path: Path) -> None:
    assert EmbedSummary().idle_share is None
    assert EmbedSummary(encoded=1, seconds={"encode": 10.0, "device": 4.0, "others": 2.0}).idle_share == 0.5
    busy = embed(tmp_path / "busy", StubEncoder(seconds=0.05))
    assert busy.idle_share is not None
    assert busy.idle_share < 0.8
    assert {"encode", "wait", "forward", "device", "write", "tokenize"} <= busy.seconds.keys()
    assert embed(tmp_path / "busy").idle_share is None
