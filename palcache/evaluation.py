"""Honest evaluation of a head on comparisons: accuracy with intervals, calibration, and yardsticks beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import torch

from palcache.checkpoints import TrainedHead
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, UnknownUsers
from palcache.errors import InputError, MismatchError
from palcache.metrics import (
    Array,
    Estimate,
    bootstrap,
    brier,
    calibration_error,
    correctness,
    fit_temperature,
    log_loss,
)
from palcache.objectives import Objective
from palcache.tensors import PreferenceData
from palcache.token_batches import TokenData

BATCH_ROWS: Final = 8_192


@final
@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a rule gets right on some comparisons.

    Attributes:
        n: number of comparisons.
        users: number of users.
        ties: number of ties among the comparisons; each counts one half.
        accuracy: `micro`, `macro` and `worst_tenth`, each with its 95 % interval.
        log_loss: mean of -log P(y) in nats; None for a rule without probabilities.
        brier: mean squared error of P(response_2 preferred).
        calibration_error: over 15 bins of equal mass.
        temperature: fitted on validation; dividing the margins by it calibrates best there.
        groups: micro accuracy of each population group, where known.
        token_accuracy: of a head that was trained on tokens, the mean share of a span's tokens that are right.
    """

    n: int
    users: int
    ties: int
    accuracy: Mapping[str, Estimate]
    log_loss: float | None = None
    brier: float | None = None
    calibration_error: float | None = None
    temperature: float | None = None
    groups: Mapping[str, float] = field(default_factory=dict)
    token_accuracy: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: each accuracy as a number, and its interval beside it."""
        out = {
            key: value for key, value in asdict(self).items() if value is not None and key not in {"accuracy", "groups"}
        }
        accuracy: dict[str, Any] = {name: estimate.value for name, estimate in self.accuracy.items()}
        accuracy["interval"] = {name: _finite([e.low, e.high]) for name, e in self.accuracy.items()}
        return {**out, "accuracy": accuracy, **({"groups": dict(self.groups)} if self.groups else {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Build an evaluation from what `to_dict` returned."""
        accuracy = dict(values["accuracy"])
        intervals = accuracy.pop("interval")
        estimates = {
            name: Estimate(value, *(intervals[name] or (math.nan, math.nan))) for name, value in accuracy.items()
        }
        return cls(**{**values, "accuracy": estimates})


def _finite(values: list[float]) -> list[float] | None:
    return values if all(np.isfinite(values)) else None


@torch.no_grad()
def predict_margins(head: TrainedHead, data: PreferenceData) -> Array:
    """Return r(response_2) - r(response_1) of each comparison, (n,) float64.

    Users are found by their ids; those whom the head does not know are scored with the mean mixture of its seen users.
    """
    data, head = data.with_users(head.users), head.to(data.device)
    mixtures = torch.cat([head.mixtures, head.generic.unsqueeze(0)])  # row -1: the population's mixture
    out = []
    for batch in data.batches(BATCH_ROWS):
        out.append(head.shape.margins(head.parameters, batch, mixtures=mixtures[batch.user]).double().cpu())
    return np.concatenate([margins.numpy() for margins in out]) if out else np.empty(0)


def token_accuracy(head: TrainedHead, data: TokenData) -> float:
    """Return the mean over comparisons of the share of a span's tokens whose margin has the sign of y, 0 for an empty span.

    Users are found by their ids; those whom the head does not know have the mean mixture.
    """
    objective, parameters = Objective(head.shape, FitConfig()), head.to(data.device).parameters
    return objective.validate(parameters, data.with_users(head.users))[1]


def evaluate_margins(
    margins: Array,
    comparisons: Comparisons,
    *,
    probabilities: bool = True,
    temperature: float | None = None,
    seed: int = 0,
) -> Evaluation:
    """Return the evaluation of margins on comparisons.

    Args:
        margins: r(response_2) - r(response_1), (n,).
        comparisons: the same comparisons.
        probabilities: sigmoid(margin) is meant as P(response_2 preferred); false for rules of thumb.
        temperature: as fitted on validation, to be reported.
        seed: of the bootstrap.

    Raises:
        InputError: there are no comparisons.
    """
    if not len(comparisons):
        raise InputError("There are no comparisons to evaluate; choose another --split or another table.")
    y, user = comparisons.y, comparisons.users.codes.astype(np.int64)
    right = correctness(margins, y)
    return Evaluation(
        n=len(y),
        users=len(np.unique(user)),
        ties=int((y == 0).sum()),
        accuracy=bootstrap(right, user, seed=seed),
        log_loss=log_loss(margins, y) if probabilities else None,
        brier=brier(margins, y) if probabilities else None,
        calibration_error=calibration_error(margins, y) if probabilities else None,
        temperature=temperature,
        groups=_by_group(right, comparisons),
    )


def _by_group(right: Array, comparisons: Comparisons) -> dict[str, float]:
    if comparisons.group is None:
        return {}
    codes = comparisons.group.codes
    return {
        name: float(right[codes == code].mean())
        for code, name in enumerate(comparisons.group.values.to_pylist())
        if np.any(codes == code)
    }


def evaluate_head(
    head: TrainedHead,
    data: PreferenceData,
    comparisons: Comparisons,
    *,
    validation: PreferenceData | None = None,
    seed: int = 0,
) -> Evaluation:
    """Return the evaluation of a head on comparisons, with the temperature fitted on validation where it is given."""
    temperature = None
    if validation is not None and len(validation):
        margins = predict_margins(head, validation)
        temperature = fit_temperature(margins, validation.y.double().cpu().numpy())
    return evaluate_margins(predict_margins(head, data), comparisons, temperature=temperature, seed=seed)


def evaluate_longer(comparisons: Comparisons, *, seed: int = 0) -> Evaluation:
    """Return the evaluation of "the longer response is preferred", the user-blind yardstick."""
    return evaluate_margins(longer_margins(comparisons), comparisons, probabilities=False, seed=seed)


def longer_margins(comparisons: Comparisons) -> Array:
    """Return by how many characters the right response is longer, (n,) float64."""
    length = pc.utf8_length(comparisons.responses).to_numpy().astype(np.float64)
    return np.asarray(length[comparisons.response_2] - length[comparisons.response_1], np.float64)


def known_rows(comparisons: Comparisons, users: tuple[str, ...], policy: UnknownUsers) -> npt.NDArray[np.int64]:
    """Return the rows to evaluate under a policy for users whom the head does not know.

    Args:
        comparisons: the table.
        users: the head's users.
        policy: `refuse`; `generic`, score them with the mean mixture; `drop`, leave their rows out.

    Raises:
        MismatchError: the policy is `refuse` and there is such a user.
    """
    known = set(users)
    names: list[str] = comparisons.users.values.to_pylist()
    unknown = np.array([name not in known for name in names], bool)[comparisons.users.codes]
    if policy == "generic" or not unknown.any():
        return np.arange(len(comparisons))
    if policy == "drop":
        return np.flatnonzero(~unknown)
    first = names[comparisons.users.codes[np.flatnonzero(unknown)[0]]]
    count = len(np.unique(comparisons.users.codes[unknown]))
    raise MismatchError(
        f"The head does not know the user {first!r} ({count} such users, {int(unknown.sum())} comparisons); score them "
        "with the mean mixture by --unknown-users generic, or leave them out by --unknown-users drop."
    )
