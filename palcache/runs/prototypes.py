"""`prototypes.json`: what sets a head's prototypes apart, in comparisons that people can read.

A prototype alone is a mixture with all weight on it. Its *lead* on a comparison is by how much its margin exceeds the mean
of the other prototypes' margins, in favour of the response that it prefers: the comparisons of the largest leads are those
that it decides most strongly, and the others do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self, final

import numpy as np
import torch
import torch.nn.functional as F

from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.errors import CacheError
from palcache.evaluation import BATCH_ROWS
from palcache.files import read_json, write_json
from palcache.heads import BradleyTerry, Head, IdealPointHead, PerUser
from palcache.metrics import Array, Codes
from palcache.pairs import pair_codes
from palcache.runs.inputs import RunSplit
from palcache.tensors import PreferenceData

FORMAT: Final = "palcache-prototypes"
VERSION: Final = 1
PROTOTYPES: Final = "prototypes.json"
SHOWN: Final = 6
"""Comparisons that are kept of each prototype."""
EXAMINED: Final = 20_000
"""Comparisons that are looked at, at most; more are thinned evenly."""
CLIPPED: Final = 600
"""Characters that are kept of a text."""
Matrix = tuple[tuple[float, ...], ...]


@final
@dataclass(frozen=True, slots=True)
class Decision:
    """A comparison that a prototype decides.

    Attributes:
        row: in the table.
        prompt: text, clipped.
        preferred: the response that the prototype prefers, clipped.
        other: the other response, clipped.
        margins: r(preferred) - r(other) of every prototype alone, (k,).
        lead: by how much this prototype's margin exceeds the mean of the others'; its margin where it is the only one.
    """

    row: int
    prompt: str
    preferred: str
    other: str
    margins: tuple[float, ...]
    lead: float


@final
@dataclass(frozen=True, slots=True)
class Prototypes:
    """What a head's k prototypes do, each alone.

    Attributes:
        examined: comparisons that were looked at.
        decisions: of each prototype, those of the largest lead, one per pair of responses.
        agreement: share of comparisons on which two prototypes prefer the same response, (k, k).
        cosine: mean cosine of two prototypes' ideal points over the comparisons, (k, k); None for heads without them.
    """

    examined: int
    decisions: tuple[tuple[Decision, ...], ...]
    agreement: Matrix
    cosine: Matrix | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build it from what `to_dict` returned."""
        decisions = tuple(
            tuple(Decision(**{**found, "margins": tuple(found["margins"])}) for found in of_one)
            for of_one in values["decisions"]
        )
        cosine = None if values["cosine"] is None else _matrix(values["cosine"])
        return cls(values["examined"], decisions, _matrix(values["agreement"]), cosine)


def has_prototypes(shape: Head) -> bool:
    """Return whether a head's users are mixtures of something shared."""
    return not isinstance(shape, BradleyTerry | PerUser)


@torch.no_grad()
def describe_prototypes(head: TrainedHead, split: RunSplit) -> Prototypes:
    """Return what the prototypes of a head (one of `has_prototypes`) do on held-out comparisons."""
    n = len(split.rows)
    kept = np.unique(np.linspace(0, n - 1, min(n, EXAMINED)).astype(np.int64))
    data, comparisons, rows = split.served.take(kept), split.comparisons.take(kept), split.rows[kept]
    margins, cosine = _alone(head.to(data.device), data)
    same = [[float((np.sign(one) == np.sign(other)).mean()) for other in margins.T] for one in margins.T]
    decisions = tuple(_decisions(j, margins, comparisons, rows) for j in range(margins.shape[1]))
    return Prototypes(len(rows), decisions, _matrix(same), cosine)


def _alone(head: TrainedHead, data: PreferenceData) -> tuple[Array, Matrix | None]:
    """Return the margins of every prototype alone, (n, k), and the mean cosines of their ideal points."""
    shape, parameters, k = head.shape, head.parameters, head.shape.k
    margins, cosines = [], torch.zeros(k, k, dtype=torch.float64)
    for batch in data.batches(BATCH_ROWS):
        mixtures = torch.eye(k, device=data.device).unsqueeze(1).expand(k, len(batch.y), k)
        if isinstance(shape, IdealPointHead):
            points = [shape.points(parameters, batch, mixtures=alone) for alone in mixtures]
            margins.append(torch.stack([shape.compare(parameters, *found) for found in points], 1))
            ideal = F.normalize(torch.stack([found[2] for found in points]).double(), dim=-1).cpu()
            cosines += torch.einsum("inp,jnp->ij", ideal, ideal)
        else:
            margins.append(torch.stack([shape.margins(parameters, batch, mixtures=alone) for alone in mixtures], 1))
    found = torch.cat(margins).double().cpu().numpy()
    return found, _matrix((cosines / len(data)).tolist()) if isinstance(shape, IdealPointHead) else None


def leads(margins: Array, prototype: int) -> Array:
    """Return the lead of a prototype on each comparison, (n, k) -> (n,)."""
    own = margins[:, prototype]
    others = np.delete(margins, prototype, axis=1)
    if not others.shape[1]:
        return np.abs(own)
    return np.asarray(np.sign(own) * (own - others.mean(1)), np.float64)


def _decisions(prototype: int, margins: Array, comparisons: Comparisons, rows: Codes) -> tuple[Decision, ...]:
    lead = leads(margins, prototype)
    order = np.argsort(-lead, kind="stable")
    _, first = np.unique(pair_codes(comparisons)[order], return_index=True)
    chosen = order[np.sort(first)[:SHOWN]]
    prompts, responses = comparisons.prompts.values, comparisons.responses
    out = []
    for at in chosen.tolist():
        sides = [responses[int(code[at])].as_py() for code in (comparisons.response_1, comparisons.response_2)]
        sign = 1.0 if margins[at, prototype] >= 0 else -1.0
        other, preferred = map(clip, sides if sign > 0 else reversed(sides))
        prompt = clip(prompts[int(comparisons.prompts.codes[at])].as_py())
        towards = tuple((sign * margins[at]).tolist())
        out.append(Decision(int(rows[at]), prompt, preferred, other, towards, float(lead[at])))
    return tuple(out)


def clip(text: str) -> str:
    """Return a text of at most `CLIPPED` characters, with an ellipsis where some were left out."""
    return text if len(text) <= CLIPPED else text[: CLIPPED - 1].rstrip() + "…"


def save_prototypes(path: Path, prototypes: Prototypes) -> None:
    """Replace the file at `path` by prototypes; the same prototypes give the same bytes."""
    write_json(path, prototypes.to_dict())


def load_prototypes(path: Path) -> Prototypes | None:
    """Read prototypes that `save_prototypes` wrote; None where there is no such file.

    Raises:
        CacheError: the file is damaged or of another format or version.
    """
    if not path.is_file():
        return None
    values = read_json(path, "a run's prototypes")
    found = (values.get("format"), values.get("version")) if isinstance(values, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise CacheError(f"{path} is of format {found[0]} version {found[1]}; expected {FORMAT} {VERSION}.")
    try:
        return Prototypes.from_dict(values)
    except (KeyError, TypeError) as error:
        raise CacheError(
            f"{path} is damaged ({type(error).__name__}: {error}); train the head again with palcache train-head."
        ) from error


def _matrix(rows: Sequence[Sequence[float]]) -> Matrix:
    return tuple(tuple(float(value) for value in row) for row in rows)
