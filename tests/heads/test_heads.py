"""Every head: one protocol, stacking on a leading axis, counts of parameters, and files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from palcache.checkpoints import TrainedHead, load_head, save_head
from palcache.choices import Score, UserForm
from palcache.configs import HeadConfig
from palcache.errors import CacheError, InputError
from palcache.heads import (
    Head,
    IdealPointHead,
    PalB,
    Parameters,
    SolvedHead,
    blind_config,
    build_head,
    head_from_dict,
    head_to_dict,
)
from palcache.heads.projectors import is_buffer
from palcache.heads.protocols import group_of, trained_names
from tests.building import all_pairs, all_tokens, generator, make_data, make_token_data

SCORES: tuple[Score, ...] = get_args(Score)
FORMS: tuple[UserForm, ...] = get_args(UserForm)
HEADS: dict[str, dict[str, Any]] = {
    **{f"pal-b {score}": {"score": score} for score in SCORES},
    **{f"pal-a {score}": {"head": "pal-a", "score": score} for score in SCORES},
    **{f"pal-a {form}": {"head": "pal-a", "user_form": form} for form in FORMS},
    "pal-b batchnorm": {"projector": "mlp2-gelu-dropout0-batchnorm-nobias"},
    "pal-b partition": {"mixture": "partition"},
    "pal-b published": {"start": "published", "k": 1},
    "pal-a published": {"head": "pal-a", "start": "published", "k": 4},
    "bradley-terry linear": {"head": "bradley-terry", "projector": "identity"},
    "bradley-terry mlp": {"head": "bradley-terry"},
    "low-rank simplex": {"head": "low-rank"},
    "low-rank free": {"head": "low-rank", "user_weights": "free"},
    "pca": {"head": "pca"},
    "per-user": {"head": "per-user"},
}  # fmt: skip


def build(name: str, *, d: int = 7, users: int = 5) -> Head:
    options: dict[str, Any] = {"k": 3, "p": 4, "projector": "mlp1-relu-dropout0"}
    return build_head(HeadConfig(**(options | HEADS[name])), d=d, users=users)


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> Head:
    return build(request.param)


def test_protocol(head: Head) -> None:
    assert isinstance(head, Head)
    assert isinstance(head, IdealPointHead) == (head_to_dict(head)["head"] in {"pal-a", "pal-b"})
    assert isinstance(head, SolvedHead) == head.closed_form
    parameters = head.initial(generator(0))
    again = head.initial(generator(0))
    assert all(torch.equal(parameters[name], again[name]) for name in parameters)
    assert head.mixtures(parameters).shape[0] == head.users
    margins = head.margins(parameters, all_pairs(make_data()))
    assert margins.shape == (40,)
    assert torch.isfinite(margins).all()


def test_swapping_the_sides_flips_the_margin(head: Head) -> None:
    parameters, batch = head.initial(generator(1)), all_pairs(make_data())
    swapped = dataclasses.replace(batch, response_1=batch.response_2, response_2=batch.response_1)
    torch.testing.assert_close(head.margins(parameters, swapped), -head.margins(parameters, batch))


def test_heads_stack_on_a_leading_axis(head: Head) -> None:
    """Parameters of three heads, stacked, give under `vmap` what each gives alone, and the same gradients."""
    alone = [head.initial(generator(seed)) for seed in range(3)]
    stacked = {name: torch.stack([parameters[name] for parameters in alone]) for name in alone[0]}
    batch = all_pairs(make_data())

    def total(learned: Parameters, rest: Parameters) -> tuple[torch.Tensor, Parameters]:
        updates: Parameters = {}
        return head.margins({**learned, **rest}, batch, updates=updates).square().mean(), updates

    def split(parameters: Parameters) -> tuple[Parameters, Parameters]:
        chosen = set(trained_names(head, parameters)) or {n for n, v in parameters.items() if v.is_floating_point()}
        return ({n: v for n, v in parameters.items() if n in chosen},
                {n: v for n, v in parameters.items() if n not in chosen})  # fmt: skip

    step = torch.func.grad(total, has_aux=True)
    gradients, updates = torch.func.vmap(step)(*split(stacked))
    for i, parameters in enumerate(alone):
        want, own = step(*split(parameters))
        for name in want:
            torch.testing.assert_close(gradients[name][i], want[name], rtol=1e-4, atol=1e-4)
        assert own.keys() == updates.keys()
        for name, value in own.items():
            torch.testing.assert_close(updates[name][i], value)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("name", [name for name in HEADS if name.startswith("pal")])
def test_rewards_of_tokens_stack_and_agree_with_those_of_pairs(name: str, aligned: bool) -> None:
    """Each position of a span is scored as a comparison of its two states and its prompt would be."""
    head, data = build(name, users=4), make_token_data(aligned=aligned)
    assert isinstance(head, IdealPointHead)
    parameters, batch = head.initial(generator(2)), all_tokens(data)
    scores, pairs = head.rewards(parameters, batch.pairs), batch.pairs
    assert pairs.comparison is not None
    assert scores.shape == (len(pairs.comparison), 2)
    each = dataclasses.replace(
        pairs, user=pairs.user[pairs.comparison], y=pairs.y[pairs.comparison], comparison=None,
        prompt=pairs.prompt if aligned else pairs.prompt[pairs.comparison],
    )  # fmt: skip
    torch.testing.assert_close(head.rewards(parameters, each), scores)
    margins = head.margins(parameters, pairs)
    torch.testing.assert_close(scores[:, 1] - scores[:, 0], margins, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.margins(parameters, each), margins)
    stacked = {name: torch.stack([value, value]) for name, value in parameters.items()}
    both = torch.func.vmap(lambda p: head.rewards(p, pairs))(stacked)
    torch.testing.assert_close(both[1], scores)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 6),
    p=st.integers(1, 5),
    k=st.integers(1, 4),
    kind=st.sampled_from(["pal-a", "pal-b"]),
    seed=st.integers(0, 99),
)
def test_any_shape(d: int, p: int, k: int, kind: Any, seed: int) -> None:
    head = build_head(HeadConfig(head=kind, k=k, p=p, projector="mlp1-gelu-dropout0-batchnorm"), d=d, users=2)
    parameters = head.initial(generator(seed))
    batch = all_pairs(make_data(1, 1, d))
    updates: Parameters = {}
    assert torch.isfinite(head.margins(parameters, batch, updates=updates)).all(), (
        "one comparison has defined statistics"
    )
    assert all(torch.isfinite(value.float()).all() for value in updates.values())


def test_zero_vectors_have_zero_cosine_and_finite_gradients() -> None:
    head = build_head(HeadConfig(k=2, p=3, projector="mlp1-relu-dropout0-nobias"), d=7, users=5)
    parameters = {name: value.requires_grad_() for name, value in head.initial(generator(0)).items()}
    batch = dataclasses.replace(all_pairs(make_data()), responses=torch.zeros(11, 7))
    margins = head.margins(parameters, batch)
    assert not margins.any()
    margins.sum().backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is None or torch.isfinite(value.grad).all() for value in parameters.values())


def test_fixed_scale() -> None:
    fixed = {
        score: "logit_scale" not in trained_names(build(f"pal-b {score}"), {"logit_scale": torch.ones(())})
        for score in SCORES
    }
    assert fixed == {"dist": True, "dist_normalized": True, "dist_logistic": False, "angle": False, "angle_hinge": True}
    assert [group_of(name) for name in ("user.logits", "prototypes", "logit_scale", "g.0.weight")] == [
        "users", "prototypes", "scale", "projectors"]  # fmt: skip


def test_batchnorm_statistics_follow_each_other() -> None:
    """Left rows, then right rows, then prompts, each once; in evaluation the running statistics are used."""
    head = build("pal-b batchnorm")
    parameters, batch = head.initial(generator(0)), all_pairs(make_data())
    updates: Parameters = {}
    head.margins(parameters, batch, updates=updates)
    assert updates["f.0.norm.count"] == 2
    assert updates["g.1.norm.count"].tolist() == [1, 1, 1]
    assert all(is_buffer(name) for name in updates)
    assert not torch.equal(head.margins({**parameters, **updates}, batch), head.margins(parameters, batch))


def test_files_hold_every_shape(head: Head, tmp_path: Path) -> None:
    trained = TrainedHead(head, head.initial(generator(4)), tuple("abcde"), {"seed": 4})
    save_head(tmp_path / "head.safetensors", trained)
    back = load_head(tmp_path / "head.safetensors")
    assert (back.shape, back.users, back.about) == (head, trained.users, trained.about)
    assert all(torch.equal(back.parameters[name], value) for name, value in trained.parameters.items())


def test_a_head_of_the_first_version_loads(tmp_path: Path) -> None:
    shape = PalB(7, 4, 3, 2, "mlp1-relu-dropout0", 1.0)
    save_head(tmp_path / "new", TrainedHead(shape, shape.initial(generator(0)), ("a", "b"), {}))
    with safe_open(tmp_path / "new", "pt") as file:
        metadata = file.metadata()
    described = {
        "d": 7,
        "head": "pal-b",
        "k": 3,
        "p": 4,
        "projector": "mlp1-relu-dropout0",
        "temperature": 1.0,
        "users": 2,
    }
    whole = json.loads(metadata["palcache"])
    assert whole["shape"] == described, "the first version's description is written unchanged"
    metadata = {"palcache": json.dumps(whole | {"shape": described})}
    save_file(load_file(tmp_path / "new"), tmp_path / "old", metadata)
    assert load_head(tmp_path / "old").shape == shape


def test_unknown_kinds_and_fields() -> None:
    with pytest.raises(CacheError, match="of kind 'pal-z'; this version of palcache knows pal-b, pal-a"):
        head_from_dict({"head": "pal-z"})
    with pytest.raises(CacheError, match="a shape that this version does not know"):
        head_from_dict({"head": "per-user", "d": 3, "users": 2, "depth": 4})


def test_yardstick_beside_a_head() -> None:
    assert blind_config(HeadConfig(k=5)).k == 1
    assert blind_config(HeadConfig(head="low-rank", user_weights="free")).head == "bradley-terry"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"projector": "mlp2-relu-dropout0-residual", "p": 4}, r"a residual projector needs d = p: choose --p 7"),
        ({"projector": "identity", "p": 4, "head": "pal-a"}, r"identity needs d = p: choose --p 7"),
    ],
)
def test_projectors_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_head(HeadConfig(**options), d=7, users=2)


@pytest.mark.parametrize(
    "name", ["mlp2", "mlp-relu-dropout0", "mlp2-tanh-dropout0", "mlp2-relu-dropout0-nobias-batchnorm", "MLP2"]
)
def test_names_outside_the_grammar(name: str) -> None:
    with pytest.raises(
        InputError, match=r"expected identity or mlp\{L\}-\{relu\|gelu\|linear\}-dropout\{D\}\[-residual\]"
    ):
        HeadConfig(projector=name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "low-rank", "score": "angle"}, "Got the score angle for low-rank; scores belong to pal-a and pal-b"),
        ({"user_form": "Pw"}, "Got the user form Pw for pal-b; user forms belong to pal-a"),
        ({"temperature": 0.0}, "expected a finite number above 0"),
        ({"k": 0}, "expected at least one prototype"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        HeadConfig(**options)


@pytest.mark.parametrize("responses", [11, 60, 400])
def test_batchnorm_of_bradley_terry_sees_the_references_alone(responses: int) -> None:
    """Whether a table is read whole, with padding or by reference, no other row has a part in the statistics."""
    data = make_data(n=50, responses=responses)
    head = HeadConfig(head="bradley-terry", p=4, projector="mlp1-relu-dropout0-batchnorm")
    shape = build_head(head, d=data.width, users=len(data.users))
    parameters, updates, rows = shape.initial(generator(0)), dict[str, torch.Tensor](), torch.arange(50)
    shape.margins(parameters, data.batch(rows), updates=updates)
    expected = torch.zeros(4)
    for side in (data.response_1, data.response_2):  # as published: one pass after the other
        inner = data.responses.take(side[rows]) @ parameters["f.0.weight"].T + parameters["f.0.bias"]
        expected = 0.9 * expected + 0.1 * inner.mean(0)
    torch.testing.assert_close(updates["f.0.norm.mean"], expected, atol=1e-6, rtol=1e-5)
