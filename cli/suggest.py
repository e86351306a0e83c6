"""`palcache suggest`: what to ask a user next."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .display import print_json, print_table
from .failures import reports_errors
from .options import DeviceOption, JsonOption, RunArgument, SpacesCacheOption


@reports_errors
def suggest(
    run: RunArgument,
    *,
    cache: SpacesCacheOption,
    comparisons: Annotated[
        str, typer.Option(help="The pool: a table of the cache, or a file; answers are not read.", show_default=False)
    ],
    user: Annotated[
        str | None, typer.Option(help="A user of the run, or of --support.  [default: someone new]", show_default=False)
    ] = None,
    support: Annotated[
        str | None,
        typer.Option(help="What the user has answered: a table of the cache, or a file.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(help="How many comparisons.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the draws from the user's posterior.")] = 0,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Suggest the comparisons whose answers would tell most about a user, by expected Fisher information."""
    from palcache.cache import Cache
    from palcache.runs.seen_users import suggest_run

    found = suggest_run(
        run, Cache(cache), comparisons, user=user, support=support, count=count, seed=seed, device=device
    )
    if json_:
        print_json({"run": str(run), "user": user, "suggestions": [asdict(question) for question in found]})
        return
    print_table(
        f"ask {user or 'a new user'} next; gain in nats of information",
        ("gain", "row", "prompt", "response 1", "response 2"),
        [
            [f"{q.gain:.3f}", str(q.row), *(_short(text) for text in (q.prompt, q.response_1, q.response_2))]
            for q in found
        ],
    )


def _short(text: str, width: int = 30) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."
