"""Stage 1 where texts, memory, numbers or disks fail: one sentence, and nothing finished is lost."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palcache.cache import Cache
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.devices import is_out_of_memory
from palcache.embedding.encoding import EmbedProgress, embed_comparisons
from palcache.encoders import Role
from palcache.errors import ModelError, NumericsError, StorageError
from palcache.fingerprints import text_keys
from palcache.storage.shards import FAILED
from tests.children import embed_limited, embed_until, finish, start
from tests.embedding.runs import CONFIG, SHARD_ROWS, assert_holds, leftovers, run, space_of
from tests.stubs import StubEncoder, contents, differing, small_table, texts_of


def test_texts_that_fail_are_recorded_and_retried(folder: Path) -> None:
    """The run goes on without them; a later run encodes them, and until then nothing finds them."""
    table = small_table()
    bad = [texts_of(table, "response")[6], texts_of(table, "prompt")[4]]
    encoder = StubEncoder(fails_on=frozenset(bad), batch_sensitive=False)
    summary = run(folder, table, encoder)
    assert (summary.failed, summary.encoded) == (2, 16)
    (line,) = [json.loads(line) for line in (space_of(folder, "response").folder / "failed.jsonl").open("rb")]
    assert line["text"] == bad[0]
    assert line["error"] == f"ValueError: cannot encode {bad[0]}"
    assert line["key"] == text_keys(table.responses)[6].tobytes().hex()
    space = space_of(folder, "response")
    assert space.find(text_keys(table.responses)).tolist() == [row if row != 6 else -1 for row in range(13)]
    assert space.shards[1].flags[2] & FAILED
    assert len(verify_cache(Cache(folder)).problems) == 2
    before = contents(folder)
    again = run(folder, table, encoder)
    assert (again.failed, again.encoded, again.hits) == (2, 0, 16)
    assert contents(folder) == before, "a retry that fails again left something behind"
    healed = run(folder, table, StubEncoder(batch_sensitive=False))
    assert (healed.failed, healed.encoded) == (0, 2)
    assert_holds(folder, table, encoder)


def test_a_shard_without_a_single_vector_is_left_out(folder: Path) -> None:
    """Texts that fail all together leave no shard of zeros."""
    table = small_table()
    encoder = StubEncoder(fails_on=frozenset(texts_of(table, "response")[:SHARD_ROWS]))
    summary = run(folder, table, encoder)
    assert (summary.failed, summary.encoded) == (4, 14)
    assert len(space_of(folder, "response")) == 13 - SHARD_ROWS
    assert leftovers(folder) == []


def test_failures_are_reported_once_after_a_kill(folder: Path) -> None:
    """Killed on either side of the report, and with the report cut short, a resumed run leaves one line."""
    table = small_table(3, 7)
    encoder = StubEncoder(fails_on=frozenset(texts_of(table, "response")[5:6]))
    assert finish(start(embed_until, folder / "whole", table, encoder, CONFIG, -1)) == 0
    reference, moments = contents(folder / "whole"), int((folder / "whole.count").read_text())
    for moment in range(moments // 2, moments, 13):
        path = folder / f"cache-{moment}"
        finish(start(embed_until, path, table, encoder, CONFIG, moment))
        for report in path.glob("spaces/*/failed.jsonl"):
            os.truncate(report, report.stat().st_size // 2)
        run(path, table, encoder)
        assert differing(contents(path), reference) == [], moment


def test_failed_rows_of_a_begun_shard_are_retried(folder: Path) -> None:
    """What failed before the kill is tried again by the run that goes on with the shard."""
    table = small_table()
    encoder = StubEncoder(fails_on=frozenset(texts_of(table, "prompt")[:2]), batch_sensitive=False)

    def interrupt(event: EmbedProgress) -> None:
        if event.texts >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(folder, table, encoder, on_progress=interrupt)
    healed = StubEncoder(batch_sensitive=False)
    assert run(folder, table, healed).failed == 0
    assert_holds(folder, table, healed)


def test_an_encoder_that_fails_on_everything_stops(folder: Path) -> None:
    """A broken encoder does not mark a whole table as failed; once it is mended the run goes on."""
    table = small_table(12, 15)
    broken = StubEncoder(fails_on=frozenset([*texts_of(table, "prompt"), *texts_of(table, "response")]))
    config = EmbedConfig(shard_rows=10)
    with pytest.raises(
        ModelError, match=r"failed on 8 texts in a row, and on 'ask.*' too \(ValueError: cannot.*failed.jsonl"
    ):
        run(folder, table, broken, config)
    run(folder, table, StubEncoder(batch_sensitive=False), config)
    assert_holds(folder, table, StubEncoder(batch_sensitive=False))


def test_an_encoder_that_breaks_in_mid_run_stops(folder: Path) -> None:
    """As after a device error, from which every text fails."""
    table = small_table(3, 30)
    encoder = StubEncoder(batch_sensitive=False)

    def break_it(event: EmbedProgress) -> None:
        if event.role == "response" and event.texts > 4:
            encoder.fails_on = frozenset(texts_of(table, "response"))

    with pytest.raises(ModelError, match=r"failed on 8 texts in a row"):
        run(folder, table, encoder, EmbedConfig(shard_rows=25), on_progress=break_it)
    encoder.fails_on = frozenset()
    assert run(folder, table, encoder, EmbedConfig(shard_rows=25)).failed == 0
    assert_holds(folder, table, encoder)


def test_many_texts_that_fail_do_not_stop_a_sound_encoder(folder: Path) -> None:
    """Ten texts too many for the memory in a row, and the rest is encoded."""
    rows = [
        {"user_id": "u", "prompt": f"p{i}", "response_1": f"r{i} " + "w " * 8, "response_2": f"s{i}", "y": 1}
        for i in range(10)
    ]
    summary = run(folder, Comparisons.from_rows(rows), StubEncoder(memory=8, token_budget=40), EmbedConfig())
    assert (summary.failed, summary.encoded) == (10, 20)


def test_out_of_memory_halves_the_budget(folder: Path) -> None:
    """Batches that do not fit are halved, and the next ones are planned smaller: few attempts are in vain."""
    table, encoder = small_table(3, 64), StubEncoder(token_budget=96, memory=24, batch_sensitive=False)
    summary = run(folder, table, encoder, EmbedConfig(shard_rows=100))
    assert (summary.failed, summary.encoded) == (0, 67)
    assert_holds(folder, table, encoder)
    assert len(encoder.batches) > 12
    assert encoder.overflows <= 4, "later batches were planned as large as those that failed"


@pytest.mark.parametrize(
    ("message", "memory"),
    [
        ("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory", True),
        ("MPS backend out of memory (MPS allocated: 1 GiB)", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("index out of range in self", False),
    ],
)
def test_memory_that_ran_out_is_told_on_every_device(message: str, memory: bool) -> None:
    """Not every library raises `torch.OutOfMemoryError`."""
    assert is_out_of_memory(RuntimeError(message)) == memory


def test_out_of_memory_with_workers_does_not_halve_for_each_of_them(folder: Path) -> None:
    """Batches that were already under way say nothing new about the memory."""
    table = small_table(3, 64)
    encoder = StubEncoder(token_budget=96, memory=48, workers=4, batch_sensitive=False)
    run(folder, table, encoder, EmbedConfig(shard_rows=100))
    assert_holds(folder, table, encoder)
    assert encoder.overflows >= 4
    assert len(encoder.batches) < 30, "the budget was halved again and again"


def test_memory_is_free_before_a_batch_is_tried_again(folder: Path) -> None:
    """No frame of the failed attempt is alive while its halves are encoded, or its tensors would fill the device."""
    alive: list[bool] = []

    class Hoarding:
        """Fails above two rows and looks whether the last attempt's tensors are gone."""

        def __init__(self, stub: StubEncoder) -> None:
            self._stub = stub
            self._last: Callable[[], object] = lambda: None

        def __getattr__(self, name: str) -> Any:
            return getattr(self._stub, name)

        def encode(self, window: Any, rows: Any, role: Role) -> torch.Tensor:
            alive.append(self._last() is not None)
            hoard = torch.zeros(3)
            self._last = weakref.ref(hoard)
            if len(rows) > 2:
                raise torch.OutOfMemoryError("stub out of memory")
            return self._stub.encode(window, rows, role) + hoard[0]

    embed_comparisons(small_table(), Hoarding(StubEncoder()), Cache.create(folder), name="t", config=CONFIG)
    assert len(alive) > 10
    assert not any(alive)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "nan_on",
            r"A vector is not finite: row 2 of shard 000002 in the response space, the text 'say6.*float32",
        ),
        (
            "huge_on",
            r"beyond the range of float16 \(65504\): row 2 of shard 000002 .*the text 'say6.*store with --dtype bfloat16",
        ),
    ],
)
def test_vectors_that_cannot_be_stored_stop_the_run(
    folder: Path, reference: dict[str, bytes], option: str, message: str, workers: int
) -> None:
    """The text and the remedy are named, and what was finished is kept."""
    table = small_table()
    encoder = StubEncoder(workers=workers)
    setattr(encoder, option, frozenset([texts_of(table, "response")[6]]))
    with pytest.raises(NumericsError, match=message):
        run(folder / "cache", table, encoder)
    sealed = {name: content for name, content in contents(folder / "cache").items() if name.endswith(".h5")}
    assert len(sealed) >= 3
    assert sealed.items() <= reference.items()
    resumed = StubEncoder()
    run(folder / "cache", table, resumed)
    assert sum(resumed.batches) < 13
    assert differing(contents(folder / "cache"), reference) == []


@pytest.mark.parametrize(
    ("compute", "remedy"), [("float16", "--compute-dtype bfloat16 or float32"), ("bfloat16", "--compute-dtype float32")]
)
def test_the_remedy_fits_the_computation(folder: Path, compute: str, remedy: str) -> None:
    """What is advised is not what was done."""
    table = small_table()
    encoder = StubEncoder(nan_on=frozenset(texts_of(table, "prompt")), compute_dtype=compute)
    with pytest.raises(NumericsError, match=remedy):
        run(folder, table, encoder)


def test_huge_values_fit_bfloat16(folder: Path) -> None:
    """The advice helps."""
    table = small_table()
    encoder = StubEncoder(huge_on=frozenset(texts_of(table, "response")[:3]))
    run(folder, table, encoder, EmbedConfig(dtype="bfloat16"))
    assert float(space_of(folder, "response").tensor().float().abs().max()) > 65_504


@pytest.mark.parametrize("call", [1, 2, 5, 8])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    folder: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Whichever reservation fails, the run says so, leaves no half file, and goes on when there is space."""
    calls = 0
    reserve = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(StorageError, match=r"The disk is full while writing .*; free some space and run the same"):
            run(folder / "cache")
    assert not [name for name in leftovers(folder / "cache") if name.endswith(".tmp")]
    run(folder / "cache")
    assert differing(contents(folder / "cache"), reference) == []


@pytest.mark.parametrize("limit", [2_000, 100_000])
def test_a_limit_on_file_sizes_is_one_sentence(folder: Path, reference: dict[str, bytes], limit: int) -> None:
    """A quota that cuts files short is found before anything is written through a map, where it would kill."""
    path = folder / "cache"
    assert finish(start(embed_limited, path, small_table(), StubEncoder(), CONFIG, limit)) == 1
    assert path.with_suffix(".error").read_text().startswith("StorageError: The disk is full while writing")
    run(path)
    assert differing(contents(path), reference) == []
