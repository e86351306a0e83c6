"""`palcache report`: one page about a run or a sweep."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .display import print_json, say
from .failures import reports_errors
from .options import JsonOption


@reports_errors
def report(
    folder: Annotated[
        Path, typer.Argument(help="A run folder, a sweep folder or a folder of runs.", show_default=False)
    ],
    *,
    out: Annotated[Path, typer.Option(help="The page to be written.", show_default=False)],
    json_: JsonOption = False,
) -> None:
    """Write one self-contained HTML page about a run or a sweep; it opens without a network."""
    from palcache.pages.pages import write_page

    start = time.perf_counter()
    write_page(folder, out)
    size, seconds = out.stat().st_size, time.perf_counter() - start
    if json_:
        print_json({"page": str(out), "bytes": size, "seconds": seconds})
    else:
        say(f"wrote {out} ({size / 1e6:.1f} MB) in {seconds:.1f} s")
