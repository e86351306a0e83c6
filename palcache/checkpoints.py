"""A trained head on disk: one safetensors file with its parameters, its shape and its users."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from palcache.errors import CacheError
from palcache.files import write_with
from palcache.fingerprints import canonical_json
from palcache.heads import PalB, Parameters

FORMAT: Final = "palcache-head"
VERSION: Final = "1"


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainedHead:
    """A head with its parameters and its users.

    Attributes:
        shape: what the parameters mean.
        parameters: tensors on one device, as `shape.initial` names them.
        users: ids of the users, in the order of the rows of `user.logits`.
        about: where it comes from, as JSON values (fingerprints of cache and table, spaces, seed).
        seen: how many of the users, from the first, were trained with it; None for all. The others were adapted later.
    """

    shape: PalB
    parameters: Parameters
    users: tuple[str, ...]
    about: Mapping[str, Any]
    seen: int | None = None

    @property
    def generic(self) -> torch.Tensor:
        """The population's own mixture, the mean of the seen users', (k,)."""
        return self.mixtures[: self.seen].mean(0)

    @property
    def mixtures(self) -> torch.Tensor:
        """Every user's mixture over the prototypes, (u, k)."""
        return self.shape.mixtures(self.parameters)

    def to(self, device: torch.device) -> TrainedHead:
        """Return the head on another device."""
        moved = {name: value.to(device) for name, value in self.parameters.items()}
        return replace(self, parameters=moved)

    def with_adapted(self, users: Sequence[str], logits: torch.Tensor) -> TrainedHead:
        """Return the head with more users, whose weights are (u, k); no other parameter changes."""
        own = self.parameters["user.logits"]
        parameters = {**self.parameters, "user.logits": torch.cat([own, logits.to(own)])}
        everyone = (*self.users, *users)
        shape = replace(self.shape, users=len(everyone))
        return TrainedHead(shape, parameters, everyone, self.about, len(self.users) if self.seen is None else self.seen)


def save_head(path: Path, head: TrainedHead) -> None:
    """Replace the file at `path` by a head; the same head gives the same bytes."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in head.parameters.items()}
    texts, offsets = pack_texts(head.users)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "shape": canonical_json({"head": "pal-b", **asdict(head.shape)}).decode(),
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
    shape = json.loads(metadata["shape"])
    shape.pop("head")
    users = unpack_texts(tensors.pop("user.id.bytes"), tensors.pop("user.id.offsets"))
    return TrainedHead(PalB(**shape), tensors, users, json.loads(metadata["about"]))


def pack_texts(texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return strings as UTF-8 bytes and offsets, (m + 1,): any string is a user id, dots and all."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    return torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy()), torch.from_numpy(offsets)


def unpack_texts(data: torch.Tensor, offsets: torch.Tensor) -> tuple[str, ...]:
    """Return the strings that `pack_texts` packed."""
    content, at = data.numpy().tobytes(), offsets.tolist()
    return tuple(content[start:end].decode() for start, end in zip(at[:-1], at[1:], strict=True))
