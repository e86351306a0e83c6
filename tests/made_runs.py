"""Run folders that are made and not trained: quick, many, and with known predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from palcache.checkpoints import TrainedHead, save_head
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig
from palcache.files import write_json
from palcache.heads import build_head
from palcache.reports import write_history
from palcache.runs.folders import begin_run, evaluations_to_dict
from palcache.runs.predictions import PREDICTIONS, Predictions, SplitPredictions, evaluate_predictions, save_predictions
from palcache.runs.prototypes import PROTOTYPES, Decision, Prototypes, save_prototypes
from palcache.training import HistoryRow

USERS = tuple(f"user {i}" for i in range(30))
D = 5


def make_run(
    path: Path,
    *,
    head: HeadConfig | None = None,
    fit: FitConfig | None = None,
    users: Sequence[str] = USERS,
    per_user: int = 20,
    skill: float = 1.0,
    text: str = "a prompt",
    table: str = "f00d",
    predictions: bool = True,
    steps: int = 3,
    split_seed: int | None = None,
) -> Path:
    """Leave a complete run folder whose head is right the more often the higher its skill.

    Args:
        path: the folder.
        head: its configuration.
        fit: its configuration; the seed draws the noise of the margins.
        users: ids.
        per_user: comparisons of each user in each split.
        skill: mean margin towards the answer; the noise is standard normal.
        text: of prompts.
        table: fingerprint; it draws the answers.
        predictions: keep predictions and prototypes; older runs did not.
        steps: evaluations during training.
        split_seed: the table was split anew with it.
    """
    head, fit = head or HeadConfig(k=2, p=3), fit or FitConfig()
    about = {
        "table": {"name": "table", "fingerprint": table, "split": {"by": "pair", "seed": 0}, "ties": "refuse"},
        "spaces": {"prompt": "1" * 32, "response": "2" * 32},
        "encoder": {"model": "made", "revision": None},
        "head": head.to_dict(),
        "fit": fit.to_dict(),
        "unknown_users": "refuse",
    }
    if split_seed is not None:
        about["split"] = {"by": "pair", "seed": split_seed}
    begin_run(path, about)
    shape = build_head(head, d=D, users=len(users))
    generator = torch.Generator().manual_seed(fit.seed)
    parameters = shape.initial(generator)
    if "user.logits" in parameters:
        parameters["user.logits"] = 2 * torch.randn(parameters["user.logits"].shape, generator=generator)
    save_head(path / "head.safetensors", TrainedHead(shape, parameters, tuple(users), about))
    found, tables = _predictions(users, per_user, skill, fit.seed, text, table, split_seed or 0)
    evaluations = {name: evaluate_predictions(found, name, tables[name]) for name in ("val", "test")}
    metrics = {**evaluations_to_dict(evaluations), "best_step": 20, "stopped_early": False}
    history = [HistoryRow(10 * i, i, 0.7 / i, 0.7 / i + 0.01 * i, 0.6, 1e-3, 14.0) for i in range(1, steps + 1)]
    write_history(path / "history.csv", history)
    if predictions:
        save_predictions(path / PREDICTIONS, found)
        save_prototypes(path / PROTOTYPES, _prototypes(shape.k, text))
    write_json(path / "metrics.json", metrics)
    return path


def _predictions(
    users: Sequence[str], per_user: int, skill: float, seed: int, text: str, table: str, split_seed: int
) -> tuple[Predictions, dict[str, Comparisons]]:
    answers, noise = np.random.default_rng([int(table, 16), split_seed]), np.random.default_rng(seed + 1)
    user = np.repeat(np.arange(len(users)), per_user)
    splits, tables = {}, {}
    for at, name in enumerate(("val", "test")):
        y = np.where(answers.random(len(user)) < 0.5, -1, 1).astype(np.int8)
        margins = {
            "head": y * skill + noise.standard_normal(len(user)),
            "user_blind": y * 0.2 + noise.standard_normal(len(user)),
            "longer": np.round(y * 10 + 100 * answers.standard_normal(len(user))),
        }
        splits[name] = SplitPredictions(np.arange(len(user)) + (at + 2 * split_seed) * len(user), user, y, margins)
        rows = [
            {"user_id": users[u], "prompt": text, "response_1": f"{i}", "response_2": "b", "y": int(y[i])}
            for i, u in enumerate(user.tolist())
        ]
        tables[name] = Comparisons.from_rows(rows)
    group = np.arange(len(users)) % 2
    return Predictions(table, tuple(users), group, ("one", "two"), splits), tables


def _prototypes(k: int, text: str) -> Prototypes:
    decision = Decision(3, text, f"preferred {text}", "other", tuple(1.0 - j for j in range(k)), 1.0)
    matrix = tuple(tuple(1.0 if i == j else 0.5 - 0.1 * abs(i - j) for j in range(k)) for i in range(k))
    return Prototypes(600, tuple((decision, replace(decision, row=4)) for _ in range(k)), matrix, matrix)
