"""Is a cache what it says? Every byte against its sum, and a sample of rows against the encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from palcache.cache import MANIFEST, Cache, Space
from palcache.comparisons import Comparisons
from palcache.embedding.batching import plan_batches
from palcache.embedding.specs import config_of, differing_fields, full_spec
from palcache.embedding.works import Work
from palcache.encoders import Encoder, Role, StateEncoder, States
from palcache.errors import CacheError, MismatchError, StorageError
from palcache.fingerprints import KEY_BYTES, Keys, digest, hex_key, text_keys
from palcache.storage.indexes import KeyIndex
from palcache.storage.shards import Shard

MIN_COSINE: Final = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.999, "int8": 0.998}
"""Lowest cosine of a stored and a fresh vector, by the coarser of the stored and the computed type."""
_MEND: Final = "mend it with palcache cache verify --repair"


@final
@dataclass(frozen=True, slots=True)
class Verification:
    """What verify found.

    Attributes:
        shards: number of shards read.
        rows: number of rows in them.
        nbytes: bytes read.
        problems: one sentence each; empty for a sound cache.
        reencoded: rows compared with fresh vectors.
        lowest_cosine: the lowest cosine among them; 1.0 where none was compared.
    """

    shards: int
    rows: int
    nbytes: int
    problems: tuple[str, ...]
    reencoded: int = 0
    lowest_cosine: float = 1.0


def verify_cache(cache: Cache, *, on_shard: Callable[[int], None] | None = None) -> Verification:
    """Check every byte of every shard, the manifest, the journal and every comparison table.

    Args:
        cache: the cache.
        on_shard: called with the bytes of each shard once it has been read.
    """
    problems = [
        f"The shard {name} of the space {space_id} is in the journal and not in its folder; {_MEND}."
        for space_id, name in cache.missing_shards()
    ]
    spaces: dict[str, Space] = {}
    shards = rows = nbytes = 0
    for space_id in cache.space_ids:
        paths = cache.shard_paths(space_id)
        found = [problem for path in paths for problem in _shard_problems(path, space_id, on_shard)]
        if not found:
            spaces[space_id] = space = cache.space(space_id)
            rows += len(space)
            if digest(space.spec) != space_id:
                found = [
                    f"{cache.path / MANIFEST}: the spec of the space {space_id} is not the one that it was named for; {_MEND}."
                ]
        shards, nbytes = shards + len(paths), nbytes + sum(path.stat().st_size for path in paths)
        problems += found
    problems += _table_problems(cache, spaces)
    return Verification(shards, rows, nbytes, tuple(problems))


def _shard_problems(path: Path, space_id: str, on_shard: Callable[[int], None] | None) -> list[str]:
    try:
        shard = Shard(path)
        problems = [
            f"{path}: the bytes of {damage.dataset}, rows {damage.rows[0]} to {damage.rows[1] - 1}, are not those that "
            f"were written; {_MEND}."
            for damage in shard.damage()
        ]
        if not problems and shard.header.space_id != space_id:
            problems = [f"{path} belongs to the space {shard.header.space_id}, not to {space_id}; delete the file."]
    except (CacheError, StorageError) as error:
        problems = [str(error)]
    if on_shard:
        on_shard(path.stat().st_size)
    return problems


def _table_problems(cache: Cache, spaces: Mapping[str, Space]) -> list[str]:
    """Check that every text of every table has a vector in the spaces that are sound."""
    problems = []
    for name in cache.comparison_names:
        try:
            stored = cache.comparisons(name)
        except CacheError as error:
            problems.append(str(error))
            continue
        sides = [zip(pair, (stored.prompt_keys, stored.response_keys), strict=True) for pair in stored.spaces]
        for named in (*sides, [(space_id, stored.joint_keys) for space_id in stored.joint_spaces]):
            for space_id, keys in named:
                if space_id not in cache.space_ids:
                    problems.append(f"The table {name} names the space {space_id}, which is not there; embed it again.")
                elif space_id in spaces and (missing := int((spaces[space_id].find(keys) < 0).sum())):
                    problems.append(
                        f"{missing} texts of the table {name} have no vector in the space {space_id}; embed it again."
                    )
    return problems


def reencode_sample(cache: Cache, encoder: Encoder, count: int, *, seed: int = 0) -> tuple[int, float, tuple[str, ...]]:
    """Encode some rows again and compare them with the stored vectors, and with token and prompt states that are kept.

    Args:
        cache: the cache.
        encoder: the model that filled it.
        count: rows per space, drawn among those whose texts the comparison tables hold.
        seed: of the draw.

    Returns:
        The rows compared, the lowest cosine, and one sentence per row that differs.

    Raises:
        MismatchError: no space of the cache is of this encoder; the message names the fields that differ.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    compared, lowest, problems = 0, 1.0, []
    for space in map(cache.space, spaces_of_encoder(cache, encoder)):
        role = role_of(space.spec)
        texts, prompts, keys = _joint_texts(cache, space) if role == "joint" else _texts(cache, space, role)
        if not len(texts):
            continue
        picked = generator.permutation(len(texts))[:count]
        cosine = _cosines(encoder, Work(role, space, texts, keys, prompts), picked)
        coarse = min(space.dtype, str(space.spec.get("compute_dtype", "float32")), key=MIN_COSINE.__getitem__)
        problems += [
            f"The vector with the key {hex_key(keys[picked[row]])} in the {role} space has cosine {float(cosine[row]):.5f} "
            "to a fresh one; it was written by another model or another version of its libraries."
            for row in torch.nonzero(~(cosine >= MIN_COSINE[coarse]))[:, 0].tolist()
        ]
        compared, lowest = compared + len(picked), min(lowest, float(cosine.min()))
    return compared, lowest, tuple(problems)


def role_of(spec: Mapping[str, Any]) -> Role:
    """Return the role of a space that an encoder fills."""
    roles: dict[str, Role] = {"prompt": "prompt", "response": "response", "joint": "joint"}
    return roles[spec["role"]]


def _cosines(encoder: Encoder, work: Work, picked: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return the lowest cosine of what is stored of each of some rows to a fresh one, (n,), in batches as `embed` makes."""
    window = work.tokenize(encoder, picked)
    stored = work.space.find(work.keys[picked])
    out = torch.empty(len(picked))
    for rows in plan_batches(window.n_tokens, encoder.token_budget, equal_lengths=encoder.equal_lengths):
        out[torch.from_numpy(rows)] = _compare(work.encode(encoder, window, rows), work.space, stored[rows])
    return out


def _compare(fresh: States, space: Space, rows: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return the lowest of the cosines of pooled vector, prompt state and all token states at once, (n,)."""
    found = [_cosine(fresh.pooled, space.rows(rows))]
    if space.spec.get("prompt_state") and fresh.prompt is not None:
        found.append(_cosine(fresh.prompt, space.rows(rows, which="prompt")))
    if fresh.tokens is not None:
        states, offsets = space.tokens(rows)
        if len(states) != len(fresh.tokens):  # other tokens altogether
            return torch.zeros(len(rows))
        row = torch.repeat_interleave(torch.arange(len(rows)), offsets.diff())
        one, two = fresh.tokens.float().cpu(), states.float()
        dot, first, second = (
            torch.zeros(len(rows)).index_add_(0, row, (a * b).sum(dim=1))
            for a, b in ((one, two), (one, one), (two, two))
        )
        product = (first * second).sqrt()
        found.append(torch.where(product > 0, dot / product.clamp(min=1e-38), 1.0))
    return torch.stack(found).amin(dim=0)


def _cosine(fresh: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(fresh.float().cpu(), stored.float(), dim=1)


def spaces_of_encoder(cache: Cache, encoder: Encoder) -> list[str]:
    """Return the ids of the spaces that an encoder fills; no shard is opened.

    Raises:
        MismatchError: there is none; the message names the fields in which the nearest one differs.
    """
    found, differing = [], list[list[str]]()
    for space_id in cache.space_ids:
        stored = cache.spec(space_id)
        if stored.get("role") not in {"prompt", "response", "joint"}:
            continue
        if stored["role"] == "joint" and not isinstance(encoder, StateEncoder):
            differing.append(["encoder"])
            continue
        spec = full_spec(encoder, role_of(stored), config_of(stored))
        if digest(spec) == space_id:
            found.append(space_id)
        else:
            differing.append(differing_fields(spec, stored))
    if not found:
        nearest = min(differing, key=len, default=["everything"])
        raise MismatchError(
            f"No space of {cache.path} was written by the encoder {encoder.about.get('model')}: the nearest differs in "
            f"{', '.join(nearest)}; name the model, and the options that palcache embed had."
        )
    return found


def _joint_texts(cache: Cache, space: Space) -> tuple[pa.Array, pa.Array | None, Keys]:
    """Return responses, prompts and keys of the joint items of all tables that have a row in a space."""
    responses, prompts, keys = [], [], []
    for stored in map(cache.comparisons, cache.comparison_names):
        if space.space_id in stored.joint_spaces:
            pairs = stored.joint_items[0][space.find(stored.joint_keys) >= 0]
            prompts.append(stored.comparisons.prompts.values.take(pa.array(pairs[:, 0])))
            responses.append(stored.comparisons.responses.take(pa.array(pairs[:, 1])))
            keys.append(stored.joint_keys[space.find(stored.joint_keys) >= 0])
    none = pa.array([], pa.large_string())
    whole = np.concatenate([*keys, np.empty((0, KEY_BYTES), np.uint8)])
    return pa.concat_arrays([*responses, none]), pa.concat_arrays([*prompts, none]), whole


def _texts(cache: Cache, space: Space, role: Role) -> tuple[pa.Array, pa.Array | None, Keys]:
    """Return the distinct texts of all tables that have a row in a space, no prompts, and the keys."""
    tables: list[Comparisons] = [cache.comparisons(name).comparisons for name in cache.comparison_names]
    parts = [table.prompts.values if role == "prompt" else table.responses for table in tables]
    texts = pa.concat_arrays([*parts, pa.array([], pa.large_string())])
    keys = text_keys(texts)
    first = np.sort(KeyIndex.build(keys).positions)
    first = first[space.find(keys[first]) >= 0]
    return texts.take(pa.array(first)), None, keys[first]
