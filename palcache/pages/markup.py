"""HTML of a page, piece by piece: every text is escaped here and nowhere else, and the page reaches for nothing outside.

Its policy (Content-Security-Policy) lets only the page's own scripts run, by their digests, and no request leave: even a
text that were not escaped would be inert.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from palcache.errors import PalcacheError

Html = str
"""Escaped already."""


def element(tag: str, content: Html = "", **attributes: str) -> Html:
    """Return an element; attributes are escaped, `class_` and `data_x` become `class` and `data-x`."""
    named = "".join(f' {name.rstrip("_").replace("_", "-")}="{escape(value)}"' for name, value in attributes.items())
    return f"<{tag}{named}>{content}</{tag}>"


def text(value: object) -> Html:
    """Return a value as escaped text."""
    return escape(str(value))


def paragraph(words: str, kind: str = "note") -> Html:
    """Return a paragraph of text."""
    return element("p", text(words), class_=kind)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    texts: int = 1,
    best: Sequence[int] = (),
    sortable: bool = False,
) -> Html:
    """Return a table.

    Args:
        columns: headings.
        rows: cells.
        texts: the first so many columns are text, the others numbers.
        best: rows that are set off.
        sortable: a click on a heading sorts.
    """

    def kind(at: int) -> dict[str, str]:
        return {"class_": "text"} if at < texts else {}

    more = {"data_sort": "yes"} if sortable else {}
    head = "".join(element("th", text(name), scope="col", **kind(i), **more) for i, name in enumerate(columns))
    body = "".join(
        element(
            "tr",
            "".join(element("td", text(cell), **kind(i)) for i, cell in enumerate(row)),
            **({"class_": "best"} if at in best else {}),
        )
        for at, row in enumerate(rows)
    )
    whole = element("table", element("thead", element("tr", head)) + element("tbody", body))
    return element("div", whole, class_="scroll tall" if sortable else "scroll", tabindex="0")


def figure(chart: str, title: str, caption: str = "", *, fallback: Html = "", wide: bool = False) -> Html:
    """Return a titled place for a chart.

    Args:
        chart: its name among the page's charts.
        title: heading.
        caption: what is shown and how it is meant.
        fallback: a table of the same numbers, folded away.
        wide: across both columns.
    """
    head = element("h3", text(title), id=f"{chart}-title") + (paragraph(caption) if caption else "")
    folded = element("details", element("summary", "As a table") + fallback) if fallback else ""
    place = element("div", class_="chart", data_chart=chart)
    more = {"class_": "wide"} if wide else {}
    content = element("figcaption", head) + place + folded
    return element("figure", content, role="group", aria_labelledby=f"{chart}-title", **more)


def facts(title: str, values: Mapping[str, object]) -> Html:
    """Return names and values under a heading."""
    rows = "".join(element("dt", text(name)) + element("dd", text(value)) for name, value in values.items())
    return element("div", element("h3", text(title)) + element("dl", rows))


def section(title: str, *content: Html, lead: str = "") -> Html:
    """Return a section with a heading."""
    return element("section", element("h2", text(title)) + (paragraph(lead) if lead else "") + "".join(content))


def document(title: str, content: Html, charts: Mapping[str, Any], config: Mapping[str, Any]) -> bytes:
    """Return a whole page that opens without a network; the same content gives the same bytes.

    Args:
        title: of the window.
        content: the page, with `figure` places for the charts.
        charts: Vega-Lite specifications by name.
        config: that they share.

    Raises:
        PalcacheError: the package that brings the charts' code is not installed.
    """
    assets = files("palcache.pages") / "assets"
    style, script = ((assets / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    scripts = [_library(), script]
    digests = " ".join(f"'sha256-{_digest(source)}'" for source in scripts)
    policy = f"default-src 'none'; script-src 'unsafe-eval' {digests}; style-src 'unsafe-inline'; img-src data:"
    # A data block ends at its first "</script", which JSON can spell otherwise.
    data = json.dumps({"config": config, "charts": charts}, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    head = "\n".join(
        (
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            element("title", text(title)),
            f"<style>{style}</style>",
        )
    )
    body = "\n".join(
        (
            element("main", content, class_="page"),
            '<div id="tip" role="tooltip"></div>',
            "<noscript><p>The charts need JavaScript; the tables below them do not.</p></noscript>",
            f'<script type="application/json" id="charts">{data}</script>',
            *(f"<script>{source}</script>" for source in scripts),
        )
    )
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'.encode()


def _library() -> str:
    """Return the code of Vega-Embed, Vega and Vega-Lite, from the package that holds it."""
    try:
        import vl_convert
    except ImportError as error:
        raise PalcacheError(
            "The page's charts need the package vl-convert-python; install it: pip install 'palcache[report]'."
        ) from error
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
