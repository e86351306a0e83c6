"""`palcache cache info|verify`: what is inside a cache, and whether it is sound."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from palcache.configs import ComputeDtype, EmbedConfig

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
)

if TYPE_CHECKING:
    from palcache.cache import Cache

_EMBED = EmbedConfig()
app = typer.Typer(help="Look into a cache and check it.", no_args_is_help=True)


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
    encoder: EncoderOption = _EMBED.encoder,
    pooling: PoolingOption = _EMBED.pooling,
    layer: LayerOption = _EMBED.layer,
    prompt_template: PromptTemplateOption = _EMBED.prompt_template,
    response_template: ResponseTemplateOption = _EMBED.response_template,
    chat_template: ChatTemplateOption = _EMBED.chat_template,
    device: DeviceOption = _EMBED.device,
    json_: JsonOption = False,
) -> None:
    """Check every byte against its sum, and with --reencode a sample of rows against the model. Exit code 1 if unsound."""
    from palcache.cache import Cache
    from palcache.verification import reencode_sample, verify_cache

    opened = Cache(cache)
    total = sum(path.stat().st_size for path in cache.glob("spaces/*/shards/*.h5"))
    done = 0
    with progress("verify") as bar:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            bar.update(done, total, f"{done / 1e6:,.0f} MB")

        found = verify_cache(opened, on_shard=advance)
    compared, lowest, problems = 0, 1.0, found.problems
    if reencode:
        from palcache.encoders.choices import load_encoder

        config = EmbedConfig(
            model=model, compute_dtype=compute_dtype, max_tokens=max_tokens, device=device, encoder=encoder,
            pooling=pooling, layer=layer, prompt_template=prompt_template, response_template=response_template,
            chat_template=chat_template,
        )  # fmt: skip
        compared, lowest, differing = reencode_sample(opened, load_encoder(config), reencode)
        problems += differing
    if json_:
        print_json(
            {"sound": not problems, "shards": found.shards, "rows": found.rows, "bytes": found.nbytes,
             "problems": list(problems), "reencoded": compared, "lowest_cosine": lowest}
        )  # fmt: skip
    else:
        for problem in problems:
            typer.echo(problem)
        again = f"; {compared:,} rows encoded again, lowest cosine {lowest:.6f}" if compared else ""
        verdict = "sound" if not problems else f"NOT sound, {len(problems)} problem(s)"
        typer.echo(f"{cache}: {verdict}: {found.rows:,} rows in {found.shards} shards, {found.nbytes:,} bytes{again}")
    if problems:
        raise typer.Exit(1)
