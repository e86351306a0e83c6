"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from palcache.configs import EncoderKind, Pooling, StoredDtype, UnknownUsers
from palcache.errors import InputError

CacheArgument = Annotated[Path, typer.Argument(help="The cache folder.", show_default=False)]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
SpacesCacheOption = Annotated[Path, typer.Option("--cache", help="The cache folder.", show_default=False)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ComparisonsOption = Annotated[
    str | None, typer.Option(help="Name of the comparison table; a cache with one needs none.", show_default=False)
]
MadeCacheOption = Annotated[
    Path, typer.Option("--cache", help="The cache folder, made where it is missing.", show_default=False)
]
TableNameOption = Annotated[
    str | None,
    typer.Option(help="Name of the table in the cache.  [default: the first file's]", show_default=False),
]
ValOption = Annotated[float, typer.Option(help="Share of the units for validation.")]
TestOption = Annotated[float, typer.Option(help="Share of the units for testing.")]
SplitSeedOption = Annotated[int, typer.Option(help="Of the split and of the sides of chosen and rejected.")]
StoredDtypeOption = Annotated[StoredDtype, typer.Option(help="Type of the stored vectors.")]
LogOption = Annotated[
    list[str] | None,
    typer.Option(help="Log to tensorboard or wandb as well, in RUN/logs; may be repeated.", show_default=False),
]
UnknownUsersOption = Annotated[
    UnknownUsers, typer.Option(help="Users the head does not know: refuse, score with the mean mixture, or drop.")
]

RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model run its own code.")]
TruncateDimOption = Annotated[
    int | None,
    typer.Option(
        help="Keep this many values of a vector (sentence-transformers).  [default: the model's]", show_default=False
    ),
]
EncoderOption = Annotated[
    EncoderKind,
    typer.Option(
        help="sentence (sentence-transformers), hidden (hidden states); auto: sentence if modules.json is there."
    ),
]
PoolingOption = Annotated[
    Pooling, typer.Option(help="Of hidden states: last, mean or cls (first) token; auto: last if causal, else mean.")
]
LayerOption = Annotated[int, typer.Option(help="Of hidden states: 0 is the embeddings, -1 the last layer.")]
PromptTemplateOption = Annotated[str, typer.Option(help="Around a prompt, e.g. 'Human: {text} Assistant:'.")]
ResponseTemplateOption = Annotated[str, typer.Option(help="Around a response.")]
ChatTemplateOption = Annotated[
    bool, typer.Option("--chat-template", help="Write prompts, and joint items, by the tokenizer's chat template.")
]
AttnOption = Annotated[
    str | None,
    typer.Option(help="Attention: sdpa, eager, flash_attention_2, ...  [default: the model's]", show_default=False),
]


def parse_pairs(pairs: list[str] | None, option: str) -> dict[str, str]:
    """Return `["user_id=worker"]` as `{"user_id": "worker"}`.

    Raises:
        InputError: a pair has no equals sign.
    """
    out = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"Got {option} {pair!r}; expected NAME=COLUMN, for example {option} user_id=worker.")
        out[name] = value
    return out
