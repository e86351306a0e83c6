"""Token-level training: palcache's loss over all comparisons at once against a Python loop over comparisons.

Run with `python -m benchmarks.token_loss`; it needs no data. Both sides have the same tensors and give the same numbers:
rewards of n comparisons at t positions with a span each, to the loss and its gradient. The loop takes one comparison after
the other: slice its span, cross-entropy of its positions, weigh, append; then the mean. A second table has whole steps
(projectors, loss, gradients): there the loop's side projects and scores comparison by comparison as well, and what is
left is the arithmetic of the projectors, which both sides share. Times are CPU seconds of one thread, so that other work on
the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from palcache.choices import TokenWeighting
from palcache.configs import FitConfig
from palcache.heads import PalB, Parameters
from palcache.losses import token_loss
from palcache.objectives import Objective
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


def make_batch(n: int, t: int, d: int, *, seed: int = 0) -> TokenBatch:
    """Return random hidden states with spans of one to t positions."""
    generator = torch.Generator().manual_seed(seed)

    def states() -> torch.Tensor:
        return torch.randn(n, t, d, generator=generator)

    begin = torch.randint(0, t // 2, (n,), generator=generator)
    end = begin + 1 + (torch.rand(n, generator=generator) * (t - begin)).long()
    y = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    return TokenBatch(states(), states(), states(), begin, end.clamp(max=t), torch.arange(n) % 10, y)


Rewards = tuple[torch.Tensor, torch.Tensor]
"""Of both responses at every position, (n, t) each."""


def loop_loss(rewards: Rewards, batch: TokenBatch, weighting: TokenWeighting) -> torch.Tensor:
    """Return the mean loss of rewards, one comparison after the other."""
    left, right = rewards
    losses = []
    for i in range(len(left)):
        begin, end = int(batch.divergence[i]), int(batch.end[i])
        if end <= begin:
            losses.append(left.new_zeros(()))
            continue
        scores = torch.stack([left[i, begin:end], right[i, begin:end]], dim=-1)
        losses.append(_one(scores, batch.y[i], weighting))
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


def our_loss(rewards: Rewards, batch: TokenBatch, weighting: TokenWeighting) -> torch.Tensor:
    """Return the same mean loss, all comparisons at once."""
    left, right = rewards
    return token_loss("cross_entropy", right - left, batch.y, batch.divergence, batch.end, weighting).mean()


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
    batch = make_batch(n, t, 1)
    drawn = torch.randn(2, n, t, generator=torch.Generator().manual_seed(1))
    rewards = drawn[0].clone().requires_grad_(), drawn[1].clone().requires_grad_()

    def job(loss: Callable[[Rewards, TokenBatch, TokenWeighting], torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(loss(rewards, batch, weighting), rewards)[1]

    torch.testing.assert_close(job(loop_loss), job(our_loss), rtol=1e-4, atol=1e-7)
    return time_in_turn(lambda: job(loop_loss), lambda: job(our_loss), rounds, repeats=20)


def time_steps(n: int, t: int, d: int, weighting: TokenWeighting, *, rounds: int = 5) -> Timing:
    """Time whole training steps of PAL-B with k = 2 on the hidden states of n comparisons."""
    batch, shape = make_batch(n, t, d), PalB(d, d, 2, 10, "mlp2-gelu-dropout0", 1.0, start="published")
    objective = Objective(shape, FitConfig(token_weighting=weighting, prompt_alignment="position"))
    parameters: Parameters = shape.initial(torch.Generator().manual_seed(0))
    learned = [value.requires_grad_() for value in parameters.values()]

    def ours() -> object:
        return torch.autograd.grad(objective(parameters, batch, updates={}), learned)

    def loop() -> object:
        losses = []
        for i in range(n):
            at = slice(i, i + 1)
            names = ("left", "right", "prompts", "divergence", "end", "user", "y")
            single = replace(batch, **{name: getattr(batch, name)[at] for name in names})
            losses.append(loop_loss(_sides(shape.token_scores(parameters, single)), single, weighting))
        return torch.autograd.grad(torch.stack(losses).mean(), learned)

    return time_in_turn(loop, ours, rounds)


def _sides(scores: torch.Tensor) -> Rewards:
    return scores[..., 0], scores[..., 1]


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
    for d in (16, 64, 256):
        print(_line(f"d = p = {d}, n = {n}, t = {t}", n, time_steps(n, t, d, "cumulative")), flush=True)


def _line(name: str, n: int, timing: Timing) -> str:
    return f"| {name} | {1e6 * timing.loop / n:.1f} | {1e6 * timing.ours / n:.2f} | {timing.ratio:.0f}x |"


if __name__ == "__main__":
    main()
