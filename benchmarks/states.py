"""states: hidden-state encoders against a plain padded loop, what is padding, stored types, and memory over many texts."""

from __future__ import annotations

import functools
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.measuring import Job, clock, devices, finish, has_bfloat16, in_turn, ratio
from benchmarks.results import Row, row
from benchmarks.sources import fresh, mixed_texts, numbered, scratch, write_pairs
from palcache.cache import Cache
from palcache.comparisons import Column, Comparisons
from palcache.configs import ComputeDtype, EmbedConfig, StoredDtype
from palcache.embedding.encoding import embed_comparisons
from palcache.embedding.stages import embed_tables
from palcache.embedding.summaries import EmbedProgress, EmbedSummary
from palcache.encoders import Role, TokenizedTexts
from palcache.encoders.hidden_states import HiddenStateEncoder, load_hidden_states
from palcache.fingerprints import text_keys

BATCH: Final = 32
STORED: Final[tuple[StoredDtype, ...]] = ("float32", "float16", "bfloat16", "int8")
GROWTH: Final = 64 << 20
"""Bytes of anonymous memory by which the second half of a long run may exceed the first."""
_FOLDERS: Final = fresh("states")
_SIZES: Final = {"cpu": (256, 1024, 4, 8), "cuda": (1024, 4096, 24, 16)}
"""Width, inner width, layers and heads: a small OPT on a CPU, OPT-350m's on a GPU."""


@functools.cache
def model_folder(device: str) -> Path:
    """Write a random OPT (projected to half its width) with a byte-level tokenizer; return the folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    folder = Path(tempfile.mkdtemp(prefix="opt-", dir=scratch()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=4_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(mixed_texts(400, seed=5), trainer)
    width, inner, layers, heads = _SIZES[device]
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=4_000, hidden_size=width, word_embed_proj_dim=width // 2, ffn_dim=inner, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=512, do_layer_norm_before=False,
    )  # fmt: skip
    transformers.OPTModel(config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[1], eos_token=special[2])
    fast.save_pretrained(folder)
    return folder


def plain_loop(network: Any, tokenizer: Any, texts: Sequence[str], device: str) -> torch.Tensor:
    """Return last-token states by the loop that people write: batches in the order given, padded to the longest."""
    out = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = tokenizer(
                list(texts[start : start + BATCH]), padding=True, truncation=True, max_length=512, return_tensors="pt"
            ).to(device)
            states = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            ends = batch["attention_mask"].sum(dim=1) - 1
            out.append(states[torch.arange(len(ends), device=device), ends].float().cpu())
    finish(device)
    return torch.cat(out)


def run(quick: bool) -> list[Row]:
    """Measure on every device."""
    rows = [r for device in devices() for r in _encode(device, quick=quick)]
    return [*rows, *_stored(quick=quick), _memory(quick=quick)]


def _encode(device: str, *, quick: bool) -> list[Row]:
    import transformers

    n = 60 if quick else 160 if device == "cpu" else 20_000
    table = scratch() / f"states-{device}.parquet"
    texts = write_pairs(table, mixed_texts(n, seed=2))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder(device))
    computes: tuple[ComputeDtype, ...] = ("float32", "bfloat16") if has_bfloat16(device) else ("float32",)
    rows = []
    for compute in computes:
        network = transformers.AutoModel.from_pretrained(model_folder(device), dtype=getattr(torch, compute)).to(device)
        config = EmbedConfig(model=str(model_folder(device)), device=device, compute_dtype=compute)
        encoder, last = load_hidden_states(config), list[EmbedSummary]()
        job = functools.partial(_embed, table, encoder, config, last)
        jobs: dict[str, Job] = {
            "ours": functools.partial(clock, job),
            "theirs": functools.partial(clock, functools.partial(plain_loop, network, tokenizer, texts, device)),
        }
        seconds = in_turn(jobs, 1 if quick else 3 if device == "cpu" else 5)
        gain = ratio(seconds["theirs"], seconds["ours"])
        rate = {name: last[-1].tokens / statistics.median(values) for name, values in seconds.items()}
        share = last[-1].tokens / max(1, last[-1].padded)
        what = f"tokens/s, whole stage 1, random OPT in {compute}, last token's state, mixed lengths"
        goal = 2.0 if device == "cuda" else 1.2
        found = row("states", what, device, against=f"a padded loop, batch {BATCH}, same type", goal=str(goal))
        measured = f"{rate['ours']:,.0f}/s against {rate['theirs']:,.0f}/s on {len(texts):,} texts"
        note = f"{1 - share:.1%} of the tokens computed are padding"
        rows.append(found.with_verdict(gain.value >= goal, measured, str(gain), note))
    return rows


def _embed(table: Path, encoder: HiddenStateEncoder, config: EmbedConfig, last: list[EmbedSummary]) -> None:
    folder = next(_FOLDERS)
    last.append(embed_tables([table], folder, encoder=encoder, config=config))
    shutil.rmtree(folder)


def _stored(*, quick: bool) -> list[Row]:
    """Read random rows in every stored type, and say what each costs in bytes and cosine."""
    n = 2_000 if quick else 60_000
    caches = {dtype: _stub_cache(n, dtype) for dtype in STORED}
    random = np.random.Generator(np.random.PCG64(0))
    batches = [random.integers(0, n, 256) for _ in range(20 if quick else 400)]

    def read(dtype: StoredDtype) -> None:
        space = caches[dtype][0]
        for batch in batches:
            space.rows(batch).float()

    jobs: dict[str, Job] = {dtype: functools.partial(clock, functools.partial(read, dtype)) for dtype in STORED}
    seconds = in_turn(jobs, 1 if quick else 5)
    rows = []
    for dtype in STORED[1:]:
        space, summary = caches[dtype]
        gain = ratio(seconds["float32"], seconds[dtype])
        cosine = min(summary.cosines.values())
        measured = f"{space.nbytes / caches['float32'][0].nbytes:.2f} of the bytes; cosine {cosine:.6f} at least"
        goal = {"float16": 0.999999, "bfloat16": 0.99998, "int8": 0.9995}[dtype]
        found = row("states", f"random rows in {dtype}", "cpu", against="float32 rows", goal=f"cosine {goal}")
        rows.append(found.with_verdict(cosine >= goal, measured, str(gain)))
    return rows


class HashEncoder:
    """An encoder without a model: normal vectors drawn from a text's length and its place in the window."""

    token_budget = 1 << 18
    workers = 1
    equal_lengths = False
    about: Final[Mapping[str, Any]] = {"model": "hash", "revision": None}
    versions: Final[Mapping[str, str]] = {"device": "none"}

    def __init__(self, width: int) -> None:
        self.width = width

    def spec(self, role: Role) -> dict[str, Any]:
        """Return what identifies it."""
        return {"encoder": "hash", "of": role, "compute_dtype": "float32"}

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:  # noqa: ARG002 - the protocol's
        """Count characters."""
        counts = np.fromiter(map(len, texts), np.uint32, len(texts))
        return TokenizedTexts(texts, counts, np.zeros(len(texts), bool), np.zeros(1, np.int64), {})

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:  # noqa: ARG002
        """Return vectors, (m, d)."""
        generator = torch.Generator().manual_seed(int(rows[0]) + len(window.texts))
        return torch.randn((len(rows), self.width), generator=generator)


def _stub_cache(n: int, dtype: StoredDtype) -> tuple[Any, EmbedSummary]:
    cache = Cache.create(next(_FOLDERS))
    config = EmbedConfig(dtype=dtype)
    summary = embed_comparisons(short_texts(n), HashEncoder(768), cache, name="t", config=config)
    return cache.space(summary.spaces["response"]), summary


def short_texts(n: int) -> Comparisons:
    """Return a table over n distinct short responses and one prompt."""
    pairs = n // 2
    return Comparisons(
        users=Column.encode(pa.array(["u"] * pairs)),
        prompts=Column.encode(pa.array(["which?"] * pairs)),
        responses=numbered("response ", 2 * pairs),
        response_1=np.arange(0, 2 * pairs, 2, dtype=np.int32),
        response_2=np.arange(1, 2 * pairs, 2, dtype=np.int32),
        y=np.ones(pairs, np.int8),
    )


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process: what it holds beside mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def growth(n: int, *, width: int = 8, shard_rows: int = 8_192) -> tuple[int, int, float]:
    """Embed n short texts; return peaks of anonymous memory in the second quarter and the last, and the seconds."""
    table, cache = short_texts(n), Cache.create(next(_FOLDERS))
    peaks = [0, 0, 0, 0]

    def watch(event: EmbedProgress) -> None:
        quarter = min(3, 4 * event.texts // max(1, event.texts_total))
        peaks[quarter] = max(peaks[quarter], anonymous_bytes())

    config = EmbedConfig(shard_rows=shard_rows)
    encoder = HashEncoder(width)
    text_keys(table.responses)
    seconds = clock(
        functools.partial(embed_comparisons, table, encoder, cache, name="t", config=config, on_progress=watch)
    )
    shutil.rmtree(cache.path)
    return peaks[1], peaks[3], seconds


def _memory(*, quick: bool) -> Row:
    n = 40_000 if quick else 1_000_000
    early, late, seconds = growth(n)
    what = f"anonymous memory in the last quarter of {n:,} short texts, a stub encoder"
    found = row("states", what, "cpu", against="the second quarter", goal=f"at most {GROWTH >> 20} MiB more")
    measured = f"{late / 2**20:.0f} MiB against {early / 2**20:.0f} MiB; {n / seconds:,.0f} texts/s"
    return found.with_verdict(late - early <= GROWTH, measured, f"{late / early:.2f}")
