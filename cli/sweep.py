"""`palcache sweep`: many heads on one table at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palcache.errors import InputError

from .display import Progress, print_json, print_table, progress, say
from .failures import reports_errors
from .options import CacheArgument, ComparisonsOption, DeviceOption, JsonOption, LogOption, UnknownUsersOption

if TYPE_CHECKING:
    from palcache.sweeps.adapted import AdaptedSweep
    from palcache.sweeps.grids import Grid
    from palcache.sweeps.sweeps import SweepHead, SweepProgress, SweepResult


@reports_errors
def sweep(
    cache: CacheArgument,
    *,
    sweep: Annotated[Path, typer.Option(help="The folder of the sweep; an earlier one goes on.", show_default=False)],
    grid: Annotated[
        str | None,
        typer.Option(help="Options and values, e.g. 'k=1,2 lr=1e-3,3e-4 seed=0:5'.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A TOML file: fixed, grid, zip, random, new_users, preset; --grid wins.", show_default=False),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A published experiment: pal-groups, pal-few-shot.", show_default=False)
    ] = None,
    comparisons: ComparisonsOption = None,
    space: Annotated[
        str | None,
        typer.Option(help="Which encoder, where a table has several: its name or space id.", show_default=False),
    ] = None,
    new_comparisons: Annotated[
        str | None,
        typer.Option(help="A table or file of new users: their curve on every head.", show_default=False),
    ] = None,
    device: DeviceOption = "auto",
    jobs: Annotated[
        int | None,
        typer.Option(help="Groups of heads side by side.  [default: one a device or CPU thread]", show_default=False),
    ] = None,
    unknown_users: UnknownUsersOption = "refuse",
    log: LogOption = None,
    json_: JsonOption = False,
) -> None:
    """Train many heads at once on cached vectors: every combination of a grid, resumable, with one table of results."""
    from palcache.cache import Cache
    from palcache.devices import keep_freed_memory, parse_devices
    from palcache.event_logs import log_run, open_logs
    from palcache.sweeps.adapted import DRAWS, adapt_sweep
    from palcache.sweeps.sweeps import run_sweep
    from palcache.users.curves import SHOTS

    asked, opened, kinds = _grid(grid, config, recipe), Cache(cache), log or []
    open_logs(kinds, sweep)  # an unknown kind, or a package that is missing, is said before anything is trained
    keep_freed_memory()
    with progress("sweep") as bar:
        result = run_sweep(
            opened,
            sweep,
            asked,
            comparisons=comparisons,
            space=space,
            device=device,
            jobs=jobs,
            unknown_users=unknown_users,
            on_head=lambda head: log_run(kinds, head.run) if head.run else None,
            on_progress=_Reporter(bar),
        )
    adapted = None
    if new_comparisons is not None:
        shots, draws = asked.new_users.get("shots", SHOTS), asked.new_users.get("draws", DRAWS)
        with progress("new users") as bar:
            adapted = adapt_sweep(
                result,
                opened,
                new_comparisons,
                shots=shots,
                draws=draws,
                device=parse_devices(device, option="--device")[0],
                on_progress=lambda done, heads: bar.update(done, heads, f"{done} of {heads} heads"),
            )
    if json_:
        print_json({**result.to_dict(), **({"new_users": adapted.to_dict()} if adapted else {})})
    else:
        _print_heads(result)
        _print_curve(adapted)
        if adapted is None and asked.new_users:
            say("the curve of new users needs --new-comparisons; run the same command with it")
    for head in result.failed:
        say(f"Error: {head.name}: {head.error}")
    if result.failed:
        raise typer.Exit(1)


def _grid(text: str | None, config: Path | None, recipe: str | None) -> Grid:
    """Return the grid of a recipe or a file, with the command line's values over it."""
    from palcache.recipes import load_recipe
    from palcache.sweeps.grids import EXAMPLE, Grid, parse_grid, read_grid

    if config is not None and recipe is not None:
        raise InputError("Got --config and --recipe; give one of them, and --grid beside it for other values.")
    if text is None and config is None and recipe is None:
        raise InputError(f"The grid is empty; give --grid {EXAMPLE}, --config FILE.toml or --recipe pal-groups.")
    base = read_grid(config) if config else load_recipe(recipe) if recipe else Grid()
    return base if text is None else base.crossed_with(parse_grid(text))


def _print_heads(result: SweepResult) -> None:
    """Print a line per head: what varies, its accuracy, and the yardsticks beside it."""
    varied = result.varied or ("k",)
    columns = ["run", *varied, "val", "test", "95 % interval", "user-blind", "longer"]
    rows = [
        [head.name, *(_cell(value) for value in head.options(varied).values()), *_figures(head)]
        for head in result.heads
    ]
    done = len(result.heads) - len(result.failed)
    print_table(f"{done} of {len(result.heads)} heads; accuracy on val and test", columns, rows)
    say(f"{result.path / 'results.csv'} has every figure; each run is a folder in {result.path / 'runs'}")


def _figures(head: SweepHead) -> list[str]:
    figures: dict[str, Any] = head.figures()
    if head.run is None:
        return ["failed", *["-"] * 4]
    interval = f"{figures['test_low']:.3f} to {figures['test_high']:.3f}"
    names = ("user_blind_test_accuracy", "longer_test_accuracy")
    return [
        f"{figures['val_accuracy']:.4f}",
        f"{figures['test_accuracy']:.4f}",
        interval,
        *(f"{figures[name]:.4f}" for name in names),
    ]


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _print_curve(adapted: AdaptedSweep | None) -> None:
    if adapted is None:
        return
    rows = [[f"{n}", f"{mean:.4f}", f"{sd:.4f}", str(heads)] for n, mean, sd, heads in adapted.means()]
    title = f"new users of {adapted.table}: accuracy by comparisons per user, over {len(adapted.curves)} heads"
    print_table(title, ["n", "mean", "sd", "heads"], rows)
    if adapted.skipped:
        say(f"{len(adapted.skipped)} heads with one prototype or without mixtures of them have no curve")


class _Reporter:
    """Turns progress of the sweep into a bar."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __call__(self, event: SweepProgress) -> None:
        self._bar.update(event.share, 1, f"{event.done} of {event.heads} heads done")
