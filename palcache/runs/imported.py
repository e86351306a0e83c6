"""Runs that were trained elsewhere: published checkpoints as run folders, and run folders as published checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from palcache.checkpoints import TrainedHead, load_head, save_head
from palcache.errors import InputError
from palcache.files import read_json, storage_errors, write_json
from palcache.heads import head_to_dict
from palcache.published.files import read_encoder, read_published, write_encoder, write_published
from palcache.published.layout import PublishedCheckpoint, PublishedOptions
from palcache.runs.folders import FORMAT, VERSION


def import_checkpoint(
    checkpoint: Path,
    run: Path,
    *,
    options: PublishedOptions | None = None,
    encoder_out: Path | None = None,
    encoder_config: Path | None = None,
) -> PublishedCheckpoint:
    """Make a run folder of a published checkpoint, and on request a transformers folder of its foundation model.

    The run holds the head with its users; `palcache evaluate` takes it with any cache of vectors of the head's width.

    Args:
        checkpoint: a `.ckpt` file of the published code.
        run: the run folder to be made.
        options: what the file does not hold.
        encoder_out: the transformers folder to be made.
        encoder_config: a folder with the foundation model's `config.json` and tokenizer; None takes the one beside the
            checkpoint.

    Raises:
        InputError: a folder exists, the checkpoint is of another layout or needs pickle, or there is no `config.json`.
    """
    for folder, option in ((run, "--run"), (encoder_out, "--encoder-out")):
        if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} exists; name a new folder with {option}.")
    if encoder_out is not None and encoder_config is None:
        encoder_config = _config_beside(checkpoint)
    found = read_published(checkpoint, options)
    about = {"imported": {"checkpoint": checkpoint.name}}
    head = TrainedHead(found.head.shape, found.head.parameters, found.head.users, about)
    if encoder_out is not None and encoder_config is not None:
        write_encoder(encoder_out, found.encoder, encoder_config)
    with storage_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    save_head(run / "head.safetensors", head)
    write_json(run / "config.json", {"format": FORMAT, "version": VERSION, "head": head_to_dict(head.shape), **about})
    return replace(found, head=head)


def _config_beside(checkpoint: Path) -> Path:
    """Return the one folder with a model's `config.json`: the checkpoint's own, or one in it."""
    beside = checkpoint.parent
    found = [folder for folder in (beside, *sorted(beside.glob("*/"))) if (folder / "config.json").is_file()]
    models = [
        folder for folder in found if "model_type" in read_json(folder / "config.json", "a model's configuration")
    ]
    if len(models) != 1:
        raise InputError(
            f"A transformers folder needs the model's config.json, and {len(models)} folders beside {checkpoint} have one; "
            "name the right one with --encoder-config."
        )
    return models[0]


def export_checkpoint(run: Path, checkpoint: Path, *, encoder: Path | None = None) -> TrainedHead:
    """Write a run's head in the published layout, with the foundation model of a transformers folder where one is given.

    Args:
        run: a run folder.
        checkpoint: the `.ckpt` file to be made.
        encoder: a transformers folder.

    Raises:
        InputError: the file exists, or the head has no place in the published layout.
        CacheError: the run or the folder cannot be read.
    """
    if checkpoint.exists():
        raise InputError(f"{checkpoint} exists; name a new file.")
    head = load_head(run / "head.safetensors")
    write_published(checkpoint, head, read_encoder(encoder) if encoder is not None else None)
    return head
