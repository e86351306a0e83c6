"""What a reference file asks of our heads, driven by its `meta` alone.

The same checks run on files of the published implementation and on files that the oracle of `published_oracle` wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from palcache.checkpoints import TrainedHead
from palcache.choices import Loss, Score
from palcache.configs import FitConfig
from palcache.heads import PalA, PalB, Parameters
from palcache.heads.projectors import is_buffer
from palcache.losses import position_weights
from palcache.objectives import Objective
from palcache.published.layout import PREFIX, PublishedOptions, from_state, to_state
from palcache.token_batches import TokenBatch, TokenData
from palcache.token_states import RaggedRows
from palcache.training import FitState, fit

SCORES: dict[str, Score] = {
    "dist": "dist",
    "dist_normalization": "dist_normalized",
    "dist_logistic": "dist_logistic",
    "angle": "angle",
    "angle_hinge": "angle_hinge",
}
LOSSES: dict[str, Loss] = {
    "CE": "cross_entropy",
    "hinge": "hinge",
    "logistic": "logistic",
    "hinge_smooth": "smooth_hinge",
}


@dataclass(frozen=True)
class Case:
    """A reference file: what it is of, and its tensors."""

    meta: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """Return the tensors under a prefix, without it."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}


def read_case(path: Path) -> Case:
    """Read a reference file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return Case(json.loads(file.metadata()["meta"]), tensors)


def within(case: Case, stated: float) -> dict[str, Any]:
    """Return the stated tolerance for float32, absolute and relative; a tenth of it for float64, far beyond its rounding."""
    allowed = stated if case.tensors["in.left"].dtype == torch.float32 else 0.1 * stated
    return {"atol": allowed, "rtol": allowed}


def head_of(case: Case) -> TrainedHead:
    """Return our head with the file's parameters."""
    meta = case.meta
    options = PublishedOptions(
        projector=meta["proj_arch"],
        width=meta["d_hid"],
        score=SCORES[meta["pref_learner_type"]],
        user_form=meta["user_learner_type"],
        mixture="partition" if meta["partition"] else "softmax",
    )
    head = from_state(case.part("init."), options).head
    shape = head.shape
    assert isinstance(shape, PalA | PalB)
    assert (shape.k, shape.d, shape.p) == (meta["k"], meta["d_hid"], meta["d_pref"])
    assert shape.temperature == pytest.approx(meta["temperature"])
    return head


def batch_of(case: Case, head: TrainedHead) -> TokenBatch:
    """Return the file's comparisons at all positions, so that statistics are those of all of them."""
    values, order = case.part("in."), {user: i for i, user in enumerate(head.users)}
    user = torch.tensor([order[case.meta["users"][i]] for i in values["user_index"].tolist()])
    span = torch.stack([values["divergence"], values["end"]], dim=-1)
    y = values["y"].to(values["left"].dtype)
    return TokenBatch.from_dense(values["left"], values["right"], values["prompt"], span, user, y, whole=True)


def objective_of(case: Case, head: TrainedHead) -> Objective:
    """Return the file's loss."""
    kind = case.meta["loss"]
    config = FitConfig(
        loss=LOSSES[kind.removesuffix("_w")],
        weighting="users" if kind.endswith("_w") else "comparisons",
        token_weighting=case.meta["loss_weighting"],
        prompt_alignment="position",
    )
    return Objective(head.shape, config)


def counts_of(case: Case, batch: TokenBatch, head: TrainedHead) -> torch.Tensor | None:
    """Return how many comparisons each user has, where users count the same."""
    return torch.bincount(batch.user, minlength=len(head.users)) if case.meta["loss"].endswith("_w") else None


def y_hat_of(case: Case, head: TrainedHead, parameters: Parameters, *, training: bool) -> torch.Tensor:
    """Return our scores as the file has them: both scores, or the left distance minus the right one."""
    assert isinstance(head.shape, PalA | PalB)
    updates = Parameters() if training else None
    rewards = head.shape.rewards(parameters, batch_of(case, head).pairs, updates=updates)
    want = case.tensors["out.y_hat"]
    return rewards.reshape(want.shape) if want.dim() == 3 else (rewards[:, 1] - rewards[:, 0]).reshape(want.shape)


def learned(head: TrainedHead) -> Parameters:
    """Return a copy of the parameters, those that training changes asking for gradients."""
    out = {name: value.clone() for name, value in head.parameters.items()}
    for name, value in out.items():
        if not is_buffer(name) and head.shape.trains(name):
            value.requires_grad_()
    return out


def published_state(head: TrainedHead, parameters: Parameters) -> dict[str, torch.Tensor]:
    """Return parameters under the published names."""
    state = to_state(TrainedHead(head.shape, parameters, head.users, {}))
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def check_scores(case: Case) -> None:
    """Scores and the first loss are the file's to 1e-5, and the share of right tokens."""
    head = head_of(case)
    y_hat = y_hat_of(case, head, head.parameters, training=True)
    torch.testing.assert_close(y_hat, case.tensors["out.y_hat"], **within(case, 1e-5))
    batch = batch_of(case, head)
    loss = objective_of(case, head)(head.parameters, batch, updates={}, counts=counts_of(case, batch, head))
    assert float(loss) == pytest.approx(float(case.tensors["out.losses"][0]), abs=within(case, 1e-5)["atol"])
    if "out.accuracy_all_tokens" in case.tensors:
        margins = y_hat if y_hat.dim() == 2 else y_hat[..., 1] - y_hat[..., 0]
        right = (margins.flatten() * batch.y[batch.comparison] > 0).float()
        share = (right * position_weights("mean", batch.rank, batch.count[batch.comparison])).sum() / len(batch.y)
        assert float(share) == pytest.approx(float(case.tensors["out.accuracy_all_tokens"]), abs=1e-6)


def check_gradients(case: Case) -> None:
    """Gradients of the first loss are the file's to 1e-4 of their size."""
    head = head_of(case)
    parameters, batch = learned(head), batch_of(case, head)
    objective_of(case, head)(parameters, batch, updates={}, counts=counts_of(case, batch, head)).backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in parameters.items()
    }
    ours, theirs = published_state(head, gradients), case.part("grad.")
    assert theirs
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, want in theirs.items():
        # relative to the gradient's own size, and where rounding is all there is (a bias that cancels) to the largest
        allowed = within(case, 1e-4)["rtol"] * (float(want.abs().max()) + 0.1 * largest)
        assert float((ours[name] - want).abs().max()) <= allowed, name
    absent = {name for name in ours if name.startswith("user_learner.W.")} - theirs.keys()
    assert all(not ours[name].any() for name in absent), "a user outside the batch has a gradient"


def check_training(case: Case) -> None:
    """PAL-B: the losses of all steps and the final state are the file's to 1e-4, and the scores in evaluation after it."""
    head = head_of(case)
    losses, parameters = _train(case, head)
    if case.meta["pal"] == "b":
        assert losses == pytest.approx(case.tensors["out.losses"].tolist(), abs=within(case, 1e-4)["atol"])
        _compare_states(case, published_state(head, parameters))
    if "out.y_hat_eval" in case.tensors:
        y_hat = y_hat_of(case, head, parameters, training=False)
        torch.testing.assert_close(y_hat, case.tensors["out.y_hat_eval"], **within(case, 1e-4))


def _train(case: Case, head: TrainedHead) -> tuple[list[float], Parameters]:
    parameters, batch, objective = learned(head), batch_of(case, head), objective_of(case, head)
    steps, losses = _optimizers(case, parameters), []
    for _ in range(case.meta["steps"]):
        updates = Parameters()
        loss = objective(parameters, batch, updates=updates, counts=counts_of(case, batch, head))
        for value in parameters.values():
            value.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        for step in steps:
            step.step()
        parameters.update(updates)
        losses.append(float(loss.detach()))
    return losses, {name: value.detach() for name, value in parameters.items()}


def _optimizers(case: Case, parameters: Parameters) -> list[torch.optim.Optimizer]:
    """Return an optimizer per group of the file, so that PAL-A's projector can be stepped twice as published."""
    groups: dict[str, list[torch.Tensor]] = {}
    first = "projector_f" if case.meta["pal"] == "b" else "projector"
    names = {"f": first, "g": "projectors_gk", "prototypes": "P", "user": "W", "logit_scale": "logit_scale"}
    for name, value in parameters.items():
        if value.requires_grad:
            groups.setdefault(names[name.split(".")[0]], []).append(value)
    kind = getattr(torch.optim, case.meta["optimizer_class"])
    made = {group: kind(members, **case.meta["optimizer"][group]) for group, members in groups.items()}
    return [*made.values(), *([made["projector"]] if case.meta["pal"] == "a" and "projector" in made else [])]


def _compare_states(case: Case, ours: dict[str, torch.Tensor]) -> None:
    theirs = case.part("final.")
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, msg=name, **within(case, 1e-4))


def check_fit(case: Case) -> None:
    """`fit` takes the published steps: the same losses, and the same state after them.

    Not for PAL-A, whose published optimizer steps its projector twice, nor for a batchnorm, which takes the statistics of
    the spans alone where states are ragged.
    """
    head, rates = head_of(case), case.meta["optimizer"]
    assert rates["projector_f"] == rates["projectors_gk"]
    assert not rates["W"]["weight_decay"]
    steps, n = case.meta["steps"], len(case.tensors["in.y"])
    config = FitConfig.from_mapping(
        objective_of(case, head).config.to_dict()
        | {"batch_size": n, "epochs": steps, "evaluations": steps, "patience": 0, "warmup": 0.0, "schedule": "constant",
           "optimizer": case.meta["optimizer_class"].lower(),
           "lr": rates["projector_f"]["lr"], "weight_decay": rates["projector_f"]["weight_decay"],
           "lr_users": rates["W"]["lr"], "lr_scale": rates["logit_scale"]["lr"]}
    )  # fmt: skip
    states: list[FitState] = []
    start = FitState(0, head.parameters, head.parameters, {}, ())
    data = _ragged(case, head)
    result = fit(head.shape, data, data, config, on_state=states.append, state=start)
    losses = [row.train_loss for row in result.history]
    assert losses == pytest.approx(case.tensors["out.losses"].tolist(), abs=within(case, 1e-4)["atol"])
    _compare_states(case, published_state(head, states[-1].parameters))


def _ragged(case: Case, head: TrainedHead) -> TokenData:
    """Return the file's comparisons as texts of t tokens each."""
    batch, values = batch_of(case, head), case.part("in.")
    n, t = values["left"].shape[:2]
    return TokenData(
        RaggedRows(values["prompt"].flatten(0, 1), torch.arange(n + 1) * t),
        RaggedRows(torch.cat([values["left"], values["right"]]).flatten(0, 1), torch.arange(2 * n + 1) * t),
        torch.arange(n),
        torch.arange(n),
        torch.arange(n) + n,
        batch.user,
        batch.y,
        head.users,
        torch.stack([values["divergence"], values["end"]], dim=-1),
    )
