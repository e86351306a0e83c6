"""`palcache train-head`: cache -> run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palcache.choices import (
    PROJECTOR_GRAMMAR,
    RULE_NAMES,
    HeadKind,
    Loss,
    Mixture,
    Optimizer,
    Precision,
    PromptAlignment,
    Schedule,
    Score,
    Start,
    TokenWeighting,
    UserForm,
    UserWeights,
    Weighting,
)
from palcache.configs import FitConfig, HeadConfig, read_config_file

from .display import Progress, describe, print_evaluations, print_json, progress, say
from .failures import reports_errors
from .options import CacheArgument, ComparisonsOption, DeviceOption, JsonOption, LogOption, UnknownUsersOption

if TYPE_CHECKING:
    from palcache.event_logs import EventLog
    from palcache.runs.trainings import RunResult
    from palcache.training import FitProgress

_HEAD, _FIT = HeadConfig(), FitConfig()
KINDS: dict[str, str] = {
    "pal-b": "PAL-B",
    "pal-a": "PAL-A",
    "bradley-terry": "Bradley-Terry",
    "low-rank": "low-rank rewards",
    "pca": "principal directions",
    "per-user": "a regression per user",
}


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
        typer.Option(help=f"{PROJECTOR_GRAMMAR}.  [default: {_HEAD.projector}]", show_default=False),
    ] = None,
    head: Annotated[
        HeadKind | None,
        typer.Option(help=f"Kind of the head, yardsticks included.  [default: {_HEAD.head}]", show_default=False),
    ] = None,
    score: Annotated[
        Score | None,
        typer.Option(help="Reward of an item.  [default: angle; of pal-a: dist]", show_default=False),
    ] = None,
    user_form: Annotated[
        UserForm | None,
        typer.Option(help=f"Ideal point of pal-a.  [default: {_HEAD.user_form}]", show_default=False),
    ] = None,
    mixture: Annotated[
        Mixture | None,
        typer.Option(help=f"How user weights become mixtures.  [default: {_HEAD.mixture}]", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help=f"Of the mixtures.  [default: {_HEAD.temperature}]", show_default=False)
    ] = None,
    user_weights: Annotated[
        UserWeights | None,
        typer.Option(help=f"Weights of low-rank.  [default: {_HEAD.user_weights}]", show_default=False),
    ] = None,
    start: Annotated[
        Start | None, typer.Option(help=f"How parameters are drawn.  [default: {_HEAD.start}]", show_default=False)
    ] = None,
    loss: Annotated[
        Loss | None, typer.Option(help="Loss of the margins.  [default: by score]", show_default=False)
    ] = None,
    weighting: Annotated[
        Weighting | None,
        typer.Option(help=f"What counts the same in the loss.  [default: {_FIT.weighting}]", show_default=False),
    ] = None,
    token_weighting: Annotated[
        TokenWeighting | None,
        typer.Option(help="Loss at every token, weighted so; needs token vectors.", show_default=False),
    ] = None,
    prompt_alignment: Annotated[
        PromptAlignment | None,
        typer.Option(help=f"Of token losses of pal-b.  [default: {_FIT.prompt_alignment}]", show_default=False),
    ] = None,
    bound_weight: Annotated[
        float | None,
        typer.Option(help=f"Weight of norms of ideal points beyond {_FIT.bound}.  [default: 0]", show_default=False),
    ] = None,
    optimizer: Annotated[
        Optimizer | None, typer.Option(help=f"[default: {_FIT.optimizer}]", show_default=False)
    ] = None,
    schedule: Annotated[
        Schedule | None,
        typer.Option(help=f"Of the learning rates.  [default: {_FIT.schedule}]", show_default=False),
    ] = None,
    warmup: Annotated[
        float | None,
        typer.Option(help=f"Share of the steps with rising rates.  [default: {_FIT.warmup}]", show_default=False),
    ] = None,
    precision: Annotated[
        Precision | None,
        typer.Option(help=f"Of the forward pass.  [default: {_FIT.precision}]", show_default=False),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A published configuration, see palcache presets; other options win.", show_default=False),
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
    log: LogOption = None,
    json_: JsonOption = False,
) -> None:
    """Train a head on cached vectors; the encoder never runs."""
    from palcache.cache import Cache
    from palcache.event_logs import finish_logs, open_logs
    from palcache.runs.trainings import train_run

    shape = _given(k=k, p=p, projector=projector, head=head, score=score, user_form=user_form, mixture=mixture,
                   temperature=temperature, user_weights=user_weights, start=start)  # fmt: skip
    steps = _given(epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, loss=loss, weighting=weighting,
                   token_weighting=token_weighting, prompt_alignment=prompt_alignment, bound_weight=bound_weight,
                   optimizer=optimizer, schedule=schedule, warmup=warmup, precision=precision)  # fmt: skip
    head_config, fit = _configs(preset, config, shape, steps)
    logs = open_logs(log or [], run)
    with progress("train") as bar:
        result = train_run(
            Cache(cache), run, comparisons=comparisons, space=space, head=head_config, config=fit, device=device,
            unknown_users=unknown_users, resume=resume, on_progress=_Reporter(bar, logs),
        )  # fmt: skip
    finish_logs(logs, result)
    if json_:
        print_json(result.to_dict())
    else:
        _print_result(result, run, KINDS[head_config.head])


def _configs(
    preset: str | None, config: Path | None, shape: dict[str, Any], steps: dict[str, Any]
) -> tuple[HeadConfig, FitConfig]:
    """Return the shape of the head and how it is trained: a preset, over it a file, over both the command line."""
    if preset is None and config is None:
        return HeadConfig.from_options(**shape), FitConfig.from_options(**steps)
    stages = _stages(preset, config)
    origins = ("options", f"the preset {preset}" if preset else None, str(config) if config else None)
    origin = " and ".join(name for name in origins if name)
    return (
        HeadConfig.from_mapping(stages["head"] | shape, origin=origin),
        FitConfig.from_mapping(stages["fit"] | steps, origin=origin),
    )


def _stages(preset: str | None, config: Path | None) -> dict[str, dict[str, Any]]:
    """Return the options of a preset and of a file, of which the file's win."""
    stages: dict[str, dict[str, Any]] = {"head": {}, "fit": {}}
    if preset is not None:
        from palcache.presets import load_preset

        found = load_preset(preset)
        stages = {"head": dict(found.head), "fit": dict(found.fit)}
    if config is not None:
        for stage, values in read_config_file(config, {"head": HeadConfig, "fit": FitConfig}).items():
            stages[stage] |= values
    return stages


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _print_result(result: RunResult, run: Path, kind: str) -> None:
    names = {**RULE_NAMES, "head": f"{kind} (k = {result.head.shape.k})"}
    for split, evaluations in result.evaluations.items():
        print_evaluations(describe(evaluations["head"], split), evaluations, names)
    fitted = result.fitted
    if fitted is None:
        say(f"{run} was complete; nothing was trained")
        return
    early = "stopped early, " if fitted.stopped_early else ""
    steps = f"{early}chose step {fitted.best_step} of {fitted.history[-1].step}"
    say(f"{run}: the head trained in {result.seconds:.1f} s; {steps}")


class _Reporter:
    """Turns progress of the training into a bar, and hands it to logs."""

    def __init__(self, bar: Progress, logs: Sequence[EventLog]) -> None:
        self._bar, self._logs = bar, logs

    def __call__(self, event: FitProgress) -> None:
        for log in self._logs:
            log(event)
        row = event.row
        rule = "" if event.rule == "head" else "yardstick k = 1: "
        text = (
            f"{rule}loss {row.train_loss:.4f}  val {row.val_loss:.4f}  val accuracy {row.val_accuracy:.4f}  "
            f"{event.comparisons_per_second:,.0f} comparisons/s"
        )
        self._bar.update(row.step, event.steps, text)
