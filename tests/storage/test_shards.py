"""Shards: the bytes on the disk, what survives a stop, and what is found when a bit flips."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from palcache.configs import StoredDtype
from palcache.errors import CacheError, PalcacheError, StorageError
from palcache.storage.datasets import BLOCK_ROWS, POOLED, SUMMED, ShardHeader
from palcache.storage.layouts import create_shard
from palcache.storage.shards import FAILED, TRUNCATED, Shard, ShardWriter, shard_digest
from tests.stubs import contents, flip_bit

DTYPES: tuple[StoredDtype, ...] = ("float16", "bfloat16", "float32")
FILE_TYPES: dict[str, str] = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
N, D = 11, 5


def header(n: int = N, d: int = D, dtype: StoredDtype = "float16") -> ShardHeader:
    """Return what a shard is to say of itself."""
    return ShardHeader("ab" * 16, {"encoder": "stub", "pooling": ["mean", True]}, n, d, dtype, {"torch": "2"})


def rows_of(n: int, d: int, dtype: StoredDtype, seed: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Return arrays for a shard; the vectors have any bits, not-a-numbers included."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 256, (n, d * np.dtype(FILE_TYPES[dtype]).itemsize), np.uint8)
    return {
        "vectors": bits.view(FILE_TYPES[dtype]),
        "norms": random.random(n, np.float32),
        "keys": random.integers(0, 256, (n, 16), np.uint8),
        "n_tokens": random.integers(0, 2**32, n, np.uint32),
        "flags": random.choice(np.array([0, TRUNCATED], np.uint8), n),
    }


def begin(folder: Path, n: int = N, d: int = D, dtype: StoredDtype = "float16", seed: int = 0) -> ShardWriter:
    """Create an unsealed shard without vectors."""
    data = rows_of(n, d, dtype, seed)
    create_shard(folder / "000001.partial", header(n, d, dtype), data["keys"], data["n_tokens"], data["flags"])
    return ShardWriter(folder / "000001.partial")


def sealed(folder: Path, n: int = N, d: int = D, dtype: StoredDtype = "float16", seed: int = 0) -> Path:
    """Write and seal a shard; return its path."""
    writer, data = begin(folder, n, d, dtype, seed), rows_of(n, d, dtype, seed)
    writer.write(np.arange(n), data["vectors"], data["norms"])
    return writer.path.rename(folder / f"000001-{writer.seal()}.h5")


def datasets(path: Path) -> dict[str, Any]:
    """Return the place, type and layout of every dataset of an HDF5 file."""
    found: dict[str, Any] = {}

    def visit(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            plist = node.id.get_create_plist()
            found[name] = {
                "offset": node.id.get_offset(),
                "dtype": node.dtype,
                "shape": node.shape,
                "maxshape": node.maxshape,
                "layout": plist.get_layout(),
                "filters": plist.get_nfilters(),
                "nbytes": node.nbytes,
            }

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_is_contiguous_aligned_and_little_endian(tmp_path: Path, dtype: StoredDtype) -> None:
    """Every dataset lies in one piece at a multiple of 4,096 bytes, in the documented type and shape."""
    n, d = BLOCK_ROWS + 3, 7
    path = sealed(tmp_path, n, d, dtype)
    shapes = {
        POOLED: (FILE_TYPES[dtype], (n, d)),
        "norm": ("<f4", (n,)),
        "key": ("|u1", (n, 16)),
        "n_tokens": ("<u4", (n,)),
        "flags": ("|u1", (n,)),
        "done": ("|u1", (n,)),
        "sealed": ("|u1", (1,)),
        **{f"sum/{name.replace('/', '.')}": ("<u8", (2,)) for name in SUMMED},
    }
    if dtype != "float32":
        shapes |= {"cosine": ("<f4", (256,)), "sum/cosine": ("<u8", (1,))}
    found = datasets(path)
    assert {name: (place["dtype"].str, place["shape"]) for name, place in found.items()} == shapes
    for name, place in found.items():
        assert place["layout"] == h5py.h5d.CONTIGUOUS, name
        assert place["offset"] % 4_096 == 0, name
        assert place["maxshape"] == place["shape"], name
        assert place["filters"] == 0, name
        assert place["offset"] + place["nbytes"] <= path.stat().st_size, name


def test_attributes_say_what_the_shard_is(tmp_path: Path) -> None:
    """The file alone says its format, its encoder, its type and who wrote it."""
    path = sealed(tmp_path, dtype="bfloat16")
    with h5py.File(path, "r") as file:
        assert file.attrs["format"] == b"palcache-shard"
        assert (file.attrs["version"], file.attrs["rows"]) == (1, N)
        assert file[POOLED].attrs["logical_dtype"] == b"bfloat16"
        assert not any(file.attrs.get_id(name).dtype.kind == "O" for name in file.attrs), "a text of variable length"
    assert Shard(path).header == header(dtype="bfloat16")


def test_sums_and_name_are_the_documented_digests(tmp_path: Path) -> None:
    """Sums are xxh3-64 of each 4,096 rows; the name ends in xxh3-64 of the whole file."""
    path = sealed(tmp_path, BLOCK_ROWS + 10)
    with h5py.File(path, "r") as file:
        assert bytes(file["sealed"][:]) == b"\x01"
        assert bytes(file["done"][:]) == b"\x01" * (BLOCK_ROWS + 10)
        for name in SUMMED:
            expected = [xxhash.xxh3_64_intdigest(file[name][at : at + BLOCK_ROWS].tobytes()) for at in (0, BLOCK_ROWS)]
            assert file["sum/" + name.replace("/", ".")][:].tolist() == expected, name
    assert path.name == f"000001-{xxhash.xxh3_64_hexdigest(path.read_bytes())}.h5"
    assert shard_digest(path) == path.stem[-16:]


def test_same_rows_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    """Neither the time, nor the folder, nor the order of writing is in the file."""
    first = sealed(tmp_path)
    (tmp_path / "other").mkdir()
    writer, data = begin(tmp_path / "other"), rows_of(N, D, "float16")
    for rows in ([7], [3, 1], [0, 2, 4, 5, 6, 8, 9, 10], [1, 2]):
        writer.write(np.array(rows), data["vectors"][rows], data["norms"][rows])
    writer.seal()
    assert writer.path.read_bytes() == first.read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(DTYPES), st.integers(0, 2**16), st.integers(1, 5))
def test_what_is_written_is_read(tmp_path: Path, n: int, d: int, dtype: StoredDtype, seed: int, parts: int) -> None:
    """Every bit of every array comes back, in batches of any rows, with a new writer for each batch."""
    folder = tmp_path / f"{n}-{d}-{dtype}-{seed}-{parts}"
    folder.mkdir()
    data, order = rows_of(n, d, dtype, seed), np.random.default_rng(seed).permutation(n)
    begin(folder, n, d, dtype, seed)
    for rows in np.array_split(order, parts):
        writer = ShardWriter(folder / "000001.partial")
        writer.write(rows, data["vectors"][rows], data["norms"][rows])
    shard = Shard(writer.path.rename(folder / f"000001-{writer.seal()}.h5"))
    for name in ("vectors", "norms", "keys", "n_tokens", "flags"):
        assert getattr(shard, name).tobytes() == data[name].tobytes(), name
        assert getattr(shard, name).shape == data[name].shape, name
    assert shard.damage() == []
    shutil.rmtree(folder)


def test_bfloat16_is_stored_as_its_bits(tmp_path: Path) -> None:
    """The file's u2 are the bits that torch's bfloat16 has."""
    vectors = torch.tensor([[1.0, -2.5, 3e38], [0.1, 1e-30, 0.0]]).bfloat16()
    writer = begin(tmp_path, 2, 3, "bfloat16")
    writer.write(np.arange(2), vectors.view(torch.int16).numpy().view(np.uint16), np.ones(2, np.float32))
    writer.seal()
    read = torch.from_numpy(Shard(writer.path).vectors.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(read, vectors)


def test_rows_marked_done_survive_their_writer(tmp_path: Path) -> None:
    """Another writer finds the rows that are left, and the shard cannot be sealed or read before they are done."""
    writer, data = begin(tmp_path), rows_of(N, D, "float16")
    writer.write(np.array([4, 0, 9]), data["vectors"][[4, 0, 9]], data["norms"][[4, 0, 9]])
    del writer
    again = ShardWriter(tmp_path / "000001.partial")
    assert again.pending().tolist() == [1, 2, 3, 5, 6, 7, 8, 10]
    assert again.keys.tolist() == data["keys"].tolist()
    with pytest.raises(CacheError, match="8 of 11 rows are not done"):
        again.seal()
    with pytest.raises(CacheError, match=r"is not sealed.*run the same palcache embed again"):
        Shard(again.path)


@pytest.mark.parametrize("name", [POOLED, "norm"])
def test_rows_are_marked_done_last(tmp_path: Path, name: str) -> None:
    """A kill between the vectors and the mark leaves the rows pending; the other way round it would lose them."""

    class Dying:
        """An array to which nothing can be written any more."""

        dtype = np.dtype("<f2")

        def __setitem__(self, rows: Any, values: Any) -> None:
            raise KeyboardInterrupt("killed")

    writer, data = begin(tmp_path), rows_of(N, D, "float16")
    writer._arrays[name] = cast("npt.NDArray[Any]", Dying())
    with pytest.raises(KeyboardInterrupt, match="killed"):
        writer.write(np.arange(N), data["vectors"], data["norms"])
    assert writer.pending().tolist() == list(range(N))


def test_failed_rows_are_zero_and_can_be_retried(tmp_path: Path) -> None:
    """A row that failed has its flag beside the others and no vector, until it is written after all."""
    writer, data = begin(tmp_path), rows_of(N, D, "float16")
    for row in range(N):
        writer.fail(row)
    assert writer.all_failed()
    assert not len(writer.pending())
    writer.retry_failed()
    assert writer.pending().tolist() == list(range(N))
    assert not writer.all_failed()
    writer.write(np.arange(N), data["vectors"], data["norms"])
    writer.fail(6)
    writer.seal()
    shard = Shard(writer.path)
    assert shard.flags.tolist() == [flag | FAILED if row == 6 else flag for row, flag in enumerate(data["flags"])]
    assert not shard.vectors[6].any()
    assert shard.norms[6] == 0
    assert shard.vectors[5].tobytes() == data["vectors"][5].tobytes()


def test_vectors_of_another_type_are_refused(tmp_path: Path) -> None:
    """Nothing is converted in silence."""
    writer = begin(tmp_path, dtype="bfloat16")
    with pytest.raises(CacheError, match="got vectors of float32, expected uint16"):
        writer.write(np.arange(N), np.ones((N, D), np.float32), np.ones(N, np.float32))


def test_stray_writes_never_reach_the_disk(tmp_path: Path) -> None:
    """Readers map the file copy-on-write, so its bytes stay as they were."""
    path = sealed(tmp_path)
    before, shard = path.read_bytes(), Shard(path)
    shard.vectors[:] = 0
    shard.keys[3] = 1
    assert path.read_bytes() == before
    assert Shard(path).damage() == []


@pytest.mark.parametrize("successes", [0, 1])
def test_creation_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, successes: int) -> None:
    """A full disk while a shard is created is one sentence, and neither a half file nor a lost one is left."""
    writer, data = begin(tmp_path), rows_of(N, D, "float16")
    before, calls = contents(tmp_path), []

    def full(_descriptor: int, _offset: int, length: int) -> None:
        calls.append(length)
        if len(calls) > successes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match=r"The disk is full while writing .*000001.partial.*; free some space"):
        create_shard(writer.path, header(n=N + 1), data["keys"], data["n_tokens"], data["flags"])
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize(("row", "block"), [(1, (0, BLOCK_ROWS)), (BLOCK_ROWS + 4, (BLOCK_ROWS, BLOCK_ROWS + 6))])
def test_a_flipped_bit_in_a_dataset_is_found_and_placed(
    tmp_path: Path, name: str, row: int, block: tuple[int, int]
) -> None:
    """The damage names the dataset and its block of rows."""
    n = BLOCK_ROWS + 6
    path = sealed(tmp_path, n)
    place = datasets(path)[name]
    flip_bit(path, place["offset"] + place["nbytes"] // n * row)
    (damage,) = Shard(path).damage()
    assert (damage.path, damage.dataset, damage.rows) == (path, name, block)


@pytest.mark.parametrize("name", ["done", "sum/norm", "sum/emb.pooled"])
def test_a_flipped_bit_beside_the_rows_is_found(tmp_path: Path, name: str) -> None:
    """Marks and sums are covered by the digest in the file's name."""
    path = sealed(tmp_path)
    flip_bit(path, datasets(path)[name]["offset"])
    assert Shard(path).damage()


def finding(path: Path) -> str:
    """Return what a reader of a shard is told of its damage, empty for nothing."""
    try:
        return ", ".join(damage.dataset for damage in Shard(path).damage())
    except CacheError as error:
        return str(error)


@pytest.mark.timeout(120)
def test_flipped_bits_in_the_metadata_are_found(tmp_path: Path) -> None:
    """Whatever bit of HDF5's own bytes flips, the shard is refused or found damaged; nothing hangs or crashes."""
    path = sealed(tmp_path)
    inside = np.zeros(path.stat().st_size, bool)
    for place in datasets(path).values():
        inside[place["offset"] : place["offset"] + place["nbytes"]] = True
    content = np.frombuffer(path.read_bytes(), np.uint8)
    metadata = np.flatnonzero((content != 0) & ~inside)
    assert len(metadata) > 800
    random = np.random.default_rng(0)
    for offset in (*metadata[::3].tolist(), *random.integers(0, len(content), 100).tolist()):
        bit = int(random.integers(8))
        flip_bit(path, offset, bit)
        assert finding(path), offset
        flip_bit(path, offset, bit)
    assert Shard(path).damage() == []


@pytest.mark.parametrize("keep", [0, 1, 100, 5_000, -4_097, -1])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    """A file that lost its end cannot be opened, and the message says what to do."""
    path = sealed(tmp_path)
    size = path.stat().st_size
    os.truncate(path, keep if keep >= 0 else size + keep)
    with pytest.raises(CacheError, match="damaged or cut short: delete it and run the same palcache embed again"):
        Shard(path)


def test_strangers_are_refused(tmp_path: Path) -> None:
    """Other HDF5 files, other files and folders are told apart from damaged shards."""
    foreign = tmp_path / "foreign.h5"
    with h5py.File(foreign, "w") as file:
        file["emb/pooled"] = np.zeros((2, 3))
    with pytest.raises(CacheError, match=r"foreign.h5 is HDF5 but not a palcache shard"):
        Shard(foreign)
    (tmp_path / "text.h5").write_text("not HDF5 at all")
    with pytest.raises(CacheError, match=r"text.h5 cannot be read as a palcache shard"):
        Shard(tmp_path / "text.h5")
    with pytest.raises(StorageError, match=r"gone.h5 cannot be opened \(No such file or directory\)"):
        Shard(tmp_path / "gone.h5")
    with pytest.raises(StorageError, match=r"cannot be opened \(Is a directory\)"):
        Shard(tmp_path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    """A newer file is not called damaged: the message says to get a newer palcache."""
    path = sealed(tmp_path)
    with h5py.File(path, "r+") as file:
        file.attrs["version"] = 2
    with pytest.raises(CacheError, match="has format version 2; this palcache reads version 1: install a palcache"):
        Shard(path)


def _chunked(file: Any) -> None:
    del file["norm"]
    file.create_dataset("norm", data=np.zeros(N, "<f4"), chunks=(2,))


def _other_shape(file: Any) -> None:
    file.attrs["rows"] = N + 1


def _other_type(file: Any) -> None:
    file[POOLED].attrs["logical_dtype"] = np.bytes_("int4")


def _big_endian(file: Any) -> None:
    del file["n_tokens"]
    file["n_tokens"] = np.zeros(N, ">u4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_chunked, r"the dataset norm is not contiguous; delete it"),
        (_other_shape, r"got <f2 \(11, 5\) for the dataset emb/pooled, expected <f2 \(12, 5\); delete it"),
        (_other_type, r"got vectors of 'int4', expected one of float32, float16, bfloat16, int8; delete it"),
        (_big_endian, r"got >u4 \(11,\) for the dataset n_tokens, expected <u4 \(11,\)"),
        (lambda file: file.pop("flags"), r"cannot be read as a palcache shard .*flags"),
    ],
)
def test_a_layout_that_cannot_be_mapped_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    """What the memory map relies on is checked when a shard is opened."""
    path = sealed(tmp_path)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(PalcacheError, match=message):
        Shard(path)
