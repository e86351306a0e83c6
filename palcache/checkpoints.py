"""Safetensors files: a trained head with its shape and its users, and the state from which training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final, final

import torch

from palcache.errors import CacheError, InputError
from palcache.heads import AnyHead, BradleyTerry, Head, LowRank, PalA, PalB, Parameters, head_from_dict, head_to_dict
from palcache.tensor_files import pack_texts, read_tensors, require_format, unpack_texts, write_tensors

FORMAT: Final = "palcache-head"
VERSION: Final = 1


@final
@dataclass(frozen=True, slots=True, eq=False)
class TrainedHead:
    """A head with its parameters and its users.

    Attributes:
        shape: what the parameters mean.
        parameters: tensors on one device, as `shape.initial` names them.
        users: ids of the users, in the order of the rows of `shape.mixtures`.
        about: where it comes from, as JSON values (fingerprints of cache and table, spaces, seed).
        seen: how many of the users, from the first, were trained with it; None for all. The others were adapted later.
    """

    shape: Head
    parameters: Parameters
    users: tuple[str, ...]
    about: Mapping[str, Any]
    seen: int | None = None

    @property
    def generic(self) -> torch.Tensor:
        """The population's own mixture, the mean of the seen users', (k,)."""
        return self.mixtures[: self.seen].mean(0)

    @property
    def mixtures(self) -> torch.Tensor:
        """Every user's mixture over the prototypes, (u, k), or weights of a yardstick."""
        return self.shape.mixtures(self.parameters)

    def to(self, device: torch.device) -> TrainedHead:
        """Return the head on another device."""
        moved = {name: value.to(device) for name, value in self.parameters.items()}
        return replace(self, parameters=moved)

    def with_adapted(self, users: Sequence[str], logits: torch.Tensor) -> TrainedHead:
        """Return the head with more users, whose weights are (u, k); no other parameter changes.

        Raises:
            InputError: its users are not weights over prototypes.
        """
        if not isinstance(self.shape, PalA | PalB | LowRank | BradleyTerry):
            raise InputError(f"A {type(self.shape).__name__} head has no mixtures, so that no user can be added to it.")
        parameters = dict(self.parameters)
        if "user.logits" in parameters:  # one reward for all has no weights
            own = parameters["user.logits"]
            parameters["user.logits"] = torch.cat([own, logits.to(own)])
        everyone = (*self.users, *users)
        shape = replace(self.shape, users=len(everyone))
        return TrainedHead(shape, parameters, everyone, self.about, len(self.users) if self.seen is None else self.seen)


@final
@dataclass(frozen=True, slots=True)
class HistoryRow:
    """One evaluation during training.

    Attributes:
        step: optimizer steps so far.
        epoch: passes over the training comparisons so far.
        train_loss: mean loss of the steps since the last evaluation, in nats.
        val_loss: mean validation loss, in nats.
        val_accuracy: share of validation comparisons predicted right.
        lr: learning rate of the projectors at this step.
        scale: exp(logit_scale); 1 for a head without one.
    """

    step: int
    epoch: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    lr: float
    scale: float


@final
@dataclass(frozen=True, slots=True, eq=False)
class FitState:
    """Everything that training needs to go on from an evaluation as if it had never stopped.

    Attributes:
        step: optimizer steps so far.
        parameters: at this step.
        best: at the step of the lowest validation loss so far.
        moments: the optimizer's state, by parameter name and moment.
        history: the evaluations so far.
    """

    step: int
    parameters: Parameters
    best: Parameters
    moments: dict[str, torch.Tensor]
    history: tuple[HistoryRow, ...]


def save_head(path: Path, head: TrainedHead) -> None:
    """Replace the file at `path` by a head; the same head gives the same bytes."""
    texts, offsets = pack_texts(head.users)
    described = {
        "format": FORMAT,
        "version": VERSION,
        "shape": head_to_dict(head.shape),
        "about": head.about,
    }
    write_tensors(path, {**head.parameters, "user.id.bytes": texts, "user.id.offsets": offsets}, described)


def load_head(path: Path) -> TrainedHead:
    """Read a head that `save_head` wrote.

    Raises:
        CacheError: the file is missing, damaged, or of another format or version.
    """
    described, tensors = read_tensors(path, "a head", "train it again with palcache train-head")
    require_format(path, described, FORMAT, VERSION)
    try:
        shape, about = _shape_of(path, described["shape"]), described["about"]
        users = unpack_texts(tensors.pop("user.id.bytes"), tensors.pop("user.id.offsets"))
        _require_fit(shape, tensors, users)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise CacheError(
            f"{path} is damaged: its content is not that of a head ({type(error).__name__}: {error}); train it again with "
            "palcache train-head."
        ) from error
    return TrainedHead(shape, tensors, users, about)


def _shape_of(path: Path, values: Mapping[str, Any]) -> AnyHead:
    try:
        return head_from_dict(values)
    except CacheError as error:
        raise CacheError(f"{path}: {error}") from error


def _require_fit(shape: Head, parameters: Parameters, users: Sequence[str]) -> None:
    expected = {name: value.shape for name, value in shape.initial(torch.Generator()).items()}
    if {name: value.shape for name, value in parameters.items()} != expected or len(users) != shape.users:
        raise ValueError("parameters, users and shape do not fit each other")


def write_state(path: Path, state: FitState) -> None:
    """Replace the file at `path` by a state of the training."""
    tensors = {f"now/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    tensors |= {f"moment/{name}": value for name, value in state.moments.items()}
    rows = [[getattr(row, field.name) for field in fields(HistoryRow)] for row in state.history]
    tensors["history"] = torch.tensor(rows, dtype=torch.float64)
    tensors["step"] = torch.tensor(state.step)
    write_tensors(path, tensors)


def read_state(path: Path) -> FitState | None:
    """Return the state to go on from; None where it cannot be read, so that training starts anew."""
    try:
        _, tensors = read_tensors(path, "a state", "start anew")
    except CacheError:
        return None
    if "step" not in tensors or "history" not in tensors:
        return None

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    rows = tuple(HistoryRow(int(row[0]), *row[1:]) for row in tensors["history"].tolist())
    return FitState(int(tensors["step"]), part("now/"), part("best/"), part("moment/"), rows)
