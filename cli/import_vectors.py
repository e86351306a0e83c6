"""`palcache import`: vectors from elsewhere -> cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from palcache.configs import EmbedConfig, SplitBy, SplitConfig

from .display import progress
from .embed import Reporter, report_summary
from .failures import reports_errors
from .options import (
    JsonOption,
    MadeCacheOption,
    SplitSeedOption,
    StoredDtypeOption,
    TableNameOption,
    TestOption,
    ValOption,
    parse_pairs,
)

_EMBED = EmbedConfig()
_SPLIT = SplitConfig()


@reports_errors
def import_vectors(
    tables: Annotated[
        list[Path],
        typer.Argument(help="Tables whose prompt, response_1 and response_2 hold ids.", show_default=False),
    ],
    *,
    cache: MadeCacheOption,
    vectors: Annotated[Path, typer.Option(help=".npy, .safetensors or .parquet.", show_default=False)],
    model: Annotated[str, typer.Option(help="A name for what made the vectors.", show_default=False)],
    ids: Annotated[
        Path | None,
        typer.Option(
            help="The vectors' ids: .txt, .json, .npy or .parquet.  [default: the Parquet file]", show_default=False
        ),
    ] = None,
    prompt_vectors: Annotated[
        Path | None, typer.Option(help="Vectors of the prompts, where they stand apart.", show_default=False)
    ] = None,
    prompt_ids: Annotated[Path | None, typer.Option(help="Their ids.", show_default=False)] = None,
    id_column: Annotated[str, typer.Option(help="Ids in Parquet files.")] = "id",
    vector_column: Annotated[str, typer.Option(help="Vectors in Parquet files.")] = "vector",
    tensor: Annotated[str | None, typer.Option(help="Tensor in safetensors files.", show_default=False)] = None,
    name: TableNameOption = None,
    map_: Annotated[
        list[str] | None,
        typer.Option("--map", help="NAME=COLUMN, e.g. prompt=prompt_id; may be repeated.", show_default=False),
    ] = None,
    split_by: Annotated[SplitBy, typer.Option(help="As for palcache embed.")] = _SPLIT.by,
    val: ValOption = _SPLIT.val,
    test: TestOption = _SPLIT.test,
    seed: SplitSeedOption = _SPLIT.seed,
    ties: Annotated[str, typer.Option(help="y = 0: refuse, drop, or half (both count one half).")] = "refuse",
    dtype: StoredDtypeOption = _EMBED.dtype,
    json_: JsonOption = False,
) -> None:
    """Store vectors that were made elsewhere, and the tables of comparisons that name them by id."""
    from palcache.care.imports import import_vectors as run
    from palcache.care.vectors import read_vectors

    from .embed import parse_ties

    options: dict[str, Any] = {"id_column": id_column, "vector_column": vector_column, "tensor": tensor}
    responses = read_vectors(vectors, ids=ids, **options)
    prompts = responses if prompt_vectors is None else read_vectors(prompt_vectors, ids=prompt_ids, **options)
    with progress("import") as bar:
        summary = run(
            tables,
            cache,
            prompts=prompts,
            responses=responses,
            model=model,
            name=name,
            dtype=dtype,
            split=SplitConfig(by=split_by, val=val, test=test, seed=seed),
            columns=parse_pairs(map_, "--map"),
            ties=parse_ties(ties),
            on_progress=Reporter(bar),
        )
    report_summary(summary, cache, plan=False, json_=json_)
