"""`palcache demo`: the whole job on a small table, and what pluralism bought on one screen."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palcache.errors import InputError

from .display import describe, print_evaluations, print_json, print_table, say
from .failures import reports_errors
from .options import DeviceOption, JsonOption

if TYPE_CHECKING:
    from palcache.runs.trainings import RunResult


@reports_errors
def demo(
    *,
    out: Annotated[
        Path | None, typer.Option(help="Keep the cache and the runs in this new folder.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Embed a small table of two groups with opposite tastes, train k = 1 and k = 2, and show what pluralism bought."""
    if out is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):  # empty is as good as new
        raise InputError(f"{out} exists; name a new folder with --out.")
    with tempfile.TemporaryDirectory(prefix="palcache-demo-") as temporary:
        _run(out or Path(temporary), device, as_json=json_)
        if out is not None:
            say(f"kept in {out}; try: palcache evaluate {out}/k2 --cache {out}/cache")


def _run(folder: Path, device: str, *, as_json: bool) -> None:
    from palcache.cache import Cache
    from palcache.configs import EmbedConfig, HeadConfig
    from palcache.embedding.stages import embed_tables
    from palcache.runs.trainings import train_run
    from palcache.synthetic import sample_comparisons

    start = time.perf_counter()
    table = sample_comparisons()
    say(f"1. embed {len(table):,} comparisons of {len(table.users.values)} users in two groups with opposite tastes")
    summary = embed_tables(table, folder / "cache", name="sample", config=EmbedConfig(device=device))
    say(
        f"   {summary.references:,} texts named, {summary.encoded:,} encoded once in {summary.seconds['total']:.1f} s: "
        f"{summary.repeats_saved:,} repeats saved"
    )
    runs = {}
    for k in (1, 2):
        runs[k] = train_run(Cache(folder / "cache"), folder / f"k{k}", head=HeadConfig(k=k), device=device)
        say(f"{k + 1}. train k = {k} on the cached vectors: {runs[k].seconds:.1f} s")
    seconds = time.perf_counter() - start
    if as_json:
        print_json({"seconds": seconds, **{f"k{k}": run.to_dict() for k, run in runs.items()}})
    else:
        _show(runs)
        say(f"the whole demo took {seconds:.1f} s")


def _show(runs: dict[int, RunResult]) -> None:
    one, two = (runs[k].evaluations["test"] for k in (1, 2))
    shown = {"longer": one["longer"], "one": one["head"], "two": two["head"]}
    names = {"longer": "longer response", "one": "one reward (k = 1)", "two": "two prototypes (k = 2)"}
    print_evaluations(describe(one["head"], "test"), shown, names)
    groups = [[name, *(f"{e['head'].groups[name]:.4f}" for e in (one, two))] for name in one["head"].groups]
    print_table("accuracy by group", ["group", "k = 1", "k = 2"], groups)
    head = runs[2].head
    rows = [
        [user, _bar(float(weights[0])), f"{float(weights[0]):.2f}", f"{float(weights[1]):.2f}"]
        for user, weights in sorted(zip(head.users, head.mixtures, strict=True), key=_by_user)
    ]
    print_table("what k = 2 learned of each user, never told the groups", ["user", "", "w1", "w2"], rows)
    gain = two["head"].accuracy["micro"].value - one["head"].accuracy["micro"].value
    typer.echo(
        f"Two prototypes predict {100 * gain:+.1f} percentage points more test comparisons than one reward for all."
    )


def _by_user(row: tuple[str, Any]) -> str:
    return row[0]


def _bar(share: float, width: int = 30) -> str:
    """Return a bar that shows a user's place between prototype 1 and prototype 2."""
    at = round(share * (width - 1))
    return "2 " + "-" * at + "o" + "-" * (width - 1 - at) + " 1"
