"""`palcache cache info|verify|ls`: what is inside a cache, and whether it is sound."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from palcache.configs import ComputeDtype, EmbedConfig

from . import cache_care
from .display import print_json, print_table, progress
from .failures import reports_errors
from .options import (
    CacheArgument,
    ChatTemplateOption,
    DeviceOption,
    EncoderOption,
    JsonOption,
    LayerOption,
    PoolingOption,
    PromptTemplateOption,
    ResponseTemplateOption,
    RevisionOption,
    TruncateDimOption,
    TrustOption,
)

if TYPE_CHECKING:
    from palcache.cache import Cache
    from palcache.care.repairs import Repair
    from palcache.care.verification import Verification

_EMBED = EmbedConfig()
app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    help="Look into a cache, check it and take care of it.",
    no_args_is_help=True,
)


@app.command()
@reports_errors
def info(cache: CacheArgument, *, json_: JsonOption = False) -> None:
    """Show spaces, models, rows, types, comparison tables and sizes."""
    from palcache.cache import Cache

    opened = Cache(cache)
    spaces, tables = _spaces(opened), _tables(opened)
    if json_:
        print_json({"path": str(cache), "spaces": spaces, "comparisons": tables})
        return
    print_table(
        f"spaces of {cache}",
        ["space", "role", "model", "stored", "computed", "rows", "width", "MB", "shards", "unfinished"],
        [
            [s["space"][:8], s["role"], s["model"], s["dtype"], s["compute_dtype"], f"{s['rows']:,}", str(s["width"]),
             f"{s['bytes'] / 1e6:.1f}", str(s["shards"]), str(s["unfinished"])]
            for s in spaces
        ],
        text=5,
    )  # fmt: skip
    print_table(
        f"comparison tables of {cache}",
        ["name", "fingerprint", "splits", "comparisons", "users", "prompts", "responses"],
        [
            [t["name"], t["fingerprint"][:8], ", ".join(f"{name} {count:,}" for name, count in t["splits"].items()),
             f"{t['comparisons']:,}", f"{t['users']:,}", f"{t['prompts']:,}", f"{t['responses']:,}"]
            for t in tables
        ],
        text=3,
    )  # fmt: skip


def _spaces(cache: Cache) -> list[dict[str, Any]]:
    out = []
    for space_id in cache.space_ids:
        space = cache.space(space_id)
        out.append(
            {
                "space": space_id,
                "role": space.role,
                "model": cache.about(space_id).get("model"),
                "rows": len(space),
                "width": space.width,
                "dtype": space.dtype,
                "compute_dtype": space.spec.get("compute_dtype", "-"),
                "bytes": space.nbytes,
                "shards": len(space.shards),
                "unfinished": len(list(space.shard_folder.glob("*.claim"))),
                "spec": dict(space.spec),
            }
        )
    return out


def _tables(cache: Cache) -> list[dict[str, Any]]:
    out = []
    for name in cache.comparison_names:
        stored = cache.comparisons(name)
        table = stored.comparisons
        splits = table.split.to_list() if table.split else []
        out.append(
            {
                "name": name,
                "comparisons": len(table),
                "users": len(table.users.values),
                "prompts": len(table.prompts.values),
                "responses": len(table.responses),
                "splits": {split: splits.count(split) for split in sorted(set(splits))},
                "fingerprint": stored.fingerprint,
                "spaces": [list(pair) for pair in stored.spaces],
                "joint_spaces": list(stored.joint_spaces),
            }
        )
    return out


@app.command()
@reports_errors
def verify(
    cache: CacheArgument,
    *,
    reencode: Annotated[int, typer.Option(min=0, help="Encode this many rows per space again and compare.")] = 0,
    model: Annotated[str, typer.Option(help="The model for --reencode, as for palcache embed.")] = _EMBED.model,
    compute_dtype: Annotated[ComputeDtype, typer.Option(help="As for palcache embed.")] = _EMBED.compute_dtype,
    max_tokens: Annotated[int | None, typer.Option(help="As for palcache embed.", show_default=False)] = None,
    truncate_dim: TruncateDimOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    encoder: EncoderOption = _EMBED.encoder,
    pooling: PoolingOption = _EMBED.pooling,
    layer: LayerOption = _EMBED.layer,
    prompt_template: PromptTemplateOption = _EMBED.prompt_template,
    response_template: ResponseTemplateOption = _EMBED.response_template,
    chat_template: ChatTemplateOption = _EMBED.chat_template,
    device: DeviceOption = _EMBED.device,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what is damaged or missing; needs the model only to encode again.")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Check every byte against its sum, and with --reencode a sample of rows against the model. Exit code 1 if unsound."""
    from palcache.cache import Cache

    opened = Cache(cache)
    config = EmbedConfig(
        model=model, compute_dtype=compute_dtype, max_tokens=max_tokens, device=device, encoder=encoder,
        pooling=pooling, layer=layer, prompt_template=prompt_template, response_template=response_template,
        chat_template=chat_template, truncate_dim=truncate_dim, revision=revision, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    mended = _repair(opened, config) if repair else None
    found = _verify(opened)
    if reencode:
        found = _reencode(opened, config, reencode, found)
    if json_:
        print_json(
            {"sound": not found.problems, "shards": found.shards, "rows": found.rows, "bytes": found.nbytes,
             "problems": list(found.problems), "reencoded": found.reencoded, "lowest_cosine": found.lowest_cosine,
             "repair": asdict(mended) if mended else None}
        )  # fmt: skip
    else:
        if mended:
            _print_repair(mended)
        _print_verification(found, cache)
    if found.problems:
        raise typer.Exit(1)


def _verify(opened: Cache) -> Verification:
    from palcache.care.verification import verify_cache

    total = sum(path.stat().st_size for path in opened.path.glob("spaces/*/shards/*.h5"))
    done = 0
    with progress("verify") as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(done, total, f"{done / 1e6:,.0f} MB")

        return verify_cache(opened, on_shard=advance)


def _reencode(opened: Cache, config: EmbedConfig, count: int, found: Verification) -> Verification:
    """Return what was found, and what a sample of rows adds to it."""
    from palcache.care.verification import reencode_sample
    from palcache.encoders.choices import load_encoder

    compared, lowest, differing = reencode_sample(opened, load_encoder(config), count)
    return replace(found, problems=found.problems + differing, reencoded=compared, lowest_cosine=lowest)


def _print_verification(found: Verification, cache: Path) -> None:
    for problem in found.problems:
        typer.echo(problem)
    again = (
        f"; {found.reencoded:,} rows encoded again, lowest cosine {found.lowest_cosine:.6f}" if found.reencoded else ""
    )
    verdict = "sound" if not found.problems else f"NOT sound, {len(found.problems)} problem(s)"
    typer.echo(f"{cache}: {verdict}: {found.rows:,} rows in {found.shards} shards, {found.nbytes:,} bytes{again}")


def _repair(opened: Cache, config: EmbedConfig) -> Repair:
    from palcache.care.repairs import repair_cache
    from palcache.embedding.stages import load_default

    with progress("repair") as bar:
        return repair_cache(
            opened,
            lambda: load_default(config),
            on_progress=lambda at: bar.update(
                at.tokens, at.tokens_total, f"{at.role}s {at.texts:,}/{at.texts_total:,}"
            ),
        )


def _print_repair(mended: Repair) -> None:
    typer.echo(
        f"repaired: {mended.shards_restored} shards byte for byte, {mended.shards_rewritten} rewritten, "
        f"{mended.shards_unreadable} unreadable; {mended.rows_encoded:,} rows encoded again"
    )
    if mended.rows_lost:
        typer.echo(f"not mendable: {mended.rows_lost:,} rows whose texts are in no table; they were left out")


@app.command("ls")
@reports_errors
def list_tables(cache: CacheArgument, *, json_: JsonOption = False) -> None:
    """List the comparison tables of a cache."""
    from palcache.cache import Cache

    opened = Cache(cache)
    tables = [
        {**table, "bytes": (cache / "comparisons" / f"{table['name']}.h5").stat().st_size} for table in _tables(opened)
    ]
    if json_:
        print_json({"path": str(cache), "comparisons": tables})
        return
    print_table(
        f"comparison tables of {cache}",
        ["name", "comparisons", "users", "texts", "encoders", "MB", "fingerprint"],
        [
            [t["name"], f"{t['comparisons']:,}", f"{t['users']:,}", f"{t['prompts'] + t['responses']:,}",
             str(len(t["spaces"])), f"{t['bytes'] / 1e6:.1f}", t["fingerprint"][:8]]
            for t in tables
        ],
    )  # fmt: skip


app.command("rm")(cache_care.remove)
app.command("compact")(cache_care.compact)
app.command("merge")(cache_care.merge)
app.command("export")(cache_care.export)
