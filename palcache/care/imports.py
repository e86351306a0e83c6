"""Vectors from elsewhere into a cache: no model runs, and everything after that is as if one had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from palcache.cache import Cache
from palcache.care.vectors import NamedVectors, require_ids
from palcache.comparisons import Comparisons, Ties
from palcache.configs import EmbedConfig, SplitConfig, StoredDtype
from palcache.embedding.encoding import embed_comparisons, full_spec
from palcache.embedding.summaries import EmbedSummary, OnProgress
from palcache.encoders import Role, TokenizedTexts
from palcache.errors import InputError, MismatchError
from palcache.fingerprints import digest, text_keys
from palcache.splits import split_comparisons
from palcache.tables import read_comparisons

SAME: Final = 0.02
"""Distance over norm up to which a vector that is imported again counts as the stored one; rounding stays below it."""
BLOCK_ROWS: Final = 16_384


def import_vectors(  # noqa: PLR0913 - keyword-only options
    tables: Sequence[Path] | Comparisons,
    cache: Path,
    *,
    prompts: NamedVectors,
    responses: NamedVectors,
    model: str,
    name: str | None = None,
    dtype: StoredDtype = "float16",
    split: SplitConfig | None = None,
    columns: Mapping[str, str] | None = None,
    ties: Ties = "refuse",
    on_progress: OnProgress | None = None,
) -> EmbedSummary:
    """Store a table whose texts are ids, and the vectors that it names.

    Vectors that no table names are left out; ids that the cache has are not stored again.

    Args:
        tables: files of comparisons, or comparisons at hand; prompt, response_1 and response_2 hold ids.
        cache: the folder, made where it is missing.
        prompts: vectors of the prompts.
        responses: vectors of the responses; may be the same as of the prompts.
        model: a name for whatever made the vectors: it identifies the spaces, so another model needs another name.
        name: of the table in the cache; by default the first file's name without its ending.
        dtype: type of the stored vectors.
        split: how to divide the comparisons.
        columns: palcache's name of a column -> the files' name of it.
        ties: what to do with y = 0.
        on_progress: called after each batch.

    Raises:
        InputError: an id has no vector, widths differ, or a table or option is not what was expected.
        MismatchError: the cache has another vector for an id.
        NumericsError: a vector does not fit the stored type.
        StorageError: the disk is full or read-only.
    """
    split = split or SplitConfig()
    if not model:
        raise InputError(
            "Got an empty model name; expected a name for whatever made the vectors: give one with --model."
        )
    if isinstance(tables, Comparisons):
        comparisons, name = tables, name or "comparisons"
    else:
        comparisons = read_comparisons(tables, columns=columns, ties=ties, seed=split.seed)
        name = name or tables[0].stem
    comparisons = split_comparisons(comparisons, split)
    require_ids(prompts, comparisons.prompts.values, ["prompt"])
    require_ids(responses, comparisons.responses, ["response_1", "response_2"])
    encoder, config = VectorEncoder(model, prompts, responses), EmbedConfig(dtype=dtype)
    opened = Cache.create(cache)
    _require_same(opened, full_spec(encoder, "prompt", config), prompts, comparisons.prompts.values)
    _require_same(opened, full_spec(encoder, "response", config), responses, comparisons.responses)
    return embed_comparisons(
        comparisons,
        encoder,
        opened,
        name=name,
        config=config,
        about={"split": split.to_dict(), "ties": ties, "imported": True},
        on_progress=on_progress,
    )


def _require_same(cache: Cache, spec: Mapping[str, Any], vectors: NamedVectors, ids: pa.Array) -> None:
    """Refuse vectors that are not those which the cache has for the same ids.

    Raises:
        MismatchError: one is another; the first one is named.
    """
    if digest(spec) not in cache.space_ids:
        return
    space = cache.space(digest(spec))
    rows = space.find(text_keys(ids))
    for at in np.array_split(np.flatnonzero(rows >= 0), 1 + len(rows) // BLOCK_ROWS):
        given = vectors.values[torch.from_numpy(vectors.find(ids.take(pa.array(at))))].float()
        distance = torch.linalg.vector_norm(given - space.rows(rows[at]).float(), dim=1)
        other = distance > SAME * torch.linalg.vector_norm(given, dim=1) + 1e-6
        if bool(other.any()):
            first = ids[int(at[int(torch.nonzero(other)[0])])].as_py()
            raise MismatchError(
                f"{int(other.sum())} ids have another vector in {cache.path} than in {vectors.origin} (the first is "
                f"{first[:80]!r}); name what made the new ones with another --model."
            )


@final
class VectorEncoder:
    """Hands out vectors by id, so that they are claimed, stored, sealed and resumed like encoded ones.

    Args:
        model: the name that identifies the vectors.
        prompts: vectors of the prompts.
        responses: vectors of the responses.

    Raises:
        InputError: prompts and responses have different widths.
    """

    token_budget = 1 << 16
    workers = 1
    equal_lengths = False

    def __init__(self, model: str, prompts: NamedVectors, responses: NamedVectors) -> None:
        if prompts.width != responses.width:
            raise InputError(
                f"The vectors of prompts ({prompts.origin}) have {prompts.width} values and those of responses "
                f"({responses.origin}) {responses.width}; expected one width."
            )
        self._model = model
        self._vectors: dict[Role, NamedVectors] = {"prompt": prompts, "response": responses}

    @property
    def about(self) -> Mapping[str, Any]:
        """The name that was given."""
        return {"model": self._model, "revision": None}

    @property
    def versions(self) -> Mapping[str, str]:
        """Nothing computed these vectors here."""
        return {"device": "none"}

    @property
    def width(self) -> int:
        """Number of values in a vector, d."""
        return self._vectors["prompt"].width

    def spec(self, role: Role) -> dict[str, Any]:  # noqa: ARG002 - the protocol's
        """Return what identifies the vectors: the name that was given."""
        return {"encoder": "imported", "model": self._model, "compute_dtype": "float32"}

    def tokenize(self, texts: Sequence[str], role: Role) -> TokenizedTexts:  # noqa: ARG002 - the protocol's
        """Count each id as one token."""
        ones, none = np.ones(len(texts), np.uint32), np.zeros(len(texts), bool)
        return TokenizedTexts(texts, ones, none, np.arange(len(texts) + 1), {})

    def encode(self, window: TokenizedTexts, rows: npt.NDArray[np.int64], role: Role) -> torch.Tensor:
        """Return the vectors of some ids, (m, d) float32."""
        vectors = self._vectors[role]
        found = vectors.find(pa.array([window.texts[row] for row in rows], pa.large_string()))
        return vectors.values[torch.from_numpy(found)].float()
