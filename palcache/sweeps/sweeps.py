"""Many heads on one table at once: a folder of runs, a table of results, resumable.

```
SWEEP/
  sweep.json      the table and the spaces that all heads are trained on, and every head asked for so far
  runs/<name>/    a run folder per head, as `train-head` leaves it but for the picture
  results.csv     one line per head, yardsticks beside it; no wall times: the same heads give the same table
  .lock           held by the process that trains the sweep
```

Heads of one kind train as stacks. A head that is complete is not trained again, so a killed sweep goes on, and a grid
with more values trains what is new. A user-blind yardstick is trained once for all heads that it stands beside.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch

from palcache.cache import Cache
from palcache.checkpoints import TrainedHead
from palcache.configs import HeadConfig, UnknownUsers
from palcache.devices import free_cached_memory, is_out_of_memory, parse_devices
from palcache.errors import InputError, PalcacheError, PalcacheWarning
from palcache.fits import Course, FitResult
from palcache.heads import Parameters, blind_config, build_head
from palcache.orders import kept_at_hand
from palcache.runs.folders import RunResult, begin_run, finish_run, is_complete, load_run
from palcache.runs.inputs import RunSplit, load_splits, load_vectors, resplit
from palcache.storage.comparison_files import StoredComparisons
from palcache.sweeps.folders import SweepHead, SweepResult, Trial, holding_sweep, open_sweep, write_results
from palcache.sweeps.grids import Grid
from palcache.sweeps.plans import fit_members, no_room, plan_stacks
from palcache.sweeps.trainings import Pending, Source, Training, known_yardsticks, source_of
from palcache.tensors import PreferenceData
from palcache.token_batches import TokenData

__all__ = ["SweepHead", "SweepProgress", "SweepResult", "run_sweep"]


@final
@dataclass(frozen=True, slots=True)
class SweepProgress:
    """What a sweep reports now and then.

    Attributes:
        done: heads that are complete.
        heads: in all.
        share: of the steps of all trainings, yardsticks included.
    """

    done: int
    heads: int
    share: float


def run_sweep(  # noqa: PLR0913 - keyword-only options
    cache: Cache,
    path: Path,
    grid: Grid,
    *,
    comparisons: str | None = None,
    space: str | None = None,
    device: str = "auto",
    jobs: int | None = None,
    unknown_users: UnknownUsers = "refuse",
    on_head: Callable[[SweepHead], None] | None = None,
    on_progress: Callable[[SweepProgress], None] | None = None,
) -> SweepResult:
    """Train every head of a grid that is not trained yet, and return all heads of the sweep.

    Each head's run folder is that of `train_run` with its options, without the picture: on a CPU byte for byte where
    `fit_stack` is exact, else up to the rounding of float32. A head whose options cannot work, which does
    not fit the memory or whose loss breaks is reported in its place, and the others go on.

    Args:
        cache: the cache.
        path: the sweep's folder, new or of an earlier call on the same table.
        grid: the heads.
        comparisons: name of the table; a cache with one table needs none.
        space: which encoder's vectors, where the table has several.
        device: `auto`, `cpu`, `cuda`, `mps`, or several: `cuda:0,cuda:1`, `cpu:2`.
        jobs: stacks that are trained side by side; by default one per device, on a CPU one per thread.
        unknown_users: what to do with users who have no training comparison.
        on_head: called with each head that is trained in this call, once its run is written; one at a time, from any
            thread.
        on_progress: called after each evaluation of a stack and each head, from any thread.

    Raises:
        InputError: a device or `jobs` cannot be, the folder is something else or in another process's hands, the table has
            an empty split, or one user alone.
        MismatchError: the sweep was made on another table, other vectors or another state of them.
    """
    devices = parse_devices(device, option="--device")
    if jobs is not None and jobs < 1:
        raise InputError(f"Got jobs = {jobs}; expected at least 1.")
    if jobs is None:
        jobs = torch.get_num_threads() if devices == ["cpu"] else len(devices)
    stored = cache.comparisons(comparisons)
    with holding_sweep(path):
        trials = open_sweep(cache, path, grid, stored, space=space, unknown_users=unknown_users)
        sweep = _Sweep(cache, stored, trials, unknown_users, on_head, on_progress)
        sweep.train(devices, jobs)
        return write_results(path, [sweep.head(trial) for trial in trials])


class _Stopped(Exception):  # noqa: N818 - nothing went wrong
    """The sweep is being stopped."""


@final
class _Sweep:
    """What the jobs of a sweep share, behind one lock."""

    def __init__(
        self,
        cache: Cache,
        stored: StoredComparisons,
        trials: Sequence[Trial],
        unknown_users: UnknownUsers,
        on_head: Callable[[SweepHead], None] | None,
        on_progress: Callable[[SweepProgress], None] | None,
    ) -> None:
        self._cache, self._stored, self._unknown = cache, stored, unknown_users
        self._on_head, self._on_progress = on_head, on_progress
        self._lock, self._stopped = threading.RLock(), threading.Event()
        self._errors = {trial.name: trial.error for trial in trials if trial.error is not None}
        good = [trial for trial in trials if trial.error is None]
        complete = {trial.name for trial in good if is_complete(trial.path, dict(trial.about), resume=True)}
        self._results = {trial.name: load_run(trial.path) for trial in good if trial.name in complete}
        self._pending = [Pending.of(trial) for trial in good if trial.name not in complete]
        self._blind = known_yardsticks([trial for trial in good if trial.name in complete], self._pending)
        self._sources = {source_of(pending.own): pending.trial for pending in self._pending}
        self._fitted: dict[Training, FitResult | PalcacheError] = {}
        self._vectors: dict[tuple[bool, str | None, str], PreferenceData | TokenData] = {}
        self._data: dict[tuple[*Source, str], Mapping[str, RunSplit]] = {}
        self._heads, self._steps, self._all_steps = len(trials), [0], 1
        self._said = False

    def head(self, trial: Trial) -> SweepHead:
        """Return what became of a head."""
        run = self._results.get(trial.name)
        return SweepHead(trial.name, trial.params, trial.path, run, None if run else self._errors[trial.name])

    def train(self, devices: Sequence[str], jobs: int) -> None:
        """Train what is pending."""
        queue = deque(self._plan(devices, jobs))
        if jobs == 1 or len(queue) < 2:
            self._work(queue, devices[0])
            return
        threads = torch.get_num_threads()
        share = max(1, threads // jobs)
        pool = ThreadPoolExecutor(jobs, "palcache-job", initializer=torch.set_num_threads, initargs=(share,))
        try:
            work = [pool.submit(self._work, queue, devices[number % len(devices)]) for number in range(jobs)]
            done, _ = wait(work, return_when=FIRST_EXCEPTION)
            for job in done:  # all of them, or those that went wrong before the others were told to stop
                job.result()
        finally:
            self._stopped.set()
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # a worker's share becomes the default of the process

    def _plan(self, devices: Sequence[str], jobs: int) -> list[list[Training]]:
        """Return the stacks to be trained, yardsticks first: runs are complete only with theirs."""
        device, blind = devices[0], {pending.blind for pending in self._pending} - self._blind.keys()
        groups: dict[Source, list[Training]] = {}
        needed = [*(p.blind for p in self._pending if p.blind in blind), *(p.own for p in self._pending)]
        for fit in dict.fromkeys(needed):
            groups.setdefault(source_of(fit), []).append(fit)
        stacks: list[list[Training]] = []
        for (seed, _, _), fits in groups.items():
            try:
                train = self._splits(fits[0], device)["train"].data
            except InputError as error:
                if seed is None:
                    raise
                self._fitted.update(dict.fromkeys(fits, error))
                continue
            members = [fit.member(train) for fit in fits]
            planned = plan_stacks(members, train, jobs=jobs, devices=devices)
            stacks += [[fits[i] for i in numbers] for numbers in planned]
            self._all_steps += sum(Course.of(fit.fit, len(train)).steps for fit in fits)
        self._complete(device)
        return sorted(stacks, key=blind.isdisjoint)

    def _splits(self, fit: Training, device: str) -> Mapping[str, RunSplit]:
        """Return the splits that a training needs, loaded once for each device."""
        source = source_of(fit)
        with self._lock:
            if (*source, device) not in self._data:
                trial = self._sources[source]
                kind = (*source[1:], device)
                if kind not in self._vectors:
                    spaces = trial.about["spaces"]
                    self._vectors[kind] = load_vectors(self._cache, self._stored, spaces, device, trial.fit)
                stored, vectors = resplit(self._stored, trial.split), self._vectors[kind]
                splits = load_splits(stored, vectors, self._unknown)
                val = replace(splits["val"], data=kept_at_hand(splits["val"].data))  # once for all stacks
                self._data[*source, device] = {**splits, "val": val}
            return self._data[*source, device]

    def _work(self, queue: deque[list[Training]], device: str) -> None:
        """Train stacks until none is left."""
        while queue and not self._stopped.is_set():
            try:
                stack = queue.popleft()
            except IndexError:  # another job was quicker
                return
            splits = self._splits(stack[0], device)
            train, val = splits["train"].data, splits["val"].data
            with self._lock:
                self._steps.append(0)
                relay = functools.partial(self._note, len(self._steps) - 1)
            members = [fit.member(train) for fit in stack]
            found = fit_members(members, train, val, on_steps=relay, on_halves=self._say_once)
            with self._lock:
                self._fitted.update(zip(stack, found, strict=True))
            self._complete(device)

    def _say_once(self, text: str) -> None:
        """Warn of what every stack may run into, once."""
        with self._lock:
            said, self._said = self._said, True
        if not said:
            warnings.warn(text, PalcacheWarning, stacklevel=2)

    def _note(self, stack: int, steps: int) -> None:
        """Count the steps of a stack."""
        if self._stopped.is_set():
            raise _Stopped
        with self._lock:
            self._steps[stack] = steps
        self._report()

    def _report(self) -> None:
        if self._on_progress:
            with self._lock:
                done, share = len(self._results) + len(self._errors), sum(self._steps) / self._all_steps
                self._on_progress(SweepProgress(done, self._heads, min(1.0, share)))

    def _complete(self, device: str) -> None:
        """Write the run of every head whose trainings have ended, or note why there is none."""
        with self._lock:
            ready = [(one, self._ended(one)) for one in self._pending if self._has_ended(one)]
            self._pending = [one for one in self._pending if not self._has_ended(one)]
            kept = {fit for one in self._pending for fit in (one.own, one.blind)}
            self._fitted = {fit: found for fit, found in self._fitted.items() if fit in kept}
        for pending, ended in ready:
            found = ended if isinstance(ended, PalcacheError) else self._write(pending, *ended, device)
            with self._lock:
                if isinstance(found, PalcacheError):
                    self._errors[pending.trial.name] = str(found)
                else:
                    self._results[pending.trial.name] = found
                    if self._on_head:
                        self._on_head(self.head(pending.trial))
            self._report()

    def _has_ended(self, pending: Pending) -> bool:
        return pending.own in self._fitted and (pending.blind in self._fitted or pending.blind in self._blind)

    def _ended(self, pending: Pending) -> tuple[FitResult, Parameters] | PalcacheError:
        """Return how a head's training went and the parameters of its yardstick, or why one of them failed."""
        own, blind = self._fitted[pending.own], self._fitted.get(pending.blind)
        if isinstance(own, PalcacheError):
            return own
        if isinstance(blind, PalcacheError):
            return type(blind)(f"The user-blind yardstick failed: {blind}")
        return own, self._blind[pending.blind] if blind is None else blind.parameters

    def _write(self, pending: Pending, fitted: FitResult, blind: Parameters, device: str) -> RunResult | PalcacheError:
        """Write a head's run folder, or return why its evaluation does not fit the memory."""
        trial, splits = pending.trial, self._splits(pending.own, device)
        data = splits["train"].data

        def trained(config: HeadConfig, values: Parameters) -> TrainedHead:
            shape = build_head(config, d=data.width, users=len(data.users))
            moved = {name: value.to(data.device) for name, value in values.items()}
            return TrainedHead(shape, moved, data.users, trial.about)

        head = trained(trial.head, fitted.parameters)
        yardstick = head if pending.blind == pending.own else trained(blind_config(trial.head), blind)
        begin_run(trial.path, trial.about)
        try:
            return finish_run(trial.path, head, yardstick, fitted, splits, picture=False)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_cached_memory()
        return no_room(pending.own.member(data), data.device)
