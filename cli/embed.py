"""`palcache embed`: comparisons -> cache."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from palcache.configs import ComputeDtype, EmbedConfig, Items, SplitBy, SplitConfig, TokenLevel

from .display import Progress, print_json, progress, say
from .failures import reports_errors
from .options import (
    AttnOption,
    ChatTemplateOption,
    DeviceOption,
    EncoderOption,
    JsonOption,
    LayerOption,
    MadeCacheOption,
    PoolingOption,
    PromptTemplateOption,
    ResponseTemplateOption,
    RevisionOption,
    SplitSeedOption,
    StoredDtypeOption,
    TableNameOption,
    TestOption,
    TruncateDimOption,
    TrustOption,
    ValOption,
    parse_pairs,
)

if TYPE_CHECKING:
    from palcache.comparisons import Ties
    from palcache.embedding.encoding import EmbedProgress, EmbedSummary


_EMBED = EmbedConfig()
_SPLIT = SplitConfig()


@reports_errors
def embed(
    tables: Annotated[
        list[Path], typer.Argument(help=".jsonl, .csv or .parquet files, read as one table.", show_default=False)
    ],
    *,
    cache: MadeCacheOption,
    model: Annotated[str, typer.Option(help="minilm, a model's id on the hub, or a folder.")] = _EMBED.model,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    name: TableNameOption = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="NAME=COLUMN renames a column; may be repeated.", show_default=False),
    ] = None,
    split_by: Annotated[
        SplitBy, typer.Option(help="What stays in one split; auto: the split column, else pair.")
    ] = _SPLIT.by,
    val: ValOption = _SPLIT.val,
    test: TestOption = _SPLIT.test,
    seed: SplitSeedOption = _SPLIT.seed,
    ties: Annotated[
        Literal["refuse", "drop", "half"], typer.Option(help="y = 0: refuse, drop, or half (both count one half).")
    ] = "refuse",
    device: DeviceOption = _EMBED.device,
    devices: Annotated[
        str | None,
        typer.Option(help="A worker process for each: cuda:0,cuda:1, or cpu:2 for two on the CPU.", show_default=False),
    ] = None,
    compute_dtype: Annotated[
        ComputeDtype, typer.Option(help="Type of the forward pass; auto: bfloat16 on CUDA, float32 elsewhere.")
    ] = _EMBED.compute_dtype,
    dtype: StoredDtypeOption = _EMBED.dtype,
    max_tokens: Annotated[
        int | None, typer.Option(help="Truncate texts to this many tokens.  [default: the model's]", show_default=False)
    ] = None,
    truncate_dim: TruncateDimOption = None,
    token_budget: Annotated[
        int | None, typer.Option(help="Padded tokens per batch.  [default: by device]", show_default=False)
    ] = None,
    encoder: EncoderOption = _EMBED.encoder,
    pooling: PoolingOption = _EMBED.pooling,
    layer: LayerOption = _EMBED.layer,
    prompt_template: PromptTemplateOption = _EMBED.prompt_template,
    response_template: ResponseTemplateOption = _EMBED.response_template,
    chat_template: ChatTemplateOption = _EMBED.chat_template,
    attn: AttnOption = _EMBED.attn,
    items: Annotated[
        Items, typer.Option(help="separate: prompts and responses by themselves; joint: prompt + response in one pass.")
    ] = _EMBED.items,
    tokens: Annotated[
        TokenLevel, typer.Option(help="Keep the state of every token of responses, or of all items; see --plan.")
    ] = _EMBED.tokens,
    shard_rows: Annotated[int, typer.Option(help="Rows per shard file.")] = _EMBED.shard_rows,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be encoded, and encode nothing.")] = False,
    json_: JsonOption = False,
) -> None:
    """Encode every distinct prompt and response of comparison tables into a cache.

    A run always resumes: stop it at any moment and run the same command again. Several runs may share one cache: each
    encodes its own part. Under torchrun or srun, every process takes the device of its rank.
    """
    from palcache.devices import parse_devices
    from palcache.embedding.stages import embed_tables
    from palcache.errors import InputError

    if devices is not None and device != _EMBED.device:
        raise InputError(f"Got --device {device} and --devices {devices}; give one of them.")
    config = EmbedConfig(
        model=model, revision=revision, trust_remote_code=trust_remote_code, device=device, compute_dtype=compute_dtype,
        dtype=dtype, max_tokens=max_tokens, truncate_dim=truncate_dim, token_budget=token_budget, shard_rows=shard_rows,
        encoder=encoder, pooling=pooling, layer=layer, prompt_template=prompt_template,
        response_template=response_template, chat_template=chat_template, attn=attn, items=items, tokens=tokens,
    )  # fmt: skip
    embed_all = functools.partial(
        embed_tables,
        tables,
        cache,
        name=name,
        config=config,
        split=SplitConfig(by=split_by, val=val, test=test, seed=seed),
        columns=parse_pairs(map_, "--map"),
        ties=parse_ties(ties),
        devices=parse_devices(devices) if devices is not None else (),
    )
    if plan:
        summary = embed_all(plan=True)
    else:
        with progress("embed") as bar:
            summary = embed_all(on_progress=Reporter(bar))
    report_summary(summary, cache, plan=plan, json_=json_)


def parse_ties(ties: str) -> Ties:
    """Return what to do with y = 0.

    Raises:
        InputError: it is none of the choices.
    """
    from palcache.errors import InputError

    choices: dict[str, Ties] = {"refuse": "refuse", "drop": "drop", "half": "half"}
    if ties not in choices:
        raise InputError(f"Got --ties {ties}; expected refuse, drop or half.")
    return choices[ties]


def report_summary(summary: EmbedSummary, cache: Path, *, plan: bool, json_: bool) -> None:
    """Print what was done, or with `plan` would be done."""
    if json_:
        print_json(
            {**asdict(summary), "repeats_saved": summary.repeats_saved,
                    "idle_share": summary.idle_share, "plan": plan}
        )  # fmt: skip
    else:
        _print_summary(summary, cache, plan=plan)


class Reporter:
    """Turns progress of the encoding into a bar with rates."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def __call__(self, event: EmbedProgress) -> None:
        """Show where the encoding stands."""
        elapsed = max(1e-9, time.perf_counter() - event.started)
        rates = f"{event.texts / elapsed:,.0f} texts/s  {event.tokens / elapsed:,.0f} tokens/s"
        text = "waiting for another writer" if event.waiting else rates
        self._bar.update(
            event.tokens, event.tokens_total, f"{event.role}s {event.texts:,}/{event.texts_total:,}  {text}"
        )


def _print_summary(summary: EmbedSummary, cache: Path, *, plan: bool) -> None:
    verb, about = ("to encode", "about ") if plan else ("encoded", "")
    by_role = ", ".join(f"{count:,} {role}s" for role, count in summary.distinct.items())
    padding = f", {summary.padded:,} with padding" if summary.padded else ""
    truncated = f"; {about}{summary.truncated:,} texts truncated" if summary.truncated else ""
    tokens = f", of which {summary.token_bytes:,} for the states of single tokens" if summary.token_bytes else ""
    stages = ", ".join(f"{stage} {value:.2f}" for stage, value in summary.seconds.items())
    sums = f" (sums over {summary.workers} workers, except total)" if summary.workers > 1 else ""
    lines = [
        f"{'plan for ' if plan else ''}{cache}",
        f"  texts    {summary.references:,} references, {sum(summary.distinct.values()):,} distinct ({by_role})",
        f"           {summary.hits:,} already cached, {summary.encoded:,} {verb}, {summary.repeats_saved:,} repeats saved",
        f"  tokens   {about}{summary.tokens:,}{padding}{truncated}",
        f"  bytes    {about}{summary.new_bytes:,}{tokens}",
        f"  seconds  {stages}{sums}",
    ]
    if summary.cosines:
        lowest = ", ".join(f"{role}s {cosine:.6f}" for role, cosine in summary.cosines.items())
        lines.append(f"  stored   lowest cosine to what was computed, on a sample: {lowest}")
    if summary.idle_share is not None:
        lines.append(f"  idle     the device waited {summary.idle_share:.0%} of the time of encoding")
    if summary.failed:
        lines.append(
            f"  failed   {summary.failed:,} texts; see failed.jsonl in the space's folder, and embed again to retry"
        )
    for line in lines:
        typer.echo(line)
    if not plan:
        several = len(list(cache.glob("comparisons/*.h5"))) > 1
        say(f"next: palcache train-head {cache} --run RUN --k 2{' --comparisons NAME' if several else ''}")
