"""The published implementation's checkpoints: Lightning `.ckpt` files, read without unpickling anything, and written.

Its layout (github RamyaLab/pluralistic-alignment), under `prefLearner.` in the key `state_dict`: `logit_scale`; PAL-B's f
under `projector_f` and again under `item_learner.projector`, its g_j under `user_learner.projectors.{j}`; PAL-A's f under
`projector` and again in both learners, its prototypes under `user_learner.P`; user weights under `user_learner.W.{user}`;
temperatures; and the foundation model under `llm`, `item_learner.llm` and `user_learner.llm`. Layers of a projector are
numbered with their dropout and activation, which hold no values: neither is in the file.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Final, final

import torch
from safetensors.torch import load_file, save_file

from palcache.checkpoints import TrainedHead
from palcache.choices import Mixture, Score, UserForm
from palcache.errors import CacheError, InputError
from palcache.files import storage_errors, write_with
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
_TOKENIZER: Final = ("*.json", "*.txt", "*.model")


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
    """

    projector: str | None = None
    score: Score | None = None
    user_form: UserForm | None = None
    mixture: Mixture | None = None


def read_published(path: Path, options: PublishedOptions | None = None) -> PublishedCheckpoint:
    """Read a published checkpoint; nothing in it is unpickled but tensors and plain values.

    Args:
        path: a `.ckpt` file.
        options: what the file does not hold.

    Raises:
        InputError: the file would need pickle, or is of another layout (the message names keys).
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"There is no checkpoint {path}.") from error
    except UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors and plain values, so reading it would run code that it brings; save its "
            'state dict alone where you trust it: torch.save({"state_dict": model.state_dict()}, path).'
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}).") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise InputError(
            f"{path} holds no state dict of tensors; expected a Lightning checkpoint of the published code."
        )
    about = content.get("palcache")
    return from_state(state, options, origin=str(path), about=about if isinstance(about, dict) else None)


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
    shape, assumed = _infer(bare, len(written), options or PublishedOptions(), origin)
    users = tuple(written)
    if about is not None:
        known, users = head_from_dict(about["shape"]), tuple(about["users"])
        shape, assumed = (known, None) if isinstance(known, PalA | PalB) else (shape, assumed)
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
    pal_b = "projector_f.mlp.layers.0.weight" in bare
    first = bare.get("projector_f.mlp.layers.0.weight" if pal_b else "projector.mlp.layers.0.weight")
    temperature = bare.get(TEMPERATURES[0])
    if weights is None or first is None or temperature is None or first.dim() != 2:
        needed = {TEMPERATURES[0], f"{WEIGHTS}<user>", "projector_f.mlp.layers.0.weight"}
        found = {name for name in needed if name in bare or (weights is not None and name.startswith(WEIGHTS))}
        _refuse_other(needed - found, set(bare) - needed, origin)
    assert weights is not None and first is not None and temperature is not None  # noqa: S101, PT018 - refused above
    (p, d), k, t = first.shape, weights.numel(), float(temperature.reshape(-1)[0])
    name = options.projector or _projector_name(bare, pal_b=pal_b, square=d == p)
    assumed = None if options.projector else name
    mixture: Mixture = options.mixture or "softmax"
    if pal_b:
        return PalB(d, p, k, users, name, t, options.score or "angle", mixture), assumed
    prototypes = bare.get("user_learner.P")
    form: UserForm = "Pw" if prototypes is not None and prototypes.shape[-1] == p != d else "f(Pw)"
    return PalA(d, p, k, users, name, t, options.score or "dist", options.user_form or form, mixture), assumed


def _projector_name(bare: Mapping[str, torch.Tensor], *, pal_b: bool, square: bool) -> str:
    """Return the name that the layers' tensors fit, with the published activation: GELU, or for PAL-A ReLU and residual."""
    layers = {(int(m[1]), m[2]): value for name, value in bare.items() if (m := _LAYER.fullmatch(name))}
    linear = [at for (at, what), value in layers.items() if what == "weight" and value.dim() == 2]
    batchnorm = any(what == "running_mean" for _, what in layers)
    style = "gelu-dropout0" if pal_b else "relu-dropout0" + ("-residual" if square else "")
    ending = ("-batchnorm" if batchnorm else "") + ("" if (0, "bias") in layers else "-nobias")
    return f"mlp{len(linear) - 1}-{style}{ending}"


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
        head: PAL-A or PAL-B, with a projector that is not the identity.
        encoder: the foundation model's weights by name.

    Raises:
        InputError: the head has no place in the published layout.
    """
    shape = head.shape
    if not isinstance(shape, PalA | PalB) or shape.items.hidden < 0:
        kind = head_to_dict(shape)["head"]
        raise InputError(
            f"The published layout has no place for {kind} with this projector; export pal-a or pal-b with layers."
        )
    state: dict[str, torch.Tensor] = {}
    users = [user.replace("%", "%25").replace(".", "%2E") for user in head.users]
    for published, own, row in _layout(shape, users):
        value = head.parameters[own].detach().cpu()
        state[PREFIX + published] = (value if row is None else value[row]).clone()
    for name in TEMPERATURES:
        state[PREFIX + name] = torch.tensor([shape.temperature])
    for learner in LEARNERS:
        state |= {f"{PREFIX}{learner}{MODEL}{name}": value for name, value in (encoder or {}).items()}
    return state


def write_published(path: Path, head: TrainedHead, encoder: Mapping[str, torch.Tensor] | None = None) -> None:
    """Replace `path` by a head in the published layout, with the whole shape and the users' own ids noted beside it.

    Raises:
        InputError: the head has no place in the published layout.
    """
    content = {
        "state_dict": to_state(head, encoder),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.0.0",
        "palcache": {"shape": head_to_dict(head.shape), "users": list(head.users)},
    }
    write_with(path, lambda temporary: torch.save(content, temporary))


def write_encoder(folder: Path, encoder: Mapping[str, torch.Tensor], config: Path) -> None:
    """Make a transformers folder of a checkpoint's foundation model.

    Args:
        folder: to be made.
        encoder: its weights.
        config: a folder with the model's `config.json`, and its tokenizer's files where they are to be kept.

    Raises:
        InputError: the checkpoint has no foundation model, or the folder has no `config.json`.
    """
    if not encoder:
        raise InputError("The checkpoint holds no foundation model; leave out --encoder-out.")
    if not (config / "config.json").is_file():
        raise InputError(f"{config} has no config.json; name the folder of the model that was fine-tuned.")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for pattern in _TOKENIZER:
            for file in sorted(config.glob(pattern)):
                if not file.name.endswith(".index.json"):  # of weights in several files, which are not taken along
                    shutil.copyfile(file, folder / file.name)
    weights = {name: value.contiguous().clone() for name, value in encoder.items()}
    write_with(folder / "model.safetensors", lambda temporary: save_file(weights, temporary, {"format": "pt"}))


def read_encoder(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a transformers folder by name.

    Raises:
        CacheError: it has no `model.safetensors`.
    """
    path = folder / "model.safetensors"
    if not path.is_file():
        raise CacheError(f"{folder} has no model.safetensors; export takes a folder that checkpoint import made.")
    return load_file(path)
