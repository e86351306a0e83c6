"""`palcache adapt`: new users on a run, and their learning curve."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from palcache.errors import InputError

from .display import describe_interval, print_json, print_table, progress, say
from .failures import reports_errors
from .options import DeviceOption, JsonOption, RunArgument, SpacesCacheOption

if TYPE_CHECKING:
    from palcache.runs.adapted import AdaptedRun

COLUMNS = (
    "n",
    "users",
    "left out",
    "accuracy",
    "95 % interval",
    "macro",
    "gain over n = 0",
    "log-loss",
    "Brier",
    "ECE",
)
_SHOTS = "0,1,2,5,10,20,50,100"


@reports_errors
def adapt(
    run: RunArgument,
    *,
    cache: SpacesCacheOption,
    comparisons: Annotated[
        str, typer.Option(help="The new users' table: its name in the cache, or a file.", show_default=False)
    ],
    method: Annotated[
        Literal["map", "published", "likelihood", "generic"],
        typer.Option(help="map: prior of the seen users; published: the paper's recipe; likelihood: no gradient."),
    ] = "map",
    shots: Annotated[str, typer.Option(help="Numbers of support comparisons per user.")] = _SHOTS,
    draws: Annotated[int, typer.Option(help="Draws of the support; the query is the same for all.")] = 5,
    seed: Annotated[int, typer.Option(help="Of query, draws and bootstrap.")] = 0,
    seen_users: Annotated[
        Literal["refuse", "drop"], typer.Option(help="Users of the table whom the head was trained on.")
    ] = "refuse",
    save_users: Annotated[
        bool, typer.Option("--save-users", help="Add the users to the run; the head's file stays as it is.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of CSV, JSON and picture.  [default: adaptation in the run]", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Adapt a frozen head to new users from few comparisons each, and show the learning curve."""
    from palcache.cache import Cache
    from palcache.runs.adapted import adapt_run

    wanted = _numbers(shots)
    with progress("adapt") as bar:
        result = adapt_run(
            run,
            Cache(cache),
            comparisons,
            method=method,
            shots=wanted,
            draws=draws,
            seed=seed,
            seen_users=seen_users,
            keep_users=save_users,
            out=out,
            device=device,
            on_progress=lambda done, total: bar.update(done, total, f"{done} of {total} points"),
        )
    if json_:
        print_json(result.to_dict())
    else:
        _show(result)
    _tell(result, wanted)


def _numbers(shots: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in shots.split(","))
    except ValueError as error:
        raise InputError(f"Got --shots {shots!r}; expected whole numbers with commas, for example {_SHOTS}.") from error


def _show(result: AdaptedRun) -> None:
    rows = []
    for point in result.points:
        e = point.evaluation
        micro, gain = e.accuracy["micro"], point.gain
        rows.append(
            [str(point.shots), f"{e.users:,}", f"{point.left_out:,}", f"{micro.value:.4f}",
             describe_interval(micro), f"{e.accuracy['macro'].value:.4f}",
             f"{gain.value:+.4f}" + (f" ({gain.low:+.3f} to {gain.high:+.3f})" if math.isfinite(gain.low) else ""),
             *(f"{value:.4f}" for value in (e.log_loss, e.brier, e.calibration_error) if value is not None)]
        )  # fmt: skip
    ties = result.points[0].evaluation.ties if result.points else 0
    policy = f"{ties} ties counting one half" if ties else "no ties"
    print_table(
        f"{result.table}: {result.users:,} new users, method {result.method}, {result.draws} draws, {policy}; "
        "intervals resample users",
        COLUMNS,
        rows,
    )
    beside = {"seen users, on their own test": result.seen, **{
        {"user_blind": "user-blind (k = 1), new users", "longer": "longer response, new users"}[name]: evaluation
        for name, evaluation in result.yardsticks.items()
    }}  # fmt: skip
    print_table(
        "beside it",
        ("", "users", "accuracy", "95 % interval", "macro"),
        [
            [name, f"{e.users:,}", f"{e.accuracy['micro'].value:.4f}",
             describe_interval(e.accuracy["micro"]), f"{e.accuracy['macro'].value:.4f}"]
            for name, e in beside.items()
        ],
    )  # fmt: skip
    _show_groups(result)


def _show_groups(result: AdaptedRun) -> None:
    names = list(result.points[0].evaluation.groups) if result.points else []
    if not names:
        return
    sides = result.points[0].majority is not None
    rows = [
        [
            str(point.shots),
            *(f"{point.evaluation.groups[name]:.4f}" if name in point.evaluation.groups else "-" for name in names),
            *(
                ["-" if value is None else f"{value:.4f}" for value in (point.majority, point.minority)]
                if sides
                else []
            ),
        ]
        for point in result.points
    ]
    print_table("accuracy by group", ("n", *names, *(("majority", "minority") if sides else ())), rows)


def _tell(result: AdaptedRun, wanted: tuple[int, ...]) -> None:
    for point in result.points:
        if point.left_out:
            say(
                f"n = {point.shots}: {point.left_out:,} of {result.users:,} users have fewer support comparisons; left out"
            )
    missing = sorted(set(wanted) - {point.shots for point in result.points})
    if missing:
        say(f"n = {', '.join(map(str, missing))}: no user has as many support comparisons")
    if result.contradicting:
        say(
            f"{result.contradicting:,} users preferred both responses of one pair at different times; both answers count, "
            "and palcache lint shows them"
        )
    if result.saved:
        say(f"{result.saved:,} users were added to {result.path}; see palcache users {result.path}")
    say(f"wrote {', '.join(map(str, result.files))} in {result.seconds:.1f} s")
