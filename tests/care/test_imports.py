"""Vectors from elsewhere: what goes in comes out, and what cannot be right is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from palcache_cli.app import app
from safetensors.torch import save_file
from typer.testing import CliRunner

from palcache.cache import Cache
from palcache.care.imports import import_vectors
from palcache.care.vectors import NamedVectors, read_vectors
from palcache.care.verification import verify_cache
from palcache.comparisons import Comparisons
from palcache.configs import SplitConfig, StoredDtype
from palcache.errors import InputError, MismatchError, NumericsError
from palcache.tensors import load_preferences

WHOLE = SplitConfig(by="row", val=0.0, test=0.0)
WIDTH = 7
NAMES = [f"img-{number}" for number in range(9)]
Array = npt.NDArray[Any]


def vectors(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((len(NAMES), WIDTH)).astype(np.float32)


def write_npy(folder: Path, values: Array, names: list[str]) -> NamedVectors:
    np.save(folder / "v.npy", values)
    (folder / "ids.txt").write_text("\n".join(names) + "\n")
    return read_vectors(folder / "v.npy", ids=folder / "ids.txt")


def write_safetensors(folder: Path, values: Array, names: list[str]) -> NamedVectors:
    save_file({"image": torch.from_numpy(values.copy())}, folder / "v.safetensors")
    (folder / "ids.json").write_text(json.dumps(names))
    return read_vectors(folder / "v.safetensors", ids=folder / "ids.json")


def write_parquet(folder: Path, values: Array, names: list[str]) -> NamedVectors:
    pyarrow.parquet.write_table(pa.table({"id": names, "vector": values.tolist()}), folder / "v.parquet")
    return read_vectors(folder / "v.parquet")


def rows() -> list[dict[str, Any]]:
    return [
        {"user_id": "u", "prompt": NAMES[at % 2], "response_1": NAMES[2 + at], "response_2": NAMES[3 + at], "y": 1}
        for at in range(5)
    ]


def run(folder: Path, given: NamedVectors, **options: Any) -> Cache:
    import_vectors(
        Comparisons.from_rows(rows()), folder, prompts=given, responses=given, model="clip", split=WHOLE, **options
    )
    return Cache(folder)


@pytest.mark.parametrize("write", [write_npy, write_safetensors, write_parquet])
def test_what_goes_in_comes_out(write: Callable[[Path, Array, list[str]], NamedVectors], tmp_path: Path) -> None:
    values = vectors()
    cache = run(tmp_path / "c", write(tmp_path, values, NAMES), dtype="float32")
    assert verify_cache(cache).problems == ()
    data = load_preferences(cache, cache.comparisons(), device="cpu")
    batch = data.batch(torch.arange(len(data)))
    for at, row in enumerate(rows()):
        for side in ("prompt", "response_1", "response_2"):
            table = batch.prompts if side == "prompt" else batch.responses
            expected = values[NAMES.index(row[side])]
            assert np.array_equal(table[getattr(batch, side)[at]].numpy(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_importing_again_stores_nothing_and_other_vectors_are_refused(dtype: StoredDtype, tmp_path: Path) -> None:
    run(tmp_path / "c", write_npy(tmp_path, vectors(), NAMES), dtype=dtype)
    shards = sorted((tmp_path / "c").rglob("*.h5"))
    run(tmp_path / "c", write_npy(tmp_path, vectors(), NAMES), dtype=dtype)
    assert sorted((tmp_path / "c").rglob("*.h5")) == shards
    with pytest.raises(MismatchError, match=r"ids have another vector in .*'img-0'.*another --model"):
        run(tmp_path / "c", write_npy(tmp_path, vectors(1), NAMES), dtype=dtype)


def test_prompts_and_responses_may_stand_apart(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    asked = write_npy(tmp_path / "p", vectors(3)[:2], NAMES[:2])
    given = write_parquet(tmp_path, vectors()[2:], NAMES[2:])
    table = Comparisons.from_rows(rows())
    import_vectors(table, tmp_path / "c", prompts=asked, responses=given, model="clip", split=WHOLE)
    cache = Cache(tmp_path / "c")
    data = load_preferences(cache, cache.comparisons(), device="cpu")
    assert (len(data.prompts), len(data.responses)) == (2, 6)


def test_the_command_imports_id_columns(tmp_path: Path) -> None:
    write_npy(tmp_path, vectors(), NAMES)
    table = tmp_path / "t.jsonl"
    sides = ("prompt", "response_1", "response_2")
    lines = [{**{f"{side}_uid": row[side] for side in sides}, "user_id": "u", "y": 1} for row in rows()]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    maps = [part for side in sides for part in ("--map", f"{side}={side}_uid")]
    files = ["--vectors", str(tmp_path / "v.npy"), "--ids", str(tmp_path / "ids.txt")]
    options = ["--cache", str(tmp_path / "c"), "--model", "clip", "--split-by", "row", "--val", "0", "--test", "0"]
    result = CliRunner().invoke(app, ["import", str(table), *files, *options, *maps, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["encoded"] == 8


@pytest.mark.parametrize(
    ("values", "names", "match"),
    [
        (vectors()[:8], NAMES, r"holds 8 vectors and there are 9 ids"),
        (vectors()[:, 0], NAMES, r"an array of shape \(9,\); expected \(n, d\)"),
        (vectors(), [*NAMES[:8], "img-3"], r"the id 'img-3' stands in row 4 and in row 9"),
        (vectors(), [*NAMES[:8], ""], r"the id of row 9 is empty"),
        (np.where(np.arange(9)[:, None] == 4, np.nan, vectors()), NAMES, r"the vector 'img-4' in row 5 is not finite"),
        (np.array([["a"] * WIDTH] * 9), NAMES, r"holds <U1; expected numbers"),
    ],
)
def test_what_cannot_be_right_is_refused(values: Array, names: list[str], match: str, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", values)
    (tmp_path / "ids.json").write_text(json.dumps(names))
    with pytest.raises(InputError, match=match):
        read_vectors(tmp_path / "v.npy", ids=tmp_path / "ids.json")


def test_objects_in_npy_are_never_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.array([{"a": 1}], object), allow_pickle=True)
    (tmp_path / "ids.txt").write_text("a\n")
    with pytest.raises(InputError, match="cannot be read as vectors with ids"):
        read_vectors(tmp_path / "v.npy", ids=tmp_path / "ids.txt")


def test_files_are_named_when_they_are_wrong(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file .*v\.npy"):
        read_vectors(tmp_path / "v.npy")
    (tmp_path / "v.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"end in '\.bin'; expected \.npy, \.safetensors or \.parquet"):
        read_vectors(tmp_path / "v.bin")
    (tmp_path / "v.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="cannot be read as"):
        read_vectors(tmp_path / "v.safetensors")
    np.save(tmp_path / "v.npy", vectors())
    with pytest.raises(InputError, match=r"holds no ids; .* name the file with --ids"):
        read_vectors(tmp_path / "v.npy")
    save_file({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, tmp_path / "two.safetensors")
    (tmp_path / "ids.txt").write_text("x\ny\n")
    with pytest.raises(InputError, match="holds the tensors a, b; choose one with --tensor"):
        read_vectors(tmp_path / "two.safetensors", ids=tmp_path / "ids.txt")
    with pytest.raises(InputError, match="has no tensor c; it has a, b"):
        read_vectors(tmp_path / "two.safetensors", ids=tmp_path / "ids.txt", tensor="c")
    assert read_vectors(tmp_path / "two.safetensors", ids=tmp_path / "ids.txt", tensor="b").width == 3


def test_parquet_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    pyarrow.parquet.write_table(pa.table({"id": ["a", "b"], "vector": [[1.0, 2.0], [3.0]], "n": [1, 2]}), path)
    with pytest.raises(InputError, match="row 2: the vector has 1 values; expected 2"):
        read_vectors(path)
    with pytest.raises(InputError, match="the column n holds int64; expected lists of numbers"):
        read_vectors(path, vector_column="n")
    with pytest.raises(InputError, match="has no column uid; it has id, vector, n"):
        read_vectors(path, vector_column="uid")


def test_ids_without_a_vector_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    given = write_npy(tmp_path, vectors()[:6], NAMES[:6])
    with pytest.raises(InputError, match=r"2 of 6 ids in response_1 and response_2 have no vector .*'img-6'"):
        run(tmp_path / "c", given)
    assert not (tmp_path / "c").exists()


def test_widths_models_and_ranges_are_checked(tmp_path: Path) -> None:
    given = write_npy(tmp_path, vectors(), NAMES)
    (tmp_path / "n").mkdir()
    narrow = write_npy(tmp_path / "n", vectors()[:, :5], NAMES)
    table = Comparisons.from_rows(rows())
    with pytest.raises(InputError, match=r"have 5 values and those of responses .* 7; expected one width"):
        import_vectors(table, tmp_path / "c", prompts=narrow, responses=given, model="m", split=WHOLE)
    with pytest.raises(InputError, match="Got an empty model name"):
        import_vectors(table, tmp_path / "c", prompts=given, responses=given, model="", split=WHOLE)
    huge = write_npy(tmp_path, vectors() * 1e6, NAMES)
    with pytest.raises(NumericsError, match=r"beyond the range of float16.*store with --dtype bfloat16"):
        run(tmp_path / "c", huge)
