"""Safetensors files with JSON values beside their tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from palcache import tensor_files
from palcache.errors import CacheError, StorageError
from palcache.tensor_files import pack_texts, read_tensors, require_format, unpack_texts, write_tensors

SCRIPT = """
import sys, torch
from pathlib import Path
from palcache.tensor_files import write_tensors
about = {name: {"k": i, "p": 0.1} for i, name in enumerate("abcdefgh")}
write_tensors(Path(sys.argv[1]), {name: torch.arange(3.0) for name in "zyxw"}, about)
"""


def read(path: Path) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    return read_tensors(path, "a thing", "make it again")


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    """In other processes too, whose hashes are seeded anew."""
    paths = [tmp_path / name for name in ("first", "second")]
    for path in paths:
        subprocess.run([sys.executable, "-c", SCRIPT, str(path)], check=True)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(2, 3).T, "b": torch.tensor([1, 2])}
    write_tensors(tmp_path / "x", tensors, {"format": "f", "n": [1, None, 0.1]})
    about, found = read(tmp_path / "x")
    assert about == {"format": "f", "n": [1, None, 0.1]}
    assert {name: value.tolist() for name, value in found.items()} == {n: v.tolist() for n, v in tensors.items()}
    write_tensors(tmp_path / "x", tensors)
    assert read(tmp_path / "x")[0] == {}


def test_what_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Safetensors tells the system's error in words."""

    def fail(*_arguments: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")

    monkeypatch.setattr(tensor_files, "save_file", fail)
    with pytest.raises(StorageError, match="x"):
        write_tensors(tmp_path / "x", {"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"none cannot be read as a thing \(.*\); make it again"):
        read(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"\x80\x04not a tensor file")
    with pytest.raises(CacheError, match="bad cannot be read as a thing"):
        read(tmp_path / "bad")
    save_file({"a": torch.zeros(1)}, tmp_path / "list", {"palcache": "[1]"})
    with pytest.raises(CacheError, match=r"list is damaged: its content is not that of a thing .*; make it again"):
        read(tmp_path / "list")
    with pytest.raises(CacheError, match=r"x is of format None version 3; expected f 2"):
        require_format(tmp_path / "x", {"version": 3}, "f", 2)


@given(st.lists(st.text()))
def test_any_strings_are_packed(texts: list[str]) -> None:
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return
    assert unpack_texts(*pack_texts(texts)) == tuple(texts)
