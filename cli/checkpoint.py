"""`palcache checkpoint import|export`: the published implementation's checkpoints in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palcache.choices import Mixture, Score, UserForm

from .display import print_json, say
from .failures import reports_errors
from .options import JsonOption

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Read and write checkpoints of the published implementation.",
    no_args_is_help=True,
)


@app.command("import")
@reports_errors
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A .ckpt file.", show_default=False)],
    *,
    run: Annotated[Path, typer.Option(help="The run folder to be made.", show_default=False)],
    encoder_out: Annotated[
        Path | None,
        typer.Option(help="Make a transformers folder of the fine-tuned foundation model.", show_default=False),
    ] = None,
    encoder_config: Annotated[
        Path | None,
        typer.Option(
            help="Folder with that model's config.json and tokenizer.  [default: the one beside the checkpoint]",
            show_default=False,
        ),
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(help="The projector's name; its activation is not in the file.", show_default=False),
    ] = None,
    score: Annotated[Score | None, typer.Option(help="The head's score.", show_default=False)] = None,
    user_form: Annotated[UserForm | None, typer.Option(help="PAL-A's ideal point.", show_default=False)] = None,
    mixture: Annotated[Mixture | None, typer.Option(help="How weights become mixtures.", show_default=False)] = None,
    width: Annotated[
        int | None, typer.Option(help="Of the vectors, for pal-b with projector identity.", show_default=False)
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Make a run folder of a published checkpoint; nothing in it is unpickled but tensors and plain values."""
    from palcache.heads import head_to_dict, parameter_count
    from palcache.published.layout import PublishedOptions
    from palcache.runs.imported import import_checkpoint

    options = PublishedOptions(projector, score, user_form, mixture, width)
    found = import_checkpoint(checkpoint, run, options=options, encoder_out=encoder_out, encoder_config=encoder_config)
    head = found.head
    shape, learned = head_to_dict(head.shape), parameter_count(head.shape, head.parameters)
    if json_:
        print_json(
            {"run": str(run), "head": shape, "users": list(head.users), "parameters": learned,
             "encoder_tensors": len(found.encoder), "assumed_projector": found.assumed}
        )  # fmt: skip
        return
    if found.assumed is not None:
        say(f"the file does not hold the activation: {found.assumed} is assumed; --projector says otherwise")
    typer.echo(
        f"{run}: {shape['head']}, k = {head.shape.k}, d = {head.shape.d}, {len(head.users)} users, "
        f"{learned:,} learned parameters"
    )
    if encoder_out is not None:
        typer.echo(f"{encoder_out}: {len(found.encoder)} tensors of the foundation model")


@app.command()
@reports_errors
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    checkpoint: Annotated[Path, typer.Argument(help="The .ckpt file to be made.", show_default=False)],
    *,
    encoder: Annotated[Path | None, typer.Option(help="A transformers folder to go along.", show_default=False)] = None,
    json_: JsonOption = False,
) -> None:
    """Write a run's head in the published layout; dots in user ids become %2E there."""
    from palcache.runs.imported import export_checkpoint

    head = export_checkpoint(run, checkpoint, encoder=encoder)
    if json_:
        print_json({"checkpoint": str(checkpoint), "users": list(head.users)})
        return
    typer.echo(f"{checkpoint}: {len(head.users)} users, {checkpoint.stat().st_size / 1e6:.1f} MB")
