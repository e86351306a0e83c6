"""adapt: 100,000 new users with 10 comparisons each on a head of k = 8, from vectors to mixtures with covariances.

It notes the seconds of the reduction and of the solution, and the largest difference between a user in the batch and the
same user alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from benchmarks.measuring import devices, finish
from benchmarks.results import Row, row
from palcache.checkpoints import TrainedHead
from palcache.configs import HeadConfig
from palcache.heads import PalB
from palcache.tensors import PreferenceData, TensorTable
from palcache.users.posteriors import Gaussian, maximum_a_posteriori
from palcache.users.reductions import ReducedComparisons, reduce_comparisons

USERS, SHOTS, K, D = 100_000, 10, 8, 384
PROMPTS, RESPONSES = 5_000, 20_000
GOAL_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured.

    Attributes:
        users: new users.
        reduce: seconds from vectors to terms of size k.
        solve: seconds from those to mixtures and covariances.
        cpu: seconds of processor time that both took.
        difference: largest absolute difference of a mixture in the batch and alone, over 50 users.
    """

    users: int
    reduce: float
    solve: float
    cpu: float
    difference: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.reduce + self.solve


def run(quick: bool) -> list[Row]:
    """Measure the CPU, and CUDA where it is there."""
    return [_row(measure(quick=quick, device=device), device) for device in devices()]


def _row(found: Figures, device: str) -> Row:
    what = f"seconds for {found.users:,} new users x {SHOTS} comparisons, k = {K}, d = {D}, covariances included"
    unmeasured = row("adapt", what, device, against="-", goal=f"{GOAL_SECONDS:.0f} s")
    note = (
        f"reduce {found.reduce:.1f} s, solve {found.solve:.1f} s; processor time {found.cpu:.1f} s with "
        f"{torch.get_num_threads()} threads; largest difference of a user in the batch and alone {found.difference:.1e}"
    )
    return unmeasured.with_verdict(found.seconds <= GOAL_SECONDS, f"{found.seconds:.1f} s", note=note)


def measure(*, quick: bool = False, device: str = "cpu") -> Figures:
    """Time one adaptation of all users; answers are drawn from the head under random mixtures."""
    generator = torch.Generator().manual_seed(0)
    users = USERS // 100 if quick else USERS
    shape = PalB.from_config(HeadConfig(k=K), d=D, users=1)
    drawn = shape.initial(generator)
    drawn |= {f"g.{name}": value for name, value in shape.prototypes.initial(generator).items()}  # unlike one another
    head = TrainedHead(shape, drawn, ("nobody",), {}).to(torch.device(device))
    data = _questions(users, generator, device)
    start, spent = time.perf_counter(), time.process_time()
    reduced = reduce_comparisons(head, data)
    finish(device)
    middle = time.perf_counter()
    reduced = _answers(reduced, generator)
    prior = Gaussian(torch.zeros(K - 1, dtype=torch.float64), 2 * torch.eye(K - 1, dtype=torch.float64))
    prior = prior.to(torch.device(device))
    begun = time.perf_counter()
    found = maximum_a_posteriori(reduced, prior)
    finish(device)
    end, spent = time.perf_counter(), time.process_time() - spent
    difference = 0.0
    for user in range(0, users, users // 50):
        alone = maximum_a_posteriori(reduced.take(torch.nonzero(reduced.user == user)[:, 0]), prior)
        difference = max(difference, float((alone.mixtures[user] - found.mixtures[user]).abs().max()))
    return Figures(users, middle - start, end - begun, spent, difference)


def _questions(users: int, generator: torch.Generator, device: str) -> PreferenceData:
    n = users * SHOTS

    def numbers(high: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator).to(device)

    left = numbers(RESPONSES)
    return PreferenceData(
        prompts=TensorTable(torch.randn(PROMPTS, D, generator=generator).to(device)),
        responses=TensorTable(torch.randn(RESPONSES, D, generator=generator).to(device)),
        prompt=numbers(PROMPTS),
        response_1=left,
        response_2=(left + 1 + numbers(RESPONSES - 1)) % RESPONSES,
        user=torch.arange(users, device=device).repeat_interleave(SHOTS),
        y=torch.ones(n, device=device),
        users=tuple(map(str, range(users))),
    )


def _answers(reduced: ReducedComparisons, generator: torch.Generator) -> ReducedComparisons:
    """Return the comparisons with answers drawn under mixtures of their own for every user."""
    logits = 1.5 * torch.randn(len(reduced.users), K, generator=generator, dtype=torch.float64)
    chance = torch.sigmoid(reduced.margins(torch.softmax(logits, dim=1).to(reduced.products)))
    uniform = torch.rand(len(reduced), generator=generator, dtype=torch.float64).to(reduced.products)
    answers = torch.where(uniform < chance, 1.0, -1.0).double()
    return replace(reduced, y=answers)
