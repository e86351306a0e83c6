"""`palcache evaluate`: a run's head and the yardsticks on a cached table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from palcache.choices import RULE_NAMES

from .display import describe, print_evaluations, print_json
from .failures import reports_errors
from .options import ComparisonsOption, DeviceOption, JsonOption, UnknownUsersOption
from .train_head import KINDS


@reports_errors
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.", show_default=False)],
    *,
    cache: Annotated[Path, typer.Option(help="The cache folder.", show_default=False)],
    comparisons: ComparisonsOption = None,
    split: Annotated[str, typer.Option(help="Which part of the table; all takes every row.")] = "test",
    device: DeviceOption = "auto",
    unknown_users: UnknownUsersOption = "refuse",
    json_: JsonOption = False,
) -> None:
    """Evaluate a head on comparisons: accuracy with intervals, calibration, and yardsticks beside it."""
    from palcache.cache import Cache
    from palcache.checkpoints import load_head
    from palcache.files import read_json
    from palcache.runs.folders import evaluations_to_dict
    from palcache.runs.trainings import evaluate_run_splits

    start = time.perf_counter()
    by_split = evaluate_run_splits(
        run,
        Cache(cache),
        comparisons=comparisons,
        split=None if split == "all" else split,
        device=device,
        unknown_users=unknown_users,
    )
    if json_:
        seconds = time.perf_counter() - start
        print_json({"run": str(run), "seconds": seconds, **evaluations_to_dict(by_split)})
        return
    kind = read_json(run / "config.json", "a run folder (config.json)")["head"].get("head", "pal-b")
    k = load_head(run / "head.safetensors").shape.k
    evaluations = by_split[split]
    names = {**RULE_NAMES, "head": f"{KINDS[kind]} (k = {k})"}
    head = evaluations["head"]
    print_evaluations(describe(head, split), evaluations, names)
    if head.temperature is not None:
        typer.echo(f"temperature fitted on validation: {head.temperature:.3f} (1 is calibrated)")
    for group, accuracy in head.groups.items():
        typer.echo(f"group {group}: {accuracy:.4f}")
