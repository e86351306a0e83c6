"""One page about a run or about several: everything in one file that opens without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from palcache.contrasts import contrast_records
from palcache.files import write_bytes
from palcache.pages.chart_parts import CONFIG
from palcache.pages.markup import Html, document, element, paragraph, section, text
from palcache.pages.page_figures import ChartBook
from palcache.pages.run_sections import run_sections, run_title
from palcache.pages.run_views import view_run
from palcache.pages.sweep_sections import new_users_section, sweep_sections
from palcache.runs.records import RunRecord, read_records

NEW_USERS: Final = "new_users.csv"
"""What a sweep with new users leaves in its folder."""


def write_page(path: Path, out: Path) -> None:
    """Write one self-contained page about a run folder, a sweep folder or a folder of runs.

    The same runs give the same bytes. The page needs no network and lets nothing in a run's texts run as code.

    Args:
        path: the folder.
        out: the page; an older one is replaced.

    Raises:
        InputError: there is no finished run.
        CacheError: a file of a run is damaged.
        PalcacheError: the package that brings the charts' code is not installed.

    Warns:
        PalcacheWarning: a run of several is left out.
    """
    write_bytes(out, run_page(path) if (path / "config.json").is_file() else sweep_page(path))


def run_page(path: Path) -> bytes:
    """Return the page of a run folder; raises as `write_page` does."""
    view, book = view_run(path), ChartBook()
    title = run_title(view)
    lead = f"Run {view.name}, palcache {view.config['versions']['palcache']}"
    return document(title, _header(title, lead) + run_sections(view, book), book.specs, CONFIG)


def sweep_page(path: Path) -> bytes:
    """Return the page of several runs: side by side, and then the one of the lowest validation loss in detail."""
    records, book = read_records([path]), ChartBook()
    title = f"{path.resolve().name}: {len(records)} heads"
    tables = ", ".join(dict.fromkeys(str(record.options["table"]) for record in records))
    content = _header(title, f"On {tables}") + sweep_sections(records, contrast_records(records), book)
    content += new_users_section(path / NEW_USERS, book)
    view = view_run(min(records, key=_validation_loss).path)
    lead = f"{view.name} ({run_title(view)}) has the lowest validation loss of all."
    content += section("The best run on validation", lead=lead) + run_sections(view, book)
    return document(title, content, book.specs, CONFIG)


def _validation_loss(record: RunRecord) -> float:
    loss = record.evaluations["val"]["head"].log_loss
    return float("inf") if loss is None else loss


def _header(title: str, lead: str) -> Html:
    words = element("h1", text(title)) + paragraph(lead, "lead")
    return element("header", element("div", words) + element("button", "", id="theme", type="button"))
