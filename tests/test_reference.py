"""Heads equal the published implementation: its own numbers in files, and an independent oracle for further cases.

The files are those of `PALCACHE_REFERENCE_DIR`; each test is driven by a file's `meta` alone.
"""

from __future__ import annotations

import json
import os
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
from palcache.losses import token_accuracy
from palcache.objectives import Objective
from palcache.published import PREFIX, PublishedOptions, from_state, to_state
from palcache.token_batches import RaggedRows, TokenBatch, TokenData
from palcache.training import FitState, fit
from tests.published_oracle import Case, make_case

FOLDER = Path(os.environ.get("PALCACHE_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "reference" / "heads"))
FILES = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []
SCORES: dict[str, Score] = {"dist_normalization": "dist_normalized"}
LOSSES: dict[str, Loss] = {
    "CE": "cross_entropy",
    "hinge": "hinge",
    "logistic": "logistic",
    "smooth_hinge": "smooth_hinge",
}

MADE: dict[str, dict[str, Any]] = {
    "b-batchnorm-nobias": {"proj_arch": "mlp2-relu-dropout0-batchnorm-nobias", "k": 3, "temperature": 0.5},
    "b-batchnorm-residual": {"proj_arch": "mlp1-gelu-dropout0-residual-batchnorm", "d_pref": 7, "loss_weighting": "cumulative"},
    "b-batchnorm-partition": {"proj_arch": "mlp1-linear-dropout0-batchnorm", "partition": True, "k": 4},
    "b-deep-nobias": {"proj_arch": "mlp3-linear-dropout0-nobias", "k": 4, "temperature": 2.5, "loss_weighting": "only_last"},
    "b-one-prototype": {"proj_arch": "mlp0-relu-dropout0-residual", "k": 1, "d_pref": 7},
    "b-users": {"proj_arch": "mlp1-gelu-dropout0", "loss": "CE_w", "steps": 5},
    "a-f(Pw)-batchnorm": {"pal": "a", "user_learner_type": "f(Pw)", "proj_arch": "mlp1-relu-dropout0-batchnorm"},
    "a-f(P)w": {"pal": "a", "user_learner_type": "f(P)w", "k": 3, "loss_weighting": "cumulative"},
    "a-f(P)w-batchnorm": {"pal": "a", "user_learner_type": "f(P)w", "k": 3, "proj_arch": "mlp2-gelu-dropout0-batchnorm"},
    "a-|f(P)|w": {"pal": "a", "user_learner_type": "|f(P)|w", "k": 4, "temperature": 0.3},
    "a-Pw-logistic": {"pal": "a", "user_learner_type": "Pw", "loss": "logistic_w", "loss_weighting": "only_last"},
    "a-Pw-partition": {"pal": "a", "user_learner_type": "Pw", "partition": True, "proj_arch": "mlp1-relu-dropout0-nobias"},
}  # fmt: skip


def read_case(path: Path) -> Case:
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return Case(path.stem, json.loads(file.metadata()["meta"]), tensors)


def made_case(name: str) -> Case:
    changes = dict(MADE[name])
    if changes.get("pal") == "a":
        changes = {"pref_learner_type": "dist", "loss": "hinge", "steps": 1} | changes
    return make_case(name, len(name), **changes)


@pytest.fixture(params=[*FILES, *MADE], ids=lambda source: source.stem if isinstance(source, Path) else source)
def case(request: pytest.FixtureRequest) -> Case:
    return read_case(request.param) if isinstance(request.param, Path) else made_case(request.param)


def part(case: Case, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in case.tensors.items() if name.startswith(prefix)}


def head_of(case: Case) -> TrainedHead:
    meta = case.meta
    options = PublishedOptions(
        projector=meta["proj_arch"],
        score=SCORES.get(meta["pref_learner_type"], meta["pref_learner_type"]),
        user_form=meta["user_learner_type"],
        mixture="partition" if meta["partition"] else "softmax",
    )
    return from_state(part(case, "init."), options).head


def batch_of(case: Case, head: TrainedHead) -> TokenBatch:
    values, order = part(case, "in."), {user: i for i, user in enumerate(head.users)}
    user = torch.tensor([order[case.meta["users"][i]] for i in values["user_index"].tolist()])
    return TokenBatch(
        values["left"],
        values["right"],
        values["prompt"],
        values["divergence"],
        values["end"],
        user,
        values["y"].to(torch.float32),
    )


def objective_of(case: Case, head: TrainedHead) -> Objective:
    kind = case.meta["loss"]
    config = FitConfig(
        loss=LOSSES[kind.removesuffix("_w")],
        weighting="users" if kind.endswith("_w") else "comparisons",
        token_weighting=case.meta["loss_weighting"],
        prompt_alignment="position",
    )
    return Objective(head.shape, config)


def counts_of(case: Case, batch: TokenBatch, head: TrainedHead) -> torch.Tensor | None:
    return torch.bincount(batch.user, minlength=len(head.users)) if case.meta["loss"].endswith("_w") else None


def y_hat_of(case: Case, head: TrainedHead, parameters: Parameters, *, training: bool) -> torch.Tensor:
    assert isinstance(head.shape, PalA | PalB)
    updates = Parameters() if training else None
    scores = head.shape.token_scores(parameters, batch_of(case, head), updates=updates)
    return scores if case.meta["pal"] == "b" else scores[..., 1] - scores[..., 0]


def learned(head: TrainedHead) -> Parameters:
    out = {name: value.clone() for name, value in head.parameters.items()}
    for name, value in out.items():
        if not is_buffer(name) and head.shape.trains(name):
            value.requires_grad_()
    return out


def optimizers(case: Case, parameters: Parameters) -> list[torch.optim.Optimizer]:
    """Return an Adam per group of the file, so that PAL-A's projector can be stepped twice as published."""
    rates = case.meta["optimizer"]
    groups: dict[str, list[torch.Tensor]] = {}
    first = "projector_f" if case.meta["pal"] == "b" else "projector"
    names = {"f": first, "g": "projectors_gk", "prototypes": "P", "user": "W", "logit_scale": "logit_scale"}
    for name, value in parameters.items():
        if value.requires_grad:
            groups.setdefault(names[name.split(".")[0]], []).append(value)
    made = {group: torch.optim.Adam(members, **rates[group]) for group, members in groups.items()}
    return [*made.values(), *([made["projector"]] if case.meta["pal"] == "a" else [])]


def train(case: Case, head: TrainedHead) -> tuple[list[float], Parameters]:
    """Return the losses of the file's steps and the parameters after them."""
    parameters, batch, objective = learned(head), batch_of(case, head), objective_of(case, head)
    steps, losses = optimizers(case, parameters), []
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


def published_state(head: TrainedHead, parameters: Parameters) -> dict[str, torch.Tensor]:
    state = to_state(TrainedHead(head.shape, parameters, head.users, {}))
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def test_there_are_reference_files() -> None:
    if not FILES:
        pytest.skip(f"no reference files in {FOLDER}; name their folder by PALCACHE_REFERENCE_DIR")
    assert all(read_case(path).meta["pal"] in {"a", "b"} for path in FILES)


def test_scores_and_loss(case: Case) -> None:
    head = head_of(case)
    y_hat = y_hat_of(case, head, head.parameters, training=True)
    torch.testing.assert_close(y_hat, case.tensors["out.y_hat"], rtol=1e-5, atol=1e-5)
    batch = batch_of(case, head)
    loss = objective_of(case, head)(head.parameters, batch, updates={}, counts=counts_of(case, batch, head))
    assert float(loss) == pytest.approx(float(case.tensors["out.losses"][0]), abs=1e-5, rel=1e-5)
    if "out.accuracy_all_tokens" in case.tensors:
        margins = y_hat if case.meta["pal"] == "a" else y_hat[..., 1] - y_hat[..., 0]
        right = token_accuracy(margins, batch.y, batch.divergence, batch.end).mean()
        assert float(right) == pytest.approx(float(case.tensors["out.accuracy_all_tokens"]), abs=1e-6)


def test_gradients(case: Case) -> None:
    head = head_of(case)
    parameters, batch = learned(head), batch_of(case, head)
    objective_of(case, head)(parameters, batch, updates={}, counts=counts_of(case, batch, head)).backward()  # type: ignore[no-untyped-call]
    gradients = {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in parameters.items()
    }
    ours, theirs = published_state(head, gradients), part(case, "grad.")
    assert theirs
    largest = max(float(value.abs().max()) for value in theirs.values())
    for name, want in theirs.items():
        # relative to the gradient's own size, and where rounding is all there is (a bias that cancels) to the largest
        allowed = 1e-4 * float(want.abs().max()) + 1e-6 * largest
        assert float((ours[name] - want).abs().max()) <= allowed, name
    absent = {name for name in ours if name.startswith("user_learner.W.")} - theirs.keys()
    assert all(not ours[name].any() for name in absent), "a user outside the batch has a gradient"


def test_training(case: Case) -> None:
    head = head_of(case)
    losses, parameters = train(case, head)
    if case.meta["pal"] == "b":
        assert losses == pytest.approx(case.tensors["out.losses"].tolist(), abs=1e-4, rel=1e-4)
        ours = published_state(head, parameters)
        theirs = part(case, "final.")
        assert ours.keys() == theirs.keys()
        for name, want in theirs.items():
            torch.testing.assert_close(ours[name], want, rtol=1e-4, atol=1e-4, msg=name)
    if "out.y_hat_eval" in case.tensors:
        y_hat = y_hat_of(case, head, parameters, training=False)
        torch.testing.assert_close(y_hat, case.tensors["out.y_hat_eval"], rtol=1e-4, atol=1e-4)


def test_fit_takes_the_published_steps(case: Case) -> None:
    rates = case.meta["optimizer"]
    if case.meta["pal"] == "a":
        pytest.skip("the published optimizer steps PAL-A's projector twice")
    assert rates["projector_f"] == rates["projectors_gk"]
    assert not rates["W"]["weight_decay"]
    head, base = head_of(case), objective_of(case, head_of(case)).config
    batch, steps = batch_of(case, head), case.meta["steps"]
    n, t = batch.left.shape[:2]
    data = TokenData(
        RaggedRows(batch.prompts.flatten(0, 1), torch.arange(n + 1) * t),
        RaggedRows(torch.cat([batch.left, batch.right]).flatten(0, 1), torch.arange(2 * n + 1) * t),
        torch.arange(n),
        torch.arange(n),
        torch.arange(n) + n,
        batch.user,
        batch.y,
        head.users,
        alignment="position",
        span=torch.stack([batch.divergence, batch.end], dim=-1),
    )
    config = FitConfig.from_mapping(
        base.to_dict()
        | {"batch_size": n, "epochs": steps, "evaluations": steps, "patience": 0, "optimizer": "adam", "warmup": 0.0,
           "schedule": "constant", "lr": rates["projector_f"]["lr"], "weight_decay": rates["projector_f"]["weight_decay"],
           "lr_users": rates["W"]["lr"], "lr_scale": rates["logit_scale"]["lr"], "lr_prototypes": rates["P"]["lr"]}
    )  # fmt: skip
    states: list[FitState] = []
    start = FitState(0, head.parameters, head.parameters, {}, ())
    result = fit(head.shape, data, data, config, on_state=states.append, state=start)
    losses = [row.train_loss for row in result.history]
    assert losses == pytest.approx(case.tensors["out.losses"].tolist(), abs=1e-4, rel=1e-4)
    ours = published_state(head, states[-1].parameters)
    for name, want in part(case, "final.").items():
        torch.testing.assert_close(ours[name], want, rtol=1e-4, atol=1e-4, msg=name)
