"""The published implementation's state dict, in and out.

Its layout (github RamyaLab/pluralistic-alignment), under `prefLearner.` in the key `state_dict`: `logit_scale`; PAL-B's f
under `projector_f` and again under `item_learner.projector`, its g_j under `user_learner.projectors.{j}`; PAL-A's f under
`projector` and again in both learners, its prototypes under `user_learner.P`; user weights under `user_learner.W.{user}`;
temperatures; and the foundation model under `llm`, `item_learner.llm` and `user_learner.llm`. Layers of a projector are
numbered with their dropout and activation, which hold no values: neither is in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from palcache.checkpoints import TrainedHead
from palcache.choices import Mixture, Score, UserForm
from palcache.errors import InputError
from palcache.heads import PalA, PalB, Parameters, Projector, head_from_dict, head_to_dict

PREFIX: Final = "prefLearner."
TEMPERATURES: Final = ("softmax_w.temperature", "user_learner.softmax.temperature")
MODEL: Final = "llm."
LEARNERS: Final = ("", "item_learner.", "user_learner.")
WEIGHTS: Final = "user_learner.W."
_NORM: Final = {
    "weight": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
_LAYER = re.compile(r"(?:projector_f|projector)\.mlp\.layers\.(\d+)\.(\w+)")
_SHOWN: Final = 4


@final
@dataclass(frozen=True, slots=True, eq=False)
class PublishedCheckpoint:
    """What a published checkpoint holds.

    Attributes:
        head: shape, parameters and users.
        encoder: the foundation model's weights by name; empty where there are none.
        assumed: the projector's name, where the file does not say it and nobody did.
    """

    head: TrainedHead
    encoder: Mapping[str, torch.Tensor]
    assumed: str | None


@final
@dataclass(frozen=True, slots=True)
class PublishedOptions:
    """What a published checkpoint does not hold; None takes the published choice.

    Attributes:
        projector: name in the grammar of `palcache.heads.projectors`.
        score: how an item and an ideal point make a reward.
        user_form: how a PAL-A ideal point is made.
        mixture: how user weights become a point of the simplex.
        width: of the encoder's vectors, which a PAL-B head with projector `identity` does not show.
    """

    projector: str | None = None
    score: Score | None = None
    user_form: UserForm | None = None
    mixture: Mixture | None = None
    width: int | None = None


def from_state(
    state: Mapping[str, torch.Tensor],
    options: PublishedOptions | None = None,
    *,
    origin: str = "the state dict",
    about: Mapping[str, Any] | None = None,
) -> PublishedCheckpoint:
    """Return what a published state dict holds, whether or not its keys begin with `prefLearner.`.

    Args:
        state: the tensors.
        options: what it does not hold.
        origin: named in errors.
        about: what `to_state` noted beside it: the whole shape and the ids of the users.

    Raises:
        InputError: it is of another layout (the message names keys).
    """
    bare = {name.removeprefix(PREFIX): value for name, value in state.items()}
    encoder = {name.removeprefix(MODEL): value for name, value in bare.items() if name.startswith(MODEL)}
    bare = {name: value for name, value in bare.items() if not _of_model(name)}
    written = [name.removeprefix(WEIGHTS) for name in bare if name.startswith(WEIGHTS)]
    known, users = (None, tuple(written)) if about is None else (head_from_dict(about["shape"]), tuple(about["users"]))
    if isinstance(known, PalA | PalB):
        shape, assumed = known, None
    else:
        shape, assumed = _infer(bare, len(written), options or PublishedOptions(), origin)
    layout = list(_layout(shape, written))
    expected = {name for name, _, _ in layout} | set(TEMPERATURES)
    _refuse_other(expected - bare.keys(), bare.keys() - expected, origin)
    parameters = _collect(layout, bare, origin)
    head = TrainedHead(shape, parameters, users, {"imported": origin})
    return PublishedCheckpoint(head, encoder, assumed)


def _of_model(name: str) -> bool:
    return any(name.startswith(learner + MODEL) for learner in LEARNERS)


def _refuse_other(missing: set[str], unexpected: set[str], origin: str) -> None:
    if missing or unexpected:
        raise InputError(
            f"{origin} is of another layout than the published one: {_few('missing', missing)}; "
            f"{_few('unexpected', unexpected)}."
        )


def _few(what: str, names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN]) or "none"
    return f"{what} keys: {shown}" + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _infer(
    bare: Mapping[str, torch.Tensor], users: int, options: PublishedOptions, origin: str
) -> tuple[PalA | PalB, str | None]:
    """Return the shape that the tensors have, and the projector's name where it had to be assumed."""
    weights = next((value for name, value in bare.items() if name.startswith(WEIGHTS)), None)
    temperature, prototypes = bare.get(TEMPERATURES[0]), bare.get("user_learner.P")
    first = "projector_f.mlp.layers.0.weight" if prototypes is None else "projector.mlp.layers.0.weight"
    identity = options.projector == "identity"
    if weights is None or temperature is None or not (identity or first in bare):
        needed = {TEMPERATURES[0], f"{WEIGHTS}<user>", *(() if identity else (first,))}
        found = {name for name in needed if name in bare or (weights is not None and name.startswith(WEIGHTS))}
        _refuse_other(needed - found, set(bare) - needed, origin)
    assert weights is not None and temperature is not None  # noqa: S101, PT018 - refused above
    p, d = (_width(prototypes, options, origin),) * 2 if identity else bare[first].shape
    k, t = weights.numel(), float(temperature.reshape(-1)[0])
    name = _projector_name(bare, options.projector, pal_b=prototypes is None, square=d == p)
    assumed = None if options.projector else name
    mixture: Mixture = options.mixture or "softmax"
    if prototypes is None:
        return PalB(d, p, k, users, name, t, options.score or "angle", mixture), assumed
    form: UserForm = "Pw" if prototypes.shape[-1] == p != d else "f(Pw)"
    return PalA(d, p, k, users, name, t, options.score or "dist", options.user_form or form, mixture), assumed


def _width(prototypes: torch.Tensor | None, options: PublishedOptions, origin: str) -> int:
    """Return the width of a head without projectors."""
    width = options.width if prototypes is None else prototypes.shape[-1]
    if width is None:
        raise InputError(f"{origin} does not show the width of the vectors that it reads; give it with --width.")
    return width


def _projector_name(bare: Mapping[str, torch.Tensor], given: str | None, *, pal_b: bool, square: bool) -> str:
    """Return the given name, or the one that the layers' tensors fit with the published activation: GELU, PAL-A's ReLU.

    The published code takes residual and batchnorm in either order and overlooks `-nobias` after them, so whether there are
    biases is read off the tensors.
    """
    layers = {(int(m[1]), m[2]): value for name, value in bare.items() if (m := _LAYER.fullmatch(name))}
    bias = (0, "bias") in layers
    if given is not None:
        ordered = given.replace("-batchnorm-residual", "-residual-batchnorm")
        return ordered.removesuffix("-nobias") if bias else ordered
    linear = [at for (at, what), value in layers.items() if what == "weight" and value.dim() == 2]
    batchnorm = any(what == "running_mean" for _, what in layers)
    style = "gelu-dropout0" if pal_b else "relu-dropout0" + ("-residual" if square else "")
    return f"mlp{len(linear) - 1}-{style}" + ("-batchnorm" if batchnorm else "") + ("" if bias else "-nobias")


def _layout(shape: PalA | PalB, users: Sequence[str]) -> Iterator[tuple[str, str, int | None]]:
    """Yield the published name of each tensor, our name, and the row of our tensor that it is (None: all of it)."""
    yield "logit_scale", "logit_scale", None
    if isinstance(shape, PalB):
        yield from _layers(shape.items, "f.", "projector_f.", None)
        yield from _layers(shape.items, "f.", "item_learner.projector.", None)
        for j in range(shape.k):
            yield from _layers(shape.prototypes, "g.", f"user_learner.projectors.{j}.", j)
    else:
        for learner in LEARNERS:
            yield from _layers(shape.items, "f.", f"{learner}projector.", None)
        yield "user_learner.P", "prototypes", None
    for row, user in enumerate(users):
        yield WEIGHTS + user, "user.logits", row


def _layers(projector: Projector, own: str, published: str, row: int | None) -> Iterator[tuple[str, str, int | None]]:
    stride = 4 if projector.batchnorm else 3
    for layer in range(projector.hidden + 1):
        for part in ("weight", "bias") if projector.bias else ("weight",):
            yield f"{published}mlp.layers.{layer * stride}.{part}", f"{own}{layer}.{part}", row
        if projector.batchnorm and layer < projector.hidden:
            for ours, theirs in _NORM.items():
                yield f"{published}mlp.layers.{layer * stride + 1}.{theirs}", f"{own}{layer}.norm.{ours}", row


def _collect(layout: list[tuple[str, str, int | None]], bare: Mapping[str, torch.Tensor], origin: str) -> Parameters:
    """Return our parameters; a tensor that stands in several places must be the same in all of them."""
    rows: dict[str, list[torch.Tensor]] = {}
    parameters: Parameters = {}
    for published, own, row in layout:
        value = bare[published].detach().clone()
        if row is not None:
            rows.setdefault(own, []).append(value)
        elif own in parameters and not torch.equal(parameters[own], value):
            raise InputError(
                f"{origin}: {published} differs from the same layer elsewhere in it; expected one projector."
            )
        else:
            parameters[own] = value
    try:
        return {**parameters, **{own: torch.stack(values) for own, values in rows.items()}}
    except RuntimeError as error:
        raise InputError(f"{origin} has users or prototypes of different shapes ({error}).") from error


def to_state(head: TrainedHead, encoder: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Return a head as the published state dict; `from_state` returns it exactly.

    Dots in user ids, which the published code cannot have, become `%2E` (and `%` becomes `%25`).

    Args:
        head: PAL-A or PAL-B.
        encoder: the foundation model's weights by name.

    Raises:
        InputError: the head has no place in the published layout.
    """
    shape = head.shape
    if not isinstance(shape, PalA | PalB):
        kind = head_to_dict(shape)["head"]
        raise InputError(f"The published layout has no place for {kind}; export pal-a or pal-b.")
    state: dict[str, torch.Tensor] = {}
    users = [user.replace("%", "%25").replace(".", "%2E") for user in head.users]
    for published, own, row in _layout(shape, users):
        value = head.parameters[own].detach().cpu()
        state[PREFIX + published] = (value if row is None else value[row]).clone()
    temperature = torch.tensor([shape.temperature], dtype=head.parameters["logit_scale"].dtype)
    state |= {PREFIX + name: temperature.clone() for name in TEMPERATURES}
    for learner in LEARNERS:
        state |= {f"{PREFIX}{learner}{MODEL}{name}": value for name, value in (encoder or {}).items()}
    return state
