"""Vectors of prompt and response in one forward, which PAL-A reads: from a cache to batches on a device."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from palcache.cache import Cache, spaces_of
from palcache.choices import EMBED_JOINT
from palcache.comparison_files import StoredComparisons
from palcache.devices import free_memory, resolve_device
from palcache.errors import MismatchError
from palcache.fingerprints import KEY_BYTES, content_key
from palcache.tensors import MEMORY_SHARE, PreferenceData, VectorTable, load_preferences


def joint_space_of(cache: Cache, stored: StoredComparisons, space: str | None = None) -> str:
    """Return the id of the joint space of the encoder that a table is embedded by.

    Args:
        cache: the cache.
        stored: a comparison table of it.
        space: which encoder's vectors, where the table has several.

    Raises:
        MismatchError: there is none; the message names the command that makes it.
    """
    prompt_id, _ = spaces_of(stored, space, cache)
    model = cache.about(prompt_id).get("model")
    found = [
        space_id
        for space_id in cache.space_ids
        if cache.space(space_id).role == "joint" and cache.about(space_id).get("model") == model
    ]
    if not found:
        raise MismatchError(
            f"PAL-A reads vectors of prompt and response in one forward, and {cache.path} has none of {model} for the "
            f"table {stored.name}; make them with {EMBED_JOINT}."
        )
    return found[-1]


def load_joint_preferences(
    cache: Cache, stored: StoredComparisons, *, space: str | None = None, device: str = "auto"
) -> PreferenceData:
    """Return a table's comparisons with the joint vectors of their prompts and responses on a device.

    Args:
        cache: the cache.
        stored: a comparison table of it.
        space: which encoder's vectors, where the table has several.
        device: `auto`, `cpu`, `cuda`, `mps`.

    Raises:
        MismatchError: there are no joint vectors, or not of all comparisons.
        NumericsError: a vector is not finite.
    """
    joint, where = cache.space(joint_space_of(cache, stored, space)), resolve_device(device)
    table = stored.comparisons
    prompt = table.prompts.codes.astype(np.int64)
    sides = [side.astype(np.int64) for side in (table.response_1, table.response_2)]
    width = len(table.responses)
    pairs, inverse = np.unique(np.concatenate([prompt * width + side for side in sides]), return_inverse=True)
    prompts, responses = table.prompts.values.to_pylist(), table.responses.to_pylist()
    texts = ((prompts[pair // width], responses[pair % width]) for pair in pairs.tolist())
    keys = b"".join(content_key("joint", [text.encode() for text in pair]) for pair in texts)
    rows = joint.find(np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES))
    if missing := int((rows < 0).sum()):
        raise MismatchError(
            f"{missing} of {len(rows)} prompts with responses of the table {stored.name} have no joint vector in "
            f"{cache.path}; make them with {EMBED_JOINT}."
        )
    resident = 4 * len(rows) * joint.width <= MEMORY_SHARE * free_memory(where)
    vectors = VectorTable(joint, rows, where, resident=resident)
    index = torch.from_numpy(inverse.reshape(2, -1)).to(where)
    base = load_preferences(cache, stored, space=space, device=device)
    return replace(
        base,
        prompts=vectors,
        responses=vectors,
        prompt=torch.zeros_like(base.prompt),
        response_1=index[0],
        response_2=index[1],
        joint=True,
    )
