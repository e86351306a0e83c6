"""Safetensors files that hold JSON values beside their tensors; the same content gives the same bytes."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from palcache.errors import CacheError
from palcache.files import write_with
from palcache.fingerprints import canonical_json

METADATA: Final = "palcache"
"""The one entry of a file's metadata, a JSON text: safetensors writes several entries in random order."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Replace the file at `path` by tensors, and JSON values under one entry of its metadata."""
    ready = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = None if about is None else {METADATA: canonical_json(about).decode()}

    def save(temporary: Path) -> None:
        try:
            save_file(ready, temporary, metadata)
        except SafetensorError as error:  # names the system's error in words alone
            found = re.search(r"os error (\d+)", str(error))
            if found is None:
                raise
            raise OSError(int(found[1]), os.strerror(int(found[1])), str(temporary)) from error

    write_with(path, save)


def read_tensors(path: Path, what: str, remedy: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the JSON values (none where there are none) and the tensors of a file.

    Args:
        path: the file.
        what: what it should be, in messages.
        remedy: what to do where it is not.

    Raises:
        CacheError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be read as {what} ({error}); {remedy}.") from error
    try:
        about: dict[str, Any] = {**json.loads(metadata.get(METADATA, "{}"))}
    except (TypeError, ValueError) as error:
        raise CacheError(f"{path} is damaged: its content is not that of {what} ({error}); {remedy}.") from error
    return about, tensors


def require_format(path: Path, about: Mapping[str, Any], name: str, version: int) -> None:
    """Refuse a file of another format or version.

    Raises:
        CacheError: it is.
    """
    found = (about.get("format"), about.get("version"))
    if found != (name, version):
        raise CacheError(f"{path} is of format {found[0]} version {found[1]}; expected {name} {version}.")


def pack_texts(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return strings as UTF-8 bytes and offsets, (m + 1,): any string is a user id, dots and all."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()), torch.from_numpy(offsets)


def unpack_texts(data: torch.Tensor, offsets: torch.Tensor) -> tuple[str, ...]:
    """Return the strings that `pack_texts` packed."""
    content, at = data.numpy().tobytes(), offsets.tolist()
    return tuple(content[start:end].decode() for start, end in zip(at[:-1], at[1:], strict=True))
