"""`python -m benchmarks [names] [--quick] [--out DIR]`: run benchmarks and keep their rows in the machine's file."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, cast

from benchmarks.measuring import Machine
from benchmarks.results import Row, as_page, as_table, merged, read_rows, row, write_page
from palcache.errors import PalcacheWarning

NAMES: Final = ("encode", "states", "repeats", "plan", "read", "train", "sweep", "adapt", "memory", "accuracy")
RESULTS: Final = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks named; return 1 if one of them failed to run."""
    options = _parse(arguments)
    machine = Machine.here()
    path = _out(options) / f"{machine.slug}.md"
    about = _about(options)
    warnings.simplefilter("ignore", PalcacheWarning)
    rows: list[Row] = []
    failed = False
    for name in options.names or NAMES:
        start = time.perf_counter()
        try:
            new = run(name, quick=options.quick)
        except Exception as error:
            traceback.print_exc()
            failed = True
            new = [
                row(name, "-", "-", against="-", goal="-").with_verdict(
                    False, f"failed: {type(error).__name__}: {error}"
                )
            ]
        rows += new
        write_page(path, as_page(machine, merged(read_rows(path), new, NAMES), about=about))
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(as_table(rows), end="")
    for noted in rows:
        if noted.note:
            print(f"- {noted.title}: {noted.note}")
    print(f"written to {path}", file=sys.stderr)
    return int(failed)


def run(name: str, *, quick: bool) -> list[Row]:
    """Run one benchmark."""
    module = importlib.import_module(f"benchmarks.{name}")
    return cast("Callable[[bool], list[Row]]", module.run)(quick)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run palcache's benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(NAMES)}; all by default")
    parser.add_argument("--quick", action="store_true", help="a smoke test of seconds; its figures mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the results; benchmarks/results, or .bench with --quick")
    parser.add_argument("--date", help="a date to stand in the file")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    return options


def _out(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return Path(options.out)
    return RESULTS.parents[1] / ".bench" if options.quick else RESULTS


def _about(options: argparse.Namespace) -> list[str]:
    load = f"Load of the machine before the last run (1 minute): {os.getloadavg()[0]:.1f}."
    date = [f"Date: {options.date}."] if options.date else []
    return [*date, load, *(["**A smoke test (`--quick`): these figures mean nothing.**"] if options.quick else [])]


if __name__ == "__main__":
    sys.exit(main())
