"""The datasets of a shard: their names, types and shapes, and which of them have sums.

`docs/format.md` describes every one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from palcache.configs import StoredDtype
from palcache.fingerprints import KEY_BYTES

BLOCK_ROWS: Final = 4_096
FILE_DTYPES: Final[Mapping[StoredDtype, str]] = MappingProxyType(
    {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "int8": "|i1"}
)
POOLED: Final = "emb/pooled"
PROMPT: Final = "emb/prompt"
TOKENS: Final = "tok/values"
SCALES: Final[Mapping[str, str]] = MappingProxyType(
    {POOLED: "scale/pooled", PROMPT: "scale/prompt", TOKENS: "scale/tok"}
)
"""Where the scales of int8 vectors stand, one a row: a value is its byte times the scale."""
COSINE: Final = "cosine"
SAMPLED_ROWS: Final = 256
"""Rows of a shard whose cosine to the float32 vector is recorded, at most."""
SUMMED: Final = (POOLED, "norm", "key", "n_tokens", "flags")
"""The datasets of every shard that have a sum per `BLOCK_ROWS` rows."""
_MORE: Final = (PROMPT, *SCALES.values(), "n_prompt", TOKENS, "tok/offsets", "tok/ids", COSINE)
"""The datasets that some shards have, with a sum each."""
TOKEN_SHARD_BYTES: Final = 1 << 30
"""Token states that a shard should hold at most; writers go by an estimate from the lengths of its texts."""
Array = npt.NDArray[Any]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """What a shard says of itself.

    Attributes:
        space_id: digest of the encoder spec.
        spec: everything that changes the meaning of a vector.
        rows: number of rows, N.
        width: number of values in a vector, d.
        dtype: type of the stored vectors.
        versions: libraries and device that wrote the shard.
    """

    space_id: str
    spec: Mapping[str, Any]
    rows: int
    width: int
    dtype: StoredDtype
    versions: Mapping[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Which tokens of a shard's rows have their states kept.

    Attributes:
        offsets: where each row's tokens begin, (N + 1,) int64.
        ids: their token ids, (T,) uint32.
    """

    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.uint32]


def data_nbytes(header: ShardHeader, tokens: int | None) -> int:
    """Return the bytes of a shard's datasets; `tokens` is the number of kept states, None where none are kept."""
    shapes = dataset_shapes(header, tokens).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in shapes)


def dataset_shapes(header: ShardHeader, tokens: int | None) -> dict[str, tuple[str, Shape]]:
    """Return type and shape of a shard's datasets; `tokens` is the number T of kept states, None where none are kept."""
    n, vectors = header.rows, FILE_DTYPES[header.dtype]
    shapes: dict[str, tuple[str, Shape]] = {
        POOLED: (vectors, (n, header.width)),
        "norm": ("<f4", (n,)),
        "key": ("|u1", (n, KEY_BYTES)),
        "n_tokens": ("<u4", (n,)),
        "flags": ("|u1", (n,)),
        "done": ("|u1", (n,)),
        "sealed": ("|u1", (1,)),
    }
    if header.spec.get("prompt_state"):
        shapes[PROMPT] = shapes[POOLED]
    if header.spec.get("role") == "joint":
        shapes["n_prompt"] = shapes["n_tokens"]
    if tokens is not None:
        shapes |= {
            TOKENS: (vectors, (tokens, header.width)),
            "tok/offsets": ("<i8", (n + 1,)),
            "tok/ids": ("<u4", (tokens,)),
        }
    if header.dtype == "int8":
        shapes |= {SCALES[name]: ("<f4", shapes[name][1][:1]) for name in (POOLED, PROMPT, TOKENS) if name in shapes}
    if header.dtype != "float32":
        shapes[COSINE] = ("<f4", (len(sampled_rows(n)),))
    summed = [name for name in (*SUMMED, *_MORE) if name in shapes]
    return shapes | {sum_name(name): ("<u8", (-(-shapes[name][1][0] // BLOCK_ROWS),)) for name in summed}


def summed_in(arrays: Mapping[str, Array]) -> tuple[str, ...]:
    """Return the datasets of a shard that have sums, in a fixed order."""
    return (*SUMMED, *(name for name in _MORE if name in arrays))


def sampled_rows(rows: int) -> npt.NDArray[np.int64]:
    """Return the rows of a shard whose cosine to the float32 vector is recorded, evenly over it, ascending."""
    return np.arange(min(rows, SAMPLED_ROWS)) * rows // max(1, min(rows, SAMPLED_ROWS))


def sum_name(dataset: str) -> str:
    """Return the name of the dataset that holds a dataset's sums."""
    return "sum/" + dataset.replace("/", ".")
