"""Make the golden cache of hidden states of this format version, once: `python -m tests.golden.make_golden_states`.

It holds what the first one lacks: token states with their ids and offsets, joint items with states at the prompt's end,
int8 with its scales, and the sampled cosines.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Final

from palcache.cache import VERSION, Cache
from palcache.configs import EmbedConfig
from palcache.embedding.encoding import embed_comparisons
from tests.golden.make_golden import HERE, golden_table
from tests.state_stubs import StubStateEncoder

CONFIGS: Final[dict[str, EmbedConfig]] = {
    "joint-int8": EmbedConfig(dtype="int8", items="joint", tokens="responses", shard_rows=4),
    "joint-float16": EmbedConfig(dtype="float16", items="joint", tokens="all", shard_rows=4),
    "tokens-bfloat16": EmbedConfig(dtype="bfloat16", tokens="responses", shard_rows=4),
}


def golden_states(name: str) -> StubStateEncoder:
    """Return the encoder that filled the golden spaces of a configuration."""
    return StubStateEncoder(width=3, identity=f"golden-{name}")


def main() -> None:
    """Write the golden cache of this version; one that is there is left alone."""
    folder = HERE / f"states-v{VERSION}"
    if folder.with_name(f"{folder.name}.tar.xz").exists():
        sys.exit(f"{folder} is there and is never made again.")
    for name, config in CONFIGS.items():
        embed_comparisons(golden_table(), golden_states(name), Cache.create(folder), name="golden", config=config)
    for lock in [*folder.rglob(".lock"), *folder.rglob(".writers")]:
        lock.unlink()
    packed = shutil.make_archive(str(folder), "xztar", folder)
    print(json.dumps({"bytes": Path(packed).stat().st_size}))  # noqa: T201
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
