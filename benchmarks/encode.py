"""encode: distinct texts per second of the whole stage 1, against `SentenceTransformer.encode`."""

from __future__ import annotations

import functools
import shutil
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.measuring import Job, clock, devices, finish, has_bfloat16, in_turn, ratio
from benchmarks.results import Row, row
from benchmarks.sources import fresh, minilm, mixed_texts, scratch, write_pairs
from palcache.cache import Cache
from palcache.configs import EmbedConfig
from palcache.embedding.stages import embed_tables
from palcache.embedding.summaries import EmbedSummary
from palcache.encoders.sentence import SentenceEncoder, load_encoder
from palcache.fingerprints import text_keys

Dtype = Literal["float32", "bfloat16"]
Vectors = npt.NDArray[np.float32]

GOALS: Final[dict[Dtype, float]] = {"float32": 1.2, "bfloat16": 1.8}
COSINE: Final = 0.999
_FOLDERS: Final = fresh("encoded")


@dataclass(slots=True)
class Stage1:
    """The whole stage 1 on one table, with the model loaded before.

    Attributes:
        table: a Parquet file.
        encoder: the model.
        config: how to embed.
        summary: of the last embedding.
        cache: the folder of the last embedding.
    """

    table: Path
    encoder: SentenceEncoder
    config: EmbedConfig
    summary: EmbedSummary = field(default_factory=EmbedSummary)
    cache: Path = field(default_factory=lambda: next(_FOLDERS))

    @classmethod
    def of(cls, table: Path, device: str, dtype: Dtype) -> Stage1:
        """Load the model."""
        config = EmbedConfig(device=device, compute_dtype=dtype)
        return cls(table, load_encoder(config), config)

    def __call__(self) -> float:
        """Embed the table into a new cache; return the wall seconds."""
        shutil.rmtree(self.cache, ignore_errors=True)
        return clock(self._embed)

    def _embed(self) -> None:
        self.summary = embed_tables([self.table], self.cache, encoder=self.encoder, config=self.config)

    def profile(self) -> str:
        """Return what the last embedding spent its time on."""
        done = self.summary
        seconds = ", ".join(f"{stage} {value:.2f}" for stage, value in done.seconds.items())
        return (
            f"{done.tokens / max(1, done.encoded):.0f} tokens a text on average, {done.tokens / max(1, done.padded):.0%} "
            f"of the tokens computed are no padding; seconds by stage: {seconds} (tokenize runs beside forward)"
        )

    def vectors(self, texts: list[str]) -> Vectors:
        """Return the cached vectors of texts, whichever role they have in the table, (n, d)."""
        keys, cache = text_keys(pa.array(texts, pa.large_string())), Cache(self.cache)
        out = np.full((len(texts), self.encoder.width), np.nan, np.float32)
        for space_id in self.summary.spaces.values():
            space = cache.space(space_id)
            found = space.find(keys)
            out[found >= 0] = space.rows(found[found >= 0]).float().numpy()
        return out


def sentence_transformer(device: str, dtype: Dtype) -> Any:
    """Load MiniLM as its own library does."""
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    return SentenceTransformer(minilm(), device=device, model_kwargs={"dtype": getattr(torch, dtype)})


def encode_all(model: Any, texts: list[str], device: str) -> Vectors:
    """Return the vectors of texts as the model's own library gives them."""
    vectors: Vectors = model.encode(texts, show_progress_bar=False)
    finish(device)
    return vectors


def run(quick: bool) -> list[Row]:
    """Measure float32 and bfloat16 on every device."""
    return [r for device in devices() for r in _measure(device, quick=quick)]


def _measure(device: str, *, quick: bool) -> list[Row]:
    n = 80 if quick else 500 if device == "cpu" else 20_000
    table = scratch() / f"texts-{device}.parquet"
    texts = write_pairs(table, mixed_texts(n, seed=1))
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16") if has_bfloat16(device) else ("float32",)
    theirs = {dtype: sentence_transformer(device, dtype) for dtype in dtypes}
    ours = {dtype: Stage1.of(table, device, dtype) for dtype in dtypes}
    jobs: dict[str, Job] = {f"our {dtype}": stage for dtype, stage in ours.items()}
    for dtype, model in theirs.items():
        encode = functools.partial(encode_all, model, texts, device)
        jobs[f"their {dtype}"] = functools.partial(clock, encode)
    seconds = in_turn(jobs, 1 if quick else 5)
    exact = encode_all(theirs["float32"], texts, device)
    rows = [_filled(device, dtype, seconds, ours[dtype], (texts, exact)) for dtype in dtypes]
    if "bfloat16" not in dtypes:
        rows.append(_row(device, "bfloat16").skipped(f"the {device} has no bfloat16"))
    return rows


def _row(device: str, dtype: Dtype) -> Row:
    what = f"distinct texts/s, whole stage 1, MiniLM in {dtype}, mixed lengths"
    goal = f"{GOALS[dtype]}, cosine {COSINE}"
    return row("encode", what, device, against="SentenceTransformer.encode in float32", goal=goal)


def _filled(
    device: str, dtype: Dtype, seconds: dict[str, list[float]], ours: Stage1, exact: tuple[list[str], Vectors]
) -> Row:
    """Return the row of a dtype; `exact` are the texts and their float32 vectors by the model's own library."""
    texts, vectors = exact
    mine = seconds[f"our {dtype}"]
    gain, cosine = ratio(seconds["their float32"], mine), _cosines(ours.vectors(texts), vectors)
    rate = {name: len(texts) / statistics.median(values) for name, values in seconds.items()}
    measured = (
        f"{rate[f'our {dtype}']:.0f}/s against {rate['their float32']:.0f}/s on {len(texts):,} texts; cosine to it "
        f"{cosine.min():.5f} at least"
    )
    if dtype != "float32":
        measured += f"; their {dtype} {rate[f'their {dtype}']:.0f}/s, ratio {ratio(seconds[f'their {dtype}'], mine)}"
    good = gain.value >= GOALS[dtype] and bool(cosine.min() >= COSINE)
    return _row(device, dtype).with_verdict(good, measured, str(gain), ours.profile())


def _cosines(ours: Vectors, theirs: Vectors) -> Vectors:
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines: Vectors = (ours * theirs).sum(axis=1) / norms
    return cosines
