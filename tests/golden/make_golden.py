"""Make the golden cache of this format version, once: `python -m tests.golden.make_golden`.

Golden caches are kept for ever and never made again: a palcache that cannot read one has broken its promise.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from palcache.cache import VERSION, Cache
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, StoredDtype
from palcache.embedding.encoding import embed_comparisons
from tests.stubs import StubEncoder

HERE = Path(__file__).parent
ROWS = [
    ("ann", "ask one", "say a", "say b", -1, "train"),
    ("ann", "ask two with more words", "say c", "say a", 1, "train"),
    ("böb", "ask one", "say b", "säy d ✓", 1, "val"),
    ("böb", "ask two with more words", "say c " * 9, "say b", -1, "test"),
    ("cat", "ask one", "say a", "say c", 1, "test"),
]
NAMES = ("user_id", "prompt", "response_1", "response_2", "y", "split")
DTYPES: tuple[StoredDtype, ...] = ("float32", "float16", "bfloat16")


def golden_table() -> Comparisons:
    """Return the comparisons of every golden cache."""
    return Comparisons.from_rows([dict(zip(NAMES, row, strict=True)) for row in ROWS])


def golden_encoder(dtype: StoredDtype) -> StubEncoder:
    """Return the encoder that filled the golden spaces of a stored type."""
    return StubEncoder(width=3, identity=f"golden-{dtype}", batch_sensitive=False)


def main() -> None:
    """Write the golden cache of this version; one that is there is left alone."""
    folder = HERE / f"v{VERSION}"
    if folder.with_name(f"{folder.name}.tar.xz").exists():
        sys.exit(f"{folder} is there and is never made again.")
    for dtype in DTYPES:
        config = EmbedConfig(dtype=dtype, shard_rows=4)
        embed_comparisons(golden_table(), golden_encoder(dtype), Cache.create(folder), name="golden", config=config)
    for lock in [*folder.rglob(".lock"), *folder.rglob(".writers")]:
        lock.unlink()
    packed = shutil.make_archive(str(folder), "xztar", folder)
    print(json.dumps({"bytes": Path(packed).stat().st_size}))  # noqa: T201
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
