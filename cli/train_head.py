"""`palcache train-head`: cache -> run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palcache.configs import FitConfig, HeadConfig, read_config_file

from .display import Progress, describe, print_evaluations, print_json, progress, say
from .failures import reports_errors
from .options import CacheArgument, ComparisonsOption, DeviceOption, JsonOption, UnknownUsersOption

if TYPE_CHECKING:
    from palcache.training import FitProgress

_HEAD, _FIT = HeadConfig(), FitConfig()
RULES = {"user_blind": "user-blind (k = 1)", "longer": "longer response"}


@reports_errors
def train_head(
    cache: CacheArgument,
    *,
    run: Annotated[Path, typer.Option(help="The run folder to be made.", show_default=False)],
    comparisons: ComparisonsOption = None,
    space: Annotated[
        str | None,
        typer.Option(help="Which encoder, where a table has several: its name or space id.", show_default=False),
    ] = None,
    k: Annotated[
        int | None, typer.Option(help=f"Number of prototypes.  [default: {_HEAD.k}]", show_default=False)
    ] = None,
    p: Annotated[
        int | None, typer.Option(help=f"Width of the preference space.  [default: {_HEAD.p}]", show_default=False)
    ] = None,
    projector: Annotated[
        str | None,
        typer.Option(
            help=f"mlp{{L}}-{{relu|gelu|linear}}-dropout{{D}}[-residual][-nobias] or identity.  [default: {_HEAD.projector}]",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training comparisons.  [default: by table size]", show_default=False),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help=f"Comparisons per step.  [default: {_FIT.batch_size}]", show_default=False)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help=f"Peak learning rate of the projectors.  [default: {_FIT.lr}]", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help=f"Of initialisation and order.  [default: {_FIT.seed}]", show_default=False)
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file of options; the command line wins.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    unknown_users: UnknownUsersOption = "refuse",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    json_: JsonOption = False,
) -> None:
    """Train a PAL-B head on cached vectors; the encoder never runs."""
    from palcache.cache import Cache
    from palcache.runs import train_run

    stages: dict[str, dict[str, Any]] = {"head": {}, "fit": {}}
    if config is not None:
        stages = read_config_file(config, {"head": HeadConfig, "fit": FitConfig})
    origin = "options" if config is None else f"options and {config}"
    head = HeadConfig.from_mapping(stages["head"] | _given(k=k, p=p, projector=projector), origin=origin)
    fit = FitConfig.from_mapping(
        stages["fit"] | _given(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed), origin=origin
    )
    with progress("train") as bar:
        result = train_run(
            Cache(cache),
            run,
            comparisons=comparisons,
            space=space,
            head=head,
            config=fit,
            device=device,
            unknown_users=unknown_users,
            resume=resume,
            on_progress=_Reporter(bar),
        )
    if json_:
        print_json(result.to_dict())
        return
    names = {"head": f"PAL-B (k = {result.head.shape.k})", **RULES}
    for split, evaluations in result.evaluations.items():
        print_evaluations(describe(evaluations["head"], split), evaluations, names)
    fitted = result.fitted
    if fitted is None:
        say(f"{run} was complete; nothing was trained")
    else:
        early = "stopped early, " if fitted.stopped_early else ""
        say(
            f"{run}: trained in {result.seconds:.1f} s; {early}chose step {fitted.best_step} of {fitted.history[-1].step}"
        )


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


class _Reporter:
    """Turns progress of the training into a bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __call__(self, event: FitProgress) -> None:
        row = event.row
        rule = "" if event.rule == "head" else "yardstick k = 1: "
        text = (
            f"{rule}loss {row.train_loss:.4f}  val {row.val_loss:.4f}  val accuracy {row.val_accuracy:.4f}  "
            f"{event.comparisons_per_second:,.0f} comparisons/s"
        )
        self._bar.update(row.step, event.steps, text)
