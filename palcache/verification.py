"""Is a cache what it says? Every byte against its sum, and a sample of rows against the encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
import pyarrow as pa
import torch

from palcache.batching import plan_batches
from palcache.cache import MANIFEST, Cache, Space
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig
from palcache.encoders import Encoder, Role
from palcache.encoding import full_spec
from palcache.errors import CacheError, MismatchError, StorageError
from palcache.fingerprints import Keys, digest, hex_key, text_keys
from palcache.indexes import KeyIndex
from palcache.shards import Shard
from palcache.spaces import differing_fields

MIN_COSINE: Final = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.999}
"""Lowest cosine of a stored and a fresh vector, by the coarser of the stored and the computed type."""


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
    """Check every byte of every shard, the indexes, the manifest, the journal and every comparison table.

    Args:
        cache: the cache.
        on_shard: called with the bytes of each shard once it has been read.
    """
    problems = [
        f"The shard {name} of the space {space_id} is in the journal and not in its folder; embed the tables again."
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
            found = _space_problems(cache, space)
        shards, nbytes = shards + len(paths), nbytes + sum(path.stat().st_size for path in paths)
        problems += found
    problems += _table_problems(cache, spaces)
    return Verification(shards, rows, nbytes, tuple(problems))


def _shard_problems(path: Path, space_id: str, on_shard: Callable[[int], None] | None) -> list[str]:
    try:
        shard = Shard(path)
        problems = [
            f"{path}: the bytes of {damage.dataset}, rows {damage.rows[0]} to {damage.rows[1] - 1}, are not those that "
            "were written; delete the file and embed the tables again."
            for damage in shard.damage()
        ]
        if not problems and shard.header.space_id != space_id:
            problems = [f"{path} belongs to the space {shard.header.space_id}, not to {space_id}; delete the file."]
    except (CacheError, StorageError) as error:
        problems = [str(error)]
    if on_shard:
        on_shard(path.stat().st_size)
    return problems


def _space_problems(cache: Cache, space: Space) -> list[str]:
    """Check what no shard's sums cover: the spec in the manifest, and the index."""
    problems = []
    if digest(space.spec) != space.space_id:
        problems.append(
            f"{cache.path / MANIFEST}: the spec of the space {space.space_id} is not the one that it was named for; "
            "embed into a new folder."
        )
    if not space.index_is_sound():
        problems.append(f"{space.folder / 'index.h5'} does not match the shards; delete it, it is built again.")
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
        for pair in stored.spaces:
            for space_id, keys in zip(pair, (stored.prompt_keys, stored.response_keys), strict=True):
                if space_id not in cache.space_ids:
                    problems.append(f"The table {name} names the space {space_id}, which is not there; embed it again.")
                elif space_id in spaces and (missing := int((spaces[space_id].find(keys) < 0).sum())):
                    problems.append(
                        f"{missing} texts of the table {name} have no vector in the space {space_id}; embed it again."
                    )
    return problems


def reencode_sample(cache: Cache, encoder: Encoder, count: int, *, seed: int = 0) -> tuple[int, float, tuple[str, ...]]:
    """Encode some rows again and compare them with the stored vectors.

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
        role: Role = "prompt" if space.role == "prompt" else "response"
        texts, keys = _texts(cache, space, role)
        if not len(texts):
            continue
        picked = generator.permutation(len(texts))[:count]
        fresh = _encode(encoder, texts.take(pa.array(picked)).to_pylist(), role)
        stored = space.rows(space.find(keys[picked])).float()
        cosine = torch.nn.functional.cosine_similarity(fresh, stored, dim=1)
        coarse = min(space.dtype, str(space.spec.get("compute_dtype", "float32")), key=MIN_COSINE.__getitem__)
        problems += [
            f"The vector with the key {hex_key(keys[picked[row]])} in the {role} space has cosine {float(cosine[row]):.5f} "
            "to a fresh one; it was written by another model or another version of its libraries."
            for row in torch.nonzero(~(cosine >= MIN_COSINE[coarse]))[:, 0].tolist()
        ]
        compared, lowest = compared + len(picked), min(lowest, float(cosine.min()))
    return compared, lowest, tuple(problems)


def _encode(encoder: Encoder, texts: Sequence[str], role: Role) -> torch.Tensor:
    """Return the vectors of texts, (n, d), in batches as `embed` makes them."""
    window = encoder.tokenize(texts, role)
    out = torch.empty((len(texts), encoder.width))
    for rows in plan_batches(window.n_tokens, encoder.token_budget, equal_lengths=encoder.equal_lengths):
        out[torch.from_numpy(rows)] = encoder.encode(window, rows, role).float().cpu()
    return out


def spaces_of_encoder(cache: Cache, encoder: Encoder) -> list[str]:
    """Return the ids of the spaces that an encoder fills; no shard is opened.

    Raises:
        MismatchError: there is none; the message names the fields in which the encoder specs differ.
    """
    found, differing = [], set()
    for space_id in cache.space_ids:
        stored = cache.spec(space_id)
        if stored.get("role") not in {"prompt", "response"}:
            continue
        role: Role = "prompt" if stored["role"] == "prompt" else "response"
        spec = full_spec(encoder, role, EmbedConfig(dtype=stored["dtype"]))
        if digest(spec) == space_id:
            found.append(space_id)
        else:
            differing |= set(differing_fields(spec, stored))
    if not found:
        raise MismatchError(
            f"No space of {cache.path} was written by the encoder {encoder.about.get('model')}: they differ in "
            f"{', '.join(sorted(differing)) or 'everything'}; name the right one with --model and --compute-dtype."
        )
    return found


def _texts(cache: Cache, space: Space, role: Role) -> tuple[pa.Array, Keys]:
    """Return the distinct texts of all tables that have a row in a space, and their keys."""
    tables: list[Comparisons] = [cache.comparisons(name).comparisons for name in cache.comparison_names]
    parts = [table.prompts.values if role == "prompt" else table.responses for table in tables]
    texts = pa.concat_arrays([*parts, pa.array([], pa.large_string())])
    keys = text_keys(texts)
    first = np.sort(KeyIndex.build(keys).positions)
    first = first[space.find(keys[first]) >= 0]
    return texts.take(pa.array(first)), keys[first]
