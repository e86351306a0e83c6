"""PAL-B computes what `pal.md` says: margins of cosines to a user's mixture of prototypes, by prompt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import grad, vmap

from palcache.configs import HeadConfig
from palcache.errors import InputError
from palcache.heads import PalB, Parameters
from palcache.heads.scores import scale
from palcache.losses import cross_entropy
from palcache.noises import Noise
from palcache.tensors import PairBatch
from tests.heads.test_projectors import doubles, reference

Floats = npt.NDArray[np.float64]


def random_batch(*, n: int, d: int, users: int, prompts: int = 3, responses: int = 5, seed: int = 0) -> PairBatch:
    """Return comparisons in float64 over few prompts and responses; the last one compares a response with itself."""
    random = np.random.default_rng(seed)
    response = random.integers(responses, size=(2, n))
    response[1, -1] = response[0, -1]
    return PairBatch(
        prompts=torch.from_numpy(random.normal(size=(prompts, d))),
        prompt=torch.from_numpy(random.integers(prompts, size=n)),
        responses=torch.from_numpy(random.normal(size=(responses, d))),
        response_1=torch.from_numpy(response[0]),
        response_2=torch.from_numpy(response[1]),
        user=torch.from_numpy(random.integers(users, size=n)),
        y=torch.from_numpy(random.choice([-1.0, 0.0, 1.0], size=n)),
    )


def random_parameters(head: PalB, seed: int) -> Parameters:
    """Return float64 parameters in which users and prototypes differ."""
    generator = torch.Generator().manual_seed(seed)
    drawn = doubles(head.initial(generator))
    noise = {name: torch.randn(value.shape, generator=generator, dtype=torch.float64) for name, value in drawn.items()}
    return {name: value + 0.4 * noise[name] for name, value in drawn.items()}


def cosine(left: Floats, right: Floats) -> float:
    return float(left @ right / np.sqrt((left @ left) * (right @ right)))


def reference_margin(head: PalB, parameters: Parameters, batch: PairBatch, row: int, mixture: Floats) -> float:
    """Return one margin, step by step as `pal.md` writes it."""
    f = {name.removeprefix("f."): value for name, value in parameters.items() if name.startswith("f.")}
    g = {name.removeprefix("g."): value for name, value in parameters.items() if name.startswith("g.")}
    prompt = batch.prompts[batch.prompt[row]].numpy()[None]
    ideal = sum(mixture[j] * reference(head.prototypes, g, prompt, j)[0] for j in range(head.k))
    assert isinstance(ideal, np.ndarray)
    rewards = []
    for side in (batch.response_1, batch.response_2):
        item = reference(head.items, f, batch.responses[side[row]].numpy()[None], None)[0]
        rewards.append(min(100.0, float(np.exp(parameters["logit_scale"].item()))) * cosine(item, ideal))
    return rewards[1] - rewards[0]


def reference_mixture(head: PalB, parameters: Parameters, user: int) -> Floats:
    logits = parameters["user.logits"][user].numpy() / head.temperature
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


PROJECTORS = (
    "mlp2-relu-dropout1",
    "mlp1-gelu-dropout05",
    "mlp0-linear-dropout0",
    "mlp1-linear-dropout0-nobias",
    "mlp1-gelu-dropout0-residual",
    "mlp2-linear-dropout0-residual-nobias",
    "identity",
)


@st.composite
def heads(draw: st.DrawFn) -> PalB:
    projector = draw(st.sampled_from(PROJECTORS))
    d = draw(st.integers(2, 8))
    p = d if "residual" in projector or projector == "identity" else draw(st.integers(2, 7))
    users, k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return PalB(d, p, k, users, projector, draw(st.sampled_from([1.0, 0.3, 5.0])))


@settings(max_examples=60, deadline=None)
@given(head=heads(), n=st.integers(1, 9), seed=st.integers(0, 999))
@example(head=PalB(8, 5, 3, 4, "mlp2-relu-dropout1", 0.5), n=9, seed=1)
def test_margins_equal_the_reference(head: PalB, n: int, seed: int) -> None:
    parameters = random_parameters(head, seed)
    batch = random_batch(n=n, d=head.d, users=head.users, seed=seed)
    found = head.margins(parameters, batch)
    assert found.shape == (n,)
    for row in range(n):
        mixture = reference_mixture(head, parameters, int(batch.user[row]))
        expected = reference_margin(head, parameters, batch, row, mixture)
        assert float(found[row]) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(found[-1]) == 0  # a response against itself


def test_mixtures_at_hand_replace_the_users() -> None:
    head = PalB(6, 4, 3, 5, "mlp1-relu-dropout0", 1.0)
    parameters, batch = random_parameters(head, 1), random_batch(n=7, d=6, users=5)
    mixtures = np.random.default_rng(1).dirichlet([1, 1, 1], size=7)
    found = head.margins(parameters, batch, mixtures=torch.from_numpy(mixtures))
    expected = [reference_margin(head, parameters, batch, row, mixtures[row]) for row in range(7)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)


def nearer_item() -> tuple[PalB, Parameters, PairBatch]:
    """Return a head without projectors and a comparison whose second response lies nearer to the prompt."""
    head = PalB(3, 3, 1, 1, "identity", 1.0)
    parameters = {"user.logits": torch.zeros(1, 1), "logit_scale": torch.tensor(1.0)}
    prompts, responses = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.1, 5.0, 0.0], [0.9, 0.1, 0.0]])
    zero, one = torch.tensor([0]), torch.tensor([1])
    return head, parameters, PairBatch(prompts, zero, responses, zero, one, zero, torch.tensor([1.0]))


def test_the_nearer_response_is_preferred() -> None:
    head, parameters, batch = nearer_item()
    margin = head.margins(parameters, batch)
    assert float(margin) > 0
    assert float(cross_entropy(margin, batch.y)) < np.log(2) < float(cross_entropy(-margin, batch.y))
    swapped = replace(batch, response_1=batch.response_2, response_2=batch.response_1)
    assert float(head.margins(parameters, swapped)) == -float(margin)


def test_a_users_prototype_decides() -> None:
    """Two users at opposite corners, two prototypes at opposite ends: opposite preferences, and none in the middle."""
    head = PalB(2, 2, 2, 3, "mlp0-linear-dropout0-nobias", 1.0)
    parameters = {
        "f.0.weight": torch.eye(2),
        "g.0.weight": torch.stack([torch.eye(2), -torch.eye(2)]),
        "user.logits": torch.tensor([[50.0, 0.0], [0.0, 50.0], [0.0, -1.0]]),
        "logit_scale": torch.tensor(0.0),
    }
    zero = torch.zeros(3, dtype=torch.int64)
    batch = PairBatch(
        torch.tensor([[1.0, 0.0]]), zero, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), zero, zero + 1, torch.arange(3),
        torch.ones(3),
    )  # fmt: skip
    assert head.margins(parameters, batch).tolist() == [2.0, -2.0, 2.0]


def test_k_1_ignores_the_users() -> None:
    head = PalB(5, 3, 1, 4, "mlp1-relu-dropout0", 1.0)
    parameters, batch = random_parameters(head, 2), random_batch(n=6, d=5, users=4)
    other = {**parameters, "user.logits": parameters["user.logits"] + torch.arange(4)[:, None]}
    assert torch.equal(head.margins(parameters, batch), head.margins(other, batch))
    assert head.mixtures(parameters).tolist() == [[1.0]] * 4


def test_equal_prototypes_make_all_users_alike() -> None:
    head = PalB(5, 3, 2, 4, "mlp1-relu-dropout0", 1.0)
    parameters, batch = random_parameters(head, 3), random_batch(n=6, d=5, users=4)
    same = {name: v[:1].expand_as(v) if name.startswith("g.") else v for name, v in parameters.items()}
    moved = {**same, "user.logits": parameters["user.logits"].flip(0)}
    assert torch.allclose(head.margins(same, batch), head.margins(moved, batch))


def test_rewards_do_not_depend_on_the_length_of_vectors() -> None:
    head, parameters, batch = nearer_item()
    longer = replace(batch, responses=batch.responses * torch.tensor([[3.0], [0.2]]), prompts=batch.prompts * 7)
    assert torch.allclose(head.margins(parameters, batch), head.margins(parameters, longer))


def test_the_scale_is_clamped_at_100() -> None:
    assert float(scale({"logit_scale": torch.tensor(np.log(99.0))})) == pytest.approx(99)
    assert float(scale({"logit_scale": torch.tensor(9.0)})) == 100.0
    head, parameters, batch = nearer_item()
    margins = [head.margins({**parameters, "logit_scale": torch.tensor(v)}, batch) for v in (5.0, 9.0)]
    assert torch.equal(*margins)


def test_zero_vectors_have_no_preference_and_no_nan() -> None:
    head, parameters, batch = nearer_item()
    nothing = replace(batch, responses=torch.zeros_like(batch.responses))
    assert head.margins(parameters, nothing).tolist() == [0.0]


def test_many_heads_stack_on_a_leading_axis() -> None:
    head = PalB(6, 4, 3, 5, "mlp2-gelu-dropout0", 0.8)
    batch = random_batch(n=8, d=6, users=5)
    heads = [random_parameters(head, seed) for seed in range(4)]
    stacked = {name: torch.stack([parameters[name] for parameters in heads]) for name in heads[0]}
    found = vmap(lambda parameters: head.margins(parameters, batch))(stacked)
    expected = torch.stack([head.margins(parameters, batch) for parameters in heads])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("k", [1, 2])
def test_gradients_of_many_heads_at_once_are_those_of_each(k: int) -> None:
    head = PalB(6, 4, k, 5, "mlp1-relu-dropout0", 1.0)
    batch = random_batch(n=8, d=6, users=5)

    def loss(parameters: Parameters) -> torch.Tensor:
        return cross_entropy(head.margins(parameters, batch), batch.y).mean()

    heads = [random_parameters(head, seed) for seed in range(3)]
    stacked = {name: torch.stack([parameters[name] for parameters in heads]) for name in heads[0]}
    found = vmap(grad(loss))(stacked)
    for i, parameters in enumerate(heads):
        leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        loss(leaves).backward()  # type: ignore[no-untyped-call]
        for name, leaf in leaves.items():
            expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.testing.assert_close(found[name][i], expected, rtol=1e-8, atol=1e-12)


def test_gradients_equal_finite_differences() -> None:
    head = PalB(4, 3, 2, 3, "mlp1-gelu-dropout0", 0.5)
    batch, parameters = random_batch(n=5, d=4, users=3), random_parameters(head, 4)
    names = sorted(parameters)

    def margins(*values: torch.Tensor) -> torch.Tensor:
        return head.margins(dict(zip(names, values, strict=True)), batch)

    values = [parameters[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(margins, values)


def test_nothing_is_changed_by_a_call() -> None:
    head = PalB(5, 3, 2, 4, "mlp1-relu-dropout2", 1.0)
    parameters, batch = random_parameters(head, 5), random_batch(n=6, d=5, users=4)
    before = {name: value.clone() for name, value in parameters.items()}
    head.margins(parameters, batch, noise=Noise.of(0))
    assert all(torch.equal(before[name], value) for name, value in parameters.items())


def test_dropout_stands_in_items_and_prototypes_in_training_alone() -> None:
    head = PalB(5, 3, 2, 4, "mlp1-relu-dropout5", 1.0)
    parameters, batch = random_parameters(head, 6), random_batch(n=6, d=5, users=4)
    plain = head.margins(parameters, batch)
    assert torch.equal(plain, head.margins(parameters, batch))
    noisy = [head.margins(parameters, batch, noise=Noise.of(seed)) for seed in (1, 1, 2)]
    assert torch.equal(noisy[0], noisy[1])
    assert not torch.equal(noisy[0], noisy[2])
    assert not torch.equal(noisy[0], plain)
    x, drawn = torch.ones(40, 5, dtype=torch.float64), Noise.of(1).at("items", torch.arange(40))
    for project in (head.project_responses, head.project_prompts):
        assert not torch.equal(project(parameters, x, drawn), project(parameters, x))


@pytest.mark.parametrize(("k", "count"), [(1, 1_575_947), (2, 2_363_925)])
def test_learned_parameters_are_as_many_as_published(k: int, count: int) -> None:
    """PAL-B-Tiny on OPT-350m with ten users (d = p = 512), see `pal.md`."""
    head = PalB(512, 512, k, 10, "mlp2-gelu-dropout05", 1.0)
    assert sum(value.numel() for value in head.initial(torch.Generator()).values()) == count


def test_the_start_is_one_map_with_small_differences_and_users_in_the_middle() -> None:
    head = PalB(40, 20, 3, 6, "mlp1-relu-dropout0", 1.0)
    parameters = head.initial(torch.Generator().manual_seed(7))
    assert torch.equal(head.mixtures(parameters), torch.full((6, 3), 1 / 3))
    assert float(parameters["logit_scale"].exp()) == pytest.approx(1 / 0.07)
    weight = parameters["g.0.weight"]
    mean = weight.mean(0)
    assert mean.std() == pytest.approx(1 / np.sqrt(3 * 40), rel=0.1)
    assert 0.02 < float((weight - mean).std() / mean.std()) < 0.15
    generator = torch.Generator().manual_seed(7)
    head.items.initial(generator)
    shared = replace(head.prototypes, copies=1).initial(generator)
    torch.testing.assert_close(mean, shared["0.weight"][0])  # the differences sum to zero
    again = head.initial(torch.Generator().manual_seed(7))
    assert all(torch.equal(value, again[name]) for name, value in parameters.items())
    other = head.initial(torch.Generator().manual_seed(8))
    assert not torch.equal(other["f.0.weight"], parameters["f.0.weight"])


def test_from_config_takes_the_encoders_width_for_p() -> None:
    head = PalB.from_config(HeadConfig(k=2, p=None, projector="identity"), d=9, users=4)
    assert (head.d, head.p, head.k, head.users) == (9, 9, 2, 4)
    assert PalB.from_config(HeadConfig(p=5, temperature=0.3), d=9, users=4).temperature == 0.3


def test_from_config_refuses_a_projector_that_does_not_fit() -> None:
    with pytest.raises(InputError, match="identity needs d = p: choose --p 9"):
        PalB.from_config(HeadConfig(p=5, projector="identity"), d=9, users=4)
