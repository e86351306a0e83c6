"""Published checkpoints as files: Lightning `.ckpt`, read without unpickling anything, and transformers folders beside them."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Final

import torch
from safetensors.torch import load_file, save_file

from palcache.checkpoints import TrainedHead
from palcache.errors import CacheError, InputError
from palcache.files import storage_errors, write_with
from palcache.heads import head_to_dict
from palcache.published.layout import PublishedCheckpoint, PublishedOptions, from_state, to_state

_TOKENIZER: Final = ("*.json", "*.txt", "*.model")


def read_published(path: Path, options: PublishedOptions | None = None) -> PublishedCheckpoint:
    """Read a published checkpoint; nothing in it is unpickled but tensors and plain values.

    Args:
        path: a `.ckpt` file.
        options: what the file does not hold.

    Raises:
        InputError: the file would need pickle, or is of another layout (the message names keys).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"There is no checkpoint {path}; name a .ckpt file of the published code.") from error
    except UnpicklingError as error:
        if not _is_torch_file(path):
            raise InputError(
                f"{path} is no file that torch.save wrote; name a .ckpt file of the published code."
            ) from error
        raise InputError(
            f"{path} holds more than tensors and plain values, so reading it would run code that it brings; save its "
            'state dict alone where you trust it: torch.save({"state_dict": model.state_dict()}, path).'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}).") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(
            f"{path} holds no state dict of tensors; expected a Lightning checkpoint of the published code."
        )
    about = content.get("palcache")
    return from_state(state, options, origin=str(path), about=about if isinstance(about, dict) else None)


def _is_torch_file(path: Path) -> bool:
    with path.open("rb") as file:
        return zipfile.is_zipfile(path) or file.read(1) == b"\x80"


def write_published(path: Path, head: TrainedHead, encoder: Mapping[str, torch.Tensor] | None = None) -> None:
    """Replace `path` by a head in the published layout, with the whole shape and the users' own ids noted beside it.

    Raises:
        InputError: the head has no place in the published layout.
    """
    content = {
        "state_dict": to_state(head, encoder),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.0.0",
        "palcache": {"shape": head_to_dict(head.shape), "users": list(head.users)},
    }
    write_with(path, lambda temporary: torch.save(content, temporary))


def write_encoder(folder: Path, encoder: Mapping[str, torch.Tensor], config: Path) -> None:
    """Make a transformers folder of a checkpoint's foundation model.

    Args:
        folder: to be made.
        encoder: its weights.
        config: a folder with the model's `config.json`, and its tokenizer's files where they are to be kept.

    Raises:
        InputError: the checkpoint has no foundation model, or the folder has no `config.json`.
    """
    if not encoder:
        raise InputError("The checkpoint holds no foundation model; leave out --encoder-out.")
    if not (config / "config.json").is_file():
        raise InputError(f"{config} has no config.json; name the folder of the model that was fine-tuned.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _TOKENIZER:
            for file in sorted(config.glob(pattern)):
                if not file.name.endswith(".index.json"):  # of weights in several files, which are not taken along
                    shutil.copyfile(file, folder / file.name)
    weights = {name: value.contiguous().clone() for name, value in encoder.items()}
    write_with(folder / "model.safetensors", lambda temporary: save_file(weights, temporary, {"format": "pt"}))


def read_encoder(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a transformers folder by name.

    Raises:
        CacheError: it has no `model.safetensors`.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CacheError(f"{folder} has no model.safetensors; export takes a folder that checkpoint import made.")
    return load_file(path)
