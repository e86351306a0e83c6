"""`palcache cache rm|compact|merge|export`: the care of a cache."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from palcache.configs import EmbedConfig, ExportFormat
from palcache.errors import InputError

from .display import print_json, progress, say
from .failures import reports_errors
from .options import CacheArgument, JsonOption

_EMBED = EmbedConfig()


@reports_errors
def remove(
    cache: CacheArgument,
    names: Annotated[list[str], typer.Argument(help="Names of comparison tables.", show_default=False)],
    *,
    json_: JsonOption = False,
) -> None:
    """Remove comparison tables. Their vectors stay until `palcache cache compact`."""
    from palcache.cache import Cache

    opened = Cache(cache)
    missing = sorted(set(names) - set(opened.comparison_names))
    if missing:
        listed = ", ".join(opened.comparison_names) or "none"
        raise InputError(
            f"The cache {cache} has no comparison table {missing[0]}; it has {listed}: nothing was removed."
        )
    for name in dict.fromkeys(names):
        opened.remove_comparisons(name)
    if json_:
        print_json({"path": str(cache), "removed": list(dict.fromkeys(names)), "left": opened.comparison_names})
        return
    typer.echo(
        f"{cache}: removed {', '.join(dict.fromkeys(names))}; left {', '.join(opened.comparison_names) or 'none'}"
    )
    say(f"next: palcache cache compact {cache} drops vectors that no table names any more")


@reports_errors
def compact(
    cache: CacheArgument,
    *,
    shard_rows: Annotated[int, typer.Option(help="Rows per shard file.")] = _EMBED.shard_rows,
    drop_unfinished: Annotated[
        bool, typer.Option("--drop-unfinished", help="Drop what an interrupted embed has begun.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would go, and change nothing.")] = False,
    json_: JsonOption = False,
) -> None:
    """Drop vectors that no comparison table names, failed rows and repeats, and join small shards."""
    from palcache.cache import Cache
    from palcache.care.compactions import compact_cache

    with progress("compact") as bar:
        done = compact_cache(
            Cache(cache),
            shard_rows=shard_rows,
            drop_unfinished=drop_unfinished,
            plan=plan,
            on_rows=lambda rows, total: bar.update(rows, total, f"{rows:,}/{total:,} rows"),
        )
    if json_:
        print_json({"path": str(cache), "plan": plan, **asdict(done)})
        return
    verb = "would drop" if plan else "dropped"
    after = "" if done.nbytes_after is None else f"; {done.nbytes / 1e6:,.1f} MB became {done.nbytes_after / 1e6:,.1f}"
    typer.echo(
        f"{cache}: {verb} {done.rows_dropped:,} of {done.rows:,} rows and {len(done.spaces_dropped)} spaces; "
        f"{done.shards_rewritten} of {done.shards} shards {'to rewrite' if plan else 'rewritten'}{after}"
    )


@reports_errors
def merge(
    caches: Annotated[list[Path], typer.Argument(help="Caches to read.", show_default=False)],
    *,
    into: Annotated[Path, typer.Option(help="The cache to add to, made where it is missing.", show_default=False)],
    json_: JsonOption = False,
) -> None:
    """Bring caches that were built apart into one: rows without repeats, tables by name."""
    from palcache.cache import Cache
    from palcache.care.merges import merge_caches

    with progress("merge") as bar:
        done = merge_caches(
            [Cache(path) for path in caches],
            into,
            on_rows=lambda rows, total: bar.update(rows, total, f"{rows:,}/{total:,} rows"),
        )
    if json_:
        print_json({"path": str(into), **asdict(done)})
        return
    typer.echo(
        f"{into}: {done.rows_added:,} rows added, {done.rows_known:,} already there, {done.rows_failed:,} failed ones left; "
        f"{len(done.spaces_added)} new spaces; tables {', '.join(done.tables) or 'none'}"
    )


@reports_errors
def export(
    cache: CacheArgument,
    folder: Annotated[Path, typer.Argument(help="Where to write, made where it is missing.", show_default=False)],
    *,
    form: Annotated[ExportFormat, typer.Option("--format", help="Of the files.")] = "safetensors",
    space: Annotated[
        list[str] | None,
        typer.Option(
            help="A role or the beginning of a space's id; may be repeated.  [default: all]", show_default=False
        ),
    ] = None,
    json_: JsonOption = False,
) -> None:
    """Write vectors with their keys and texts for other tools."""
    from palcache.cache import Cache
    from palcache.care.exports import export_cache

    with progress("export") as bar:
        written = export_cache(
            Cache(cache),
            folder,
            form=form,
            spaces=space or (),
            on_rows=lambda rows, total: bar.update(rows, total, f"{rows:,}/{total:,} rows"),
        )
    if json_:
        spaces = [{**asdict(one), "paths": [str(path) for path in one.paths]} for one in written]
        print_json({"path": str(cache), "format": form, "spaces": spaces})
        return
    for one in written:
        states = f", {one.tokens:,} token states" if one.tokens else ""
        typer.echo(f"{one.role} {one.space_id[:8]}: {one.rows:,} vectors, {one.texts:,} with text{states}")
        for path in one.paths:
            typer.echo(f"  {path}")
