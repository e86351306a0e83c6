"""Caches: spaces read through memory maps, tables, the journal, and what does not belong together."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palcache.cache import MANIFEST, Cache, Space
from palcache.configs import StoredDtype
from palcache.errors import CacheError, InputError, MismatchError, StorageError
from palcache.fingerprints import Keys
from palcache.storage.comparison_files import StoredComparisons
from palcache.storage.datasets import ShardHeader
from palcache.storage.indexes import KeyIndex
from palcache.storage.layouts import create_shard
from palcache.storage.numerics import to_stored
from palcache.storage.shards import ShardWriter
from palcache.table_spaces import spaces_of
from tests.children import CONTEXT, finish, start
from tests.stubs import contents, small_table

WIDTH = 5
Floats = npt.NDArray[np.float32]


def spec(role: str = "response", dtype: StoredDtype = "float32", width: int = WIDTH) -> dict[str, Any]:
    """Return the spec of a space."""
    return {"encoder": "stub", "role": role, "dtype": dtype, "width": width, "compute_dtype": "float32"}


def keys_of(count: int, seed: int = 0) -> Keys:
    """Return random keys, (count, 16)."""
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def vectors_of(count: int, seed: int = 0) -> Floats:
    """Return random vectors."""
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def add_shard(
    cache: Cache, space_id: str, keys: Keys, vectors: Floats, *, failed: Sequence[int] = (), sequence: int | None = None
) -> Path:
    """Seal a shard into a space and record it."""
    space = cache.space(space_id)
    partial = space.shard_folder / "shard.partial"
    header = ShardHeader(space_id, space.spec, len(keys), WIDTH, space.dtype, {"torch": "2"})
    create_shard(partial, header, keys, np.arange(len(keys), dtype=np.uint32), np.zeros(len(keys), np.uint8))
    writer = ShardWriter(partial)
    stored = to_stored(torch.from_numpy(vectors), space.dtype)
    writer.write(np.arange(len(keys)), stored.values, stored.norms)
    for row in failed:
        writer.fail(row)
    number = len(space.shards) + 1 if sequence is None else sequence
    path = partial.rename(space.shard_folder / f"{number:06d}-{writer.seal()}.h5")
    cache.record(space_id, path, len(keys))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Return an empty cache."""
    return Cache.create(tmp_path / "cache")


def filled(cache: Cache, counts: Sequence[int], dtype: StoredDtype = "float32") -> tuple[Space, Floats]:
    """Return a space with a shard of each count, and all its vectors."""
    space_id = cache.add_space(spec(dtype=dtype), {"model": "stub"})
    for number, count in enumerate(counts):
        add_shard(cache, space_id, keys_of(count, number), vectors_of(count, number))
    stored = [np.empty((0, WIDTH), np.float32), *(vectors_of(count, number) for number, count in enumerate(counts))]
    return cache.space(space_id), np.concatenate(stored)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 7), min_size=0, max_size=4),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.data(),
)
def test_rows_are_rows_of_the_tensor(
    tmp_path: Path, counts: list[int], dtype: StoredDtype, data: st.DataObject
) -> None:
    """Whatever rows are asked for, in whatever order and however often, over however many shards."""
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        space, vectors = filled(Cache.create(Path(folder)), counts, dtype)
        total = sum(counts)
        indices = data.draw(st.lists(st.integers(0, total - 1), max_size=20)) if total else []
        expected = torch.from_numpy(vectors).to(getattr(torch, dtype))
        assert len(space) == total
        assert torch.equal(space.tensor(), expected)
        rows = space.rows(np.array(indices, np.int64))
        assert rows.dtype == getattr(torch, dtype)
        assert torch.equal(rows, expected[indices])
        assert torch.equal(space.rows(torch.tensor(indices, dtype=torch.int32)), expected[indices])


@pytest.mark.parametrize("counts", [[], [4], [4, 3]])
@pytest.mark.parametrize("row", [-1, 7, 99])
def test_rows_outside_the_space_are_refused(cache: Cache, counts: list[int], row: int) -> None:
    """A wrong row is named; it never reads something else."""
    space, _ = filled(cache, counts)
    with pytest.raises(IndexError, match=rf"Got the row {row}; the space \w+ has rows 0 to {sum(counts) - 1}"):
        space.rows(np.array([row]))


def test_norms_and_sizes(cache: Cache) -> None:
    """Norms are those before rounding; bytes are those on the disk."""
    space, vectors = filled(cache, [3, 4], "bfloat16")
    np.testing.assert_allclose(space.norms(), np.linalg.norm(vectors, axis=1), rtol=1e-6)
    assert space.nbytes == sum(path.stat().st_size for path in space.shard_folder.iterdir())
    assert (space.role, space.dtype, space.width) == ("response", "bfloat16", WIDTH)


@pytest.mark.parametrize("counts", [[6], [2, 4]])
def test_in_place_writes_stay_in_this_process(cache: Cache, counts: list[int]) -> None:
    """A stray write to a tensor never reaches the disk nor another reader."""
    space, vectors = filled(cache, counts)
    before = contents(cache.path)
    space.tensor().fill_(7)
    space.rows(np.arange(3)).zero_()
    assert contents(cache.path) == before
    assert torch.equal(cache.space(space.space_id).tensor(), torch.from_numpy(vectors))


def test_keys_lead_to_their_first_row_and_never_to_a_failed_one(cache: Cache) -> None:
    """Where a key stands twice the first row counts; a text that failed is found only where it did not."""
    space_id = cache.add_space(spec(), {})
    keys = keys_of(6)
    add_shard(cache, space_id, keys[:4], vectors_of(4), failed=[1, 2])
    add_shard(cache, space_id, keys[[0, 2, 5]], vectors_of(3, 1))
    space = cache.space(space_id)
    assert space.find(keys).tolist() == [0, -1, 5, 3, -1, 6]
    assert space.find(keys[:0]).tolist() == []


def test_the_index_is_derived(cache: Cache) -> None:
    """It may be missing, behind or unreadable: readers build it in memory, and the next writer brings it up to date."""
    space, _ = filled(cache, [3, 4])
    path, keys = space.folder / "index.h5", np.concatenate([keys_of(3, 0), keys_of(4, 1)])
    assert not path.exists()
    assert space.find(keys).tolist() == list(range(7))
    cache.save_index(space.space_id)
    written = path.read_bytes()
    stamp = path.stat().st_mtime_ns
    cache.save_index(space.space_id)
    assert path.stat().st_mtime_ns == stamp, "an index that is up to date was written again"
    add_shard(cache, space.space_id, keys_of(2, 9), vectors_of(2, 9))
    stale = cache.space(space.space_id)
    assert stale.find(keys_of(2, 9)).tolist() == [7, 8]
    assert path.read_bytes() == written, "a reader wrote"
    for damaged in (b"garbage", written[:-9], written.replace(written[-8:], b"12345678")):
        path.write_bytes(damaged)
        assert cache.space(space.space_id).find(keys).tolist() == list(range(7))
    cache.save_index(space.space_id)
    assert KeyIndex.load(path, sorted(shard.name for shard in space.shard_folder.iterdir())) is not None


def test_a_shard_of_another_space_is_refused(cache: Cache) -> None:
    """A file copied into the wrong folder is named with both spaces."""
    space, _ = filled(cache, [3])
    other = cache.add_space(spec(role="prompt"), {})
    shutil.copy(next(space.shard_folder.iterdir()), cache.path / "spaces" / other / "shards")
    with pytest.raises(CacheError, match=f"belongs to the space {space.space_id}, not to {other}"):
        cache.space(other)


def test_spaces_are_named_by_their_spec(cache: Cache) -> None:
    """Adding a spec twice is one space and keeps what was said first; another spec is another space."""
    first = cache.add_space(spec(), {"model": "first"})
    assert cache.add_space(spec(), {"model": "second"}) == first
    assert cache.about(first) == {"model": "first"}
    second = cache.add_space(spec(dtype="bfloat16"), {})
    assert Cache(cache.path).space_ids == sorted([first, second])
    assert len(cache.space(first)) == 0
    assert cache.space(first).tensor().shape == (0, WIDTH)
    with pytest.raises(MismatchError, match=r"has no space 00; it has \w+, \w+"):
        cache.space("00")


def create_and_add(path: Path, number: int, gate: Any) -> None:
    """Create a cache and add a space to it as soon as all processes are there."""
    gate.wait()
    Cache.create(path).add_space(spec(width=number), {"model": f"model {number}"})


def test_a_cache_can_be_made_by_several_processes_at_once(tmp_path: Path) -> None:
    """Nobody is refused, and no one's space is lost."""
    for turn in range(3):
        gate = CONTEXT.Barrier(4, timeout=60)
        path = tmp_path / f"cache-{turn}"
        processes = [start(create_and_add, path, number, gate) for number in range(1, 5)]
        assert [finish(process) for process in processes] == [0] * 4
        assert len(Cache(path).space_ids) == 4


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".palcache.json.4711.tmp"]])
def test_a_folder_that_a_killed_writer_began_becomes_a_cache(tmp_path: Path, left: list[str]) -> None:
    """An empty folder will do, and so will what a kill in the middle of the creation leaves."""
    for name in left:
        (tmp_path / name).touch()
    Cache.create(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {MANIFEST, ".lock"}
    assert not list(tmp_path.glob(".*.tmp"))


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    """A folder with somebody's files, or a file, is refused without a trace."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="exists and is not a cache; name a new or empty folder with --cache"):
        Cache.create(tmp_path)
    with pytest.raises(InputError, match="exists and is not a cache"):
        Cache.create(tmp_path / "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match=r"There is no cache at .*; make one with palcache embed TABLE --cache"):
        Cache(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ('{"format": "palcache", "version": 2, "spaces": {}}', "format version 2; this palcache reads version 1"),
        ('{"format": "zarr"}', "is not the manifest of a palcache cache"),
        ("[]", "is not the manifest of a palcache cache"),
        ('{"format": "palcache", "version": 1}', "is damaged: it names no spaces"),
        ("{", "cannot be read as a palcache cache"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, manifest: str, message: str) -> None:
    """Another version is told apart from a damaged file."""
    (tmp_path / MANIFEST).write_text(manifest)
    for opens in (Cache, Cache.create):
        with pytest.raises(CacheError, match=message):
            opens(tmp_path)


def test_the_journal_has_a_line_for_each_shard(cache: Cache) -> None:
    """In the order of sealing, once each."""
    space, _ = filled(cache, [3, 4])
    lines = [json.loads(line) for line in (cache.path / "journal.jsonl").read_text().splitlines()]
    names = sorted(path.name for path in space.shard_folder.iterdir())
    assert lines == [
        {"rows": rows, "shard": name, "space": space.space_id} for rows, name in zip([3, 4], names, strict=True)
    ]
    cache.record(space.space_id, space.shard_folder / names[0], 3)
    assert len((cache.path / "journal.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("cut", [None, 0, 10, -1, -40, -150])
def test_a_journal_that_was_lost_or_cut_is_rebuilt(cache: Cache, cut: int | None) -> None:
    """The folders win; the rebuilt journal has the same bytes."""
    filled(cache, [3, 4])
    journal = cache.path / "journal.jsonl"
    before = journal.read_bytes()
    if cut is None:
        journal.unlink()
    else:
        os.truncate(journal, cut if cut >= 0 else len(before) + cut)
    Cache.create(cache.path)
    assert journal.read_bytes() == before


def test_a_journal_of_other_things_is_mended(cache: Cache) -> None:
    """Lines that are no entries, repeated ones and those of shards that are gone are left out."""
    space, _ = filled(cache, [3, 4])
    journal = cache.path / "journal.jsonl"
    first, second = journal.read_bytes().splitlines(keepends=True)
    gone = first.replace(b"000001-", b"000009-")
    journal.write_bytes(first + b"{}\n" + b"[]\nnull\n\xff\xfe\n" + first + gone + second + b'{"rows": 3')
    assert cache.missing_shards() == [(space.space_id, json.loads(gone)["shard"])]
    Cache.create(cache.path)
    assert journal.read_bytes() == first + second
    assert cache.missing_shards() == []


def test_tables_are_stored_by_name(cache: Cache) -> None:
    """One table needs no name; of several one is chosen by name."""
    table = small_table()
    with pytest.raises(InputError, match=r"has 0 comparison tables \(none\); choose one with --comparisons"):
        cache.comparisons()
    cache.put_comparisons(StoredComparisons("first", table, table.fingerprint(), (("p", "r"),), {"ties": "drop"}))
    stored = cache.comparisons()
    assert (stored.name, stored.spaces, stored.about) == ("first", (("p", "r"),), {"ties": "drop"})
    cache.put_comparisons(StoredComparisons("second", table, table.fingerprint(), (), {}))
    assert cache.comparison_names == ["first", "second"]
    with pytest.raises(InputError, match=r"has 2 comparison tables \(first, second\)"):
        cache.comparisons()
    with pytest.raises(InputError, match="has no comparison table third; it has first, second"):
        cache.comparisons("third")


def test_a_table_keeps_the_spaces_that_it_had(cache: Cache) -> None:
    """The same table joins its encoders; another one of its name, or a damaged one, is replaced."""
    table, other = small_table(), small_table(seed=1)
    cache.put_comparisons(StoredComparisons("t", table, table.fingerprint(), (("p2", "r2"),), {}))
    cache.put_comparisons(StoredComparisons("t", table, table.fingerprint(), (("p1", "r1"),), {}))
    assert cache.comparisons("t").spaces == (("p1", "r1"), ("p2", "r2"))
    cache.put_comparisons(StoredComparisons("t", other, other.fingerprint(), (("p3", "r3"),), {}))
    assert cache.comparisons("t").spaces == (("p3", "r3"),)
    (cache.path / "comparisons" / "t.h5").write_bytes(b"damaged")
    cache.put_comparisons(StoredComparisons("t", table, table.fingerprint(), (("p1", "r1"),), {}))
    assert cache.comparisons("t").spaces == (("p1", "r1"),)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "../up"])
def test_table_names_are_file_names(cache: Cache, name: str) -> None:
    """Anything else is refused before it reaches the disk."""
    table = small_table()
    with pytest.raises(InputError, match=r"Got the table name .*; expected a file name without a slash"):
        cache.put_comparisons(StoredComparisons(name, table, table.fingerprint(), (), {}))
    assert not (cache.path / "comparisons").exists()


def test_an_encoder_is_chosen_by_name_or_space(cache: Cache) -> None:
    """A table of several encoders needs a choice; the message lists them."""
    ids = {}
    for model, width in (("acme/a", 3), ("acme/b", 4)):
        ids[model] = tuple(
            cache.add_space(spec(role, width=width), {"model": model}) for role in ("prompt", "response")
        )
    table = small_table()
    pairs = tuple(sorted((first, second) for first, second in ids.values()))
    stored = StoredComparisons("t", table, table.fingerprint(), pairs, {})
    assert spaces_of(stored, "acme/b", cache) == ids["acme/b"]
    assert spaces_of(stored, ids["acme/a"][0][:10], cache) == ids["acme/a"]
    with pytest.raises(InputError, match=r"is embedded by 2 encoders \(.*acme/.* = \w{8}.*\) and no --space fits 2"):
        spaces_of(stored, None, cache)
    with pytest.raises(InputError, match="and --space acme/c fits 0 of them; choose one with --space"):
        spaces_of(stored, "acme/c", cache)


@pytest.fixture
def shared_folder() -> Iterator[Path]:
    """Yield a folder that any user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def read_without_rights(path: Path, keys: Keys, out: Any) -> None:
    """Read a cache as a user who may not write it."""
    if os.getuid() == 0:
        os.setuid(65_534)
    cache = Cache(path)
    space = cache.space(cache.space_ids[0])
    result: list[float | str] = [len(space), int(space.find(keys)[0]), float(space.rows(np.array([1])).sum())]
    try:
        Cache.create(path)
    except StorageError as error:
        result.append(str(error))
    out.put(result)


def test_a_cache_that_cannot_be_written_can_be_read(shared_folder: Path) -> None:
    """Readers need no right to write; writers are told in one sentence."""
    cache = Cache.create(shared_folder / "cache")
    _, vectors = filled(cache, [3, 4])
    for path in sorted(cache.path.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    cache.path.chmod(0o555)
    out = CONTEXT.Queue()
    process = start(read_without_rights, cache.path, keys_of(4, 1), out)
    rows, row, total, refusal = out.get(timeout=60)
    assert finish(process) == 0
    assert (rows, row) == (7, 3)
    assert total == pytest.approx(float(vectors[1].sum()), rel=1e-5)
    assert "cannot be written (Permission denied); choose a folder you may write" in refusal
