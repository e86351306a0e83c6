"""A trained head on disk: one safetensors file with its parameters, its shape and its users."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from palcache.errors import CacheError
from palcache.files import write_with
from palcache.fingerprints import canonical_json
from palcache.heads import Head, Parameters, head_from_dict, head_to_dict

FORMAT: Final = "palcache-head"
VERSION: Final = "1"


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainedHead:
    """A head with its parameters and its users.

    Attributes:
        shape: what the parameters mean.
        parameters: tensors on one device, as `shape.initial` names them.
        users: ids of the users, in the order of the rows of `shape.mixtures`.
        about: where it comes from, as JSON values (fingerprints of cache and table, spaces, seed).
    """

    shape: Head
    parameters: Parameters
    users: tuple[str, ...]
    about: Mapping[str, Any]

    @property
    def mixtures(self) -> torch.Tensor:
        """Every user's mixture over the prototypes, (u, k), or weights of a yardstick."""
        return self.shape.mixtures(self.parameters)

    def to(self, device: torch.device) -> TrainedHead:
        """Return the head on another device."""
        moved = {name: value.to(device) for name, value in self.parameters.items()}
        return TrainedHead(self.shape, moved, self.users, self.about)


def save_head(path: Path, head: TrainedHead) -> None:
    """Replace the file at `path` by a head; the same head gives the same bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.parameters.items()}
    texts, offsets = _pack(head.users)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "shape": canonical_json(head_to_dict(head.shape)).decode(),
        "about": canonical_json(head.about).decode(),
    }
    tensors |= {"user.id.bytes": texts, "user.id.offsets": offsets}
    write_with(path, lambda temporary: save_file(tensors, temporary, metadata))


def load_head(path: Path) -> TrainedHead:
    """Read a head that `save_head` wrote.

    Raises:
        CacheError: the file is missing, damaged, or of another format or version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"{path} cannot be read as a head ({error}); train it again with palcache train-head."
        ) from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise CacheError(
            f"{path} is of format {metadata.get('format')} version {metadata.get('version')}; expected {FORMAT} {VERSION}."
        )
    shape = head_from_dict(json.loads(metadata["shape"]))
    users = _unpack(tensors.pop("user.id.bytes"), tensors.pop("user.id.offsets"))
    return TrainedHead(shape, tensors, users, json.loads(metadata["about"]))


def _pack(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return strings as UTF-8 bytes and offsets, (m + 1,): any string is a user id, dots and all."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()), torch.from_numpy(offsets)


def _unpack(data: torch.Tensor, offsets: torch.Tensor) -> tuple[str, ...]:
    content, at = data.numpy().tobytes(), offsets.tolist()
    return tuple(content[start:end].decode() for start, end in zip(at[:-1], at[1:], strict=True))
