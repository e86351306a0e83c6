"""Token-level training: palcache's steps over all comparisons at once against a Python loop over comparisons.

Run with `python -m benchmarks.token_loss`; it needs no data. Both sides have the same tensors, hidden states padded to t
tokens as the published training has them, and give the same numbers. The loop takes one comparison after the other: project
its states at all positions, score, slice the span, cross-entropy of its positions, weigh, append; then the mean. The first
table begins at rewards, so that it has the loss and its gradient alone; the second has whole steps, palcache's packing of the
spans included. Times are CPU seconds of one thread, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from palcache.choices import TokenWeighting
from palcache.configs import FitConfig
from palcache.heads import PalB, Parameters
from palcache.losses import position_weights, token_losses
from palcache.objectives import Objective
from palcache.tensors import PairBatch
from palcache.token_batches import TokenBatch


@dataclass(frozen=True, slots=True)
class Timing:
    """Median CPU seconds of both sides and their ratio."""

    loop: float
    ours: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.loop / self.ours


@dataclass(frozen=True, slots=True)
class Dense:
    """n comparisons as the published training has them: states (n, t, d), spans [begin, end), users and answers."""

    left: torch.Tensor
    right: torch.Tensor
    prompts: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    user: torch.Tensor
    y: torch.Tensor


def make_dense(n: int, t: int, d: int, *, longest: int = 64, seed: int = 0) -> Dense:
    """Return random hidden states with spans of one to `longest` positions."""
    generator = torch.Generator().manual_seed(seed)
    left, right, prompts = (torch.randn(n, t, d, generator=generator) for _ in range(3))
    begin = torch.randint(0, longest // 2, (n,), generator=generator)
    end = begin + 1 + (torch.rand(n, generator=generator) * (longest - begin)).long()
    y = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    return Dense(left, right, prompts, begin, end.clamp(max=longest), torch.arange(n) % 10, y)


Rewards = tuple[torch.Tensor, torch.Tensor]
"""Of both responses at every position, (n, t) each."""


def loop_loss(rewards: Rewards, dense: Dense, weighting: TokenWeighting) -> torch.Tensor:
    """Return the mean loss of rewards, one comparison after the other."""
    left, right = rewards
    losses = []
    for i in range(len(left)):
        begin, end = int(dense.begin[i]), int(dense.end[i])
        scores = torch.stack([left[i, begin:end], right[i, begin:end]], dim=-1)
        losses.append(_one(scores, dense.y[i], weighting))
    return torch.stack(losses).mean()


def _one(scores: torch.Tensor, y: torch.Tensor, weighting: TokenWeighting) -> torch.Tensor:
    m = len(scores)
    target = ((y + 1) / 2).long().expand(m)
    losses = F.cross_entropy(scores, target, reduction="none")
    if weighting == "mean":
        return losses.mean()
    if weighting == "only_last":
        return losses[-1]
    return (losses * torch.arange(1, m + 1)).sum() / (m * (m + 1) / 2)


def our_loss(rewards: Rewards, dense: Dense, weighting: TokenWeighting) -> torch.Tensor:
    """Return the same mean loss, all comparisons at once."""
    left, right = rewards
    rank = torch.arange(left.shape[1]) - dense.begin.unsqueeze(-1) + 1
    weights = position_weights(weighting, rank, (dense.end - dense.begin).unsqueeze(-1))
    return token_losses("cross_entropy", right - left, dense.y.unsqueeze(-1), weights).sum() / len(left)


def time_in_turn(loop: Callable[[], object], ours: Callable[[], object], rounds: int, *, repeats: int = 1) -> Timing:
    """Return the medians of two jobs timed in turn on one thread, after one warm-up each; ours runs `repeats` times."""
    seconds: tuple[list[float], list[float]] = ([], [])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    loop(), ours()
    for _ in range(rounds):
        for job, times, kept in ((loop, 1, seconds[0]), (ours, repeats, seconds[1])):
            start = time.process_time()
            for _ in range(times):
                job()
            kept.append((time.process_time() - start) / times)
    torch.set_num_threads(threads)
    return Timing(statistics.median(seconds[0]), statistics.median(seconds[1]))


def time_losses(n: int, t: int, weighting: TokenWeighting, *, rounds: int = 7) -> Timing:
    """Time the loss and its gradient on the rewards of n comparisons."""
    dense = make_dense(n, t, 1, longest=t)
    drawn = torch.randn(2, n, t, generator=torch.Generator().manual_seed(1))
    rewards = drawn[0].clone().requires_grad_(), drawn[1].clone().requires_grad_()

    def job(loss: Callable[[Rewards, Dense, TokenWeighting], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(loss(rewards, dense, weighting), rewards)[1]

    torch.testing.assert_close(job(loop_loss), job(our_loss), rtol=1e-4, atol=1e-7)
    return time_in_turn(lambda: job(loop_loss), lambda: job(our_loss), rounds, repeats=20)


def time_steps(n: int, t: int, d: int, *, aligned: bool, rounds: int = 3) -> Timing:
    """Time the loss and all gradients of PAL-B with k = 2 on the hidden states of n comparisons.

    Args:
        n: comparisons.
        t: tokens to which states are padded; spans end at 64.
        d: width, and that of the preference space.
        aligned: a prompt has its state at the response's position, as published; else one vector.
        rounds: timings of each side.
    """
    dense, shape = make_dense(n, t, d), PalB(d, d, 2, 10, "mlp2-gelu-dropout0", 1.0, start="published")
    span = torch.stack([dense.begin, dense.end], -1)
    prompts = dense.prompts if aligned else dense.prompts[:, -1]
    objective = Objective(shape, FitConfig(token_weighting="cumulative"))  # noqa: S106 - no password
    parameters: Parameters = shape.initial(torch.Generator().manual_seed(0))
    learned = [value.requires_grad_() for value in parameters.values()]

    def ours() -> tuple[torch.Tensor, ...]:
        batch = TokenBatch.from_dense(dense.left, dense.right, prompts, span, dense.user, dense.y)
        return torch.autograd.grad(objective(parameters, batch, updates={}), learned)

    own = torch.arange(2 * t)
    met = own[:t] if aligned else torch.zeros(t, dtype=torch.int64)

    def loop() -> tuple[torch.Tensor, ...]:
        losses = []
        for i in range(n):
            states, prompt = torch.cat([dense.left[i], dense.right[i]]), prompts[i] if aligned else prompts[i : i + 1]
            user, y = dense.user[i].expand(t), dense.y[i].expand(t)
            rewards = shape.rewards(parameters, PairBatch(prompt, met, states, own[:t], own[t:], user, y))
            scores = rewards[int(dense.begin[i]) : int(dense.end[i])]
            losses.append(_one(scores, dense.y[i], "cumulative"))
        return torch.autograd.grad(torch.stack(losses).mean(), learned)

    for mine, theirs in zip(ours(), loop(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)
    return time_in_turn(loop, ours, rounds, repeats=3)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    n, t = options.batch, options.tokens
    print("| loss and gradient | loop, us per comparison | palcache, us per comparison | ratio |\n|---|---|---|---|")
    for weighting in ("mean", "cumulative", "only_last"):
        print(_line(f"`{weighting}`, n = {n}, t = {t}", n, time_losses(n, t, weighting)), flush=True)
    print("\n| whole step | loop, us per comparison | palcache, us per comparison | ratio |\n|---|---|---|---|")
    for d, padded, aligned in ((16, t, False), (64, t, False), (16, 512, True), (16, 512, False), (64, 512, False)):
        what = "a state of the prompt at each position" if aligned else "one vector of the prompt"
        name = f"d = p = {d}, n = {n}, padded to {padded}, {what}"
        print(_line(name, n, time_steps(n, padded, d, aligned=aligned)), flush=True)


def _line(name: str, n: int, timing: Timing) -> str:
    return f"| {name} | {1e6 * timing.loop / n:.1f} | {1e6 * timing.ours / n:.2f} | {timing.ratio:.0f}x |"


if __name__ == "__main__":
    main()
