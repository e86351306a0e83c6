"""The published heads written anew with `torch.nn`, one comparison and one token at a time: an oracle for ours.

Written from the description of the method, with other means than the library's: modules instead of parameter
dictionaries, loops instead of tensors of weights. Its state dict has the published layout.
"""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "linear": nn.Identity}


class _Stack(nn.Module):
    def __init__(self, name: str, d: int, p: int) -> None:
        super().__init__()
        kind, activation, dropout, *flags = name.split("-")
        hidden = int(kind.removeprefix("mlp"))
        layers: list[nn.Module] = []
        for i in range(hidden):
            layers.append(nn.Linear(d if i == 0 else p, p, bias="nobias" not in flags))
            if "batchnorm" in flags:
                layers.append(nn.BatchNorm1d(p))
            layers += [nn.Dropout(float("0." + dropout.removeprefix("dropout"))), ACTIVATIONS[activation]()]
        layers.append(nn.Linear(p if hidden else d, p, bias="nobias" not in flags))
        self.layers = nn.Sequential(*layers)


class _Projector(nn.Module):
    def __init__(self, name: str, d: int, p: int) -> None:
        super().__init__()
        self.residual = "residual" in name
        self.mlp: nn.Module = nn.Identity() if name == "identity" else _Stack(name, d, p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = self.mlp.layers(rows) if isinstance(self.mlp, _Stack) else rows
        if self.residual:
            out = out + rows
        return out.reshape(*x.shape[:-1], -1)


class _Softmax(nn.Module):
    def __init__(self, temperature: float, *, partition: bool) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor([temperature]), requires_grad=False)
        self.partition = partition

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        if self.partition and not self.training:
            return torch.eye(len(w))[w.argmax()]
        return (w / self.temperature).softmax(0)


class _Items(nn.Module):
    def __init__(self, projector: _Projector) -> None:
        super().__init__()
        self.projector = projector


class _Users(nn.Module):
    def __init__(self, meta: dict[str, Any], softmax: _Softmax, projector: _Projector) -> None:
        super().__init__()
        self.softmax = softmax
        self.W = nn.ParameterDict({user: nn.Parameter(torch.randn(meta["k"])) for user in meta["users"]})
        if meta["pal"] == "b":
            make = [_Projector(meta["proj_arch"], meta["d_hid"], meta["d_pref"]) for _ in range(meta["k"])]
            self.projectors = nn.ModuleList(make)
            return
        self.projector = projector
        width = meta["d_pref"] if meta["user_learner_type"] == "Pw" else meta["d_hid"]
        rows = torch.randn(meta["k"], width)
        self.P = nn.Parameter(rows / rows.norm(dim=1, keepdim=True))


class Oracle(nn.Module):
    """A published head; `forward` gives y_hat as the reference files hold it."""

    def __init__(self, meta: dict[str, Any]) -> None:
        super().__init__()
        self.meta = meta
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        projector = _Projector(meta["proj_arch"], meta["d_hid"], meta["d_pref"])
        if meta["pal"] == "b":
            self.projector_f = projector
        else:
            self.projector = projector
        self.softmax_w = _Softmax(meta["temperature"], partition=meta["partition"])
        self.item_learner = _Items(projector)
        self.user_learner = _Users(meta, self.softmax_w, projector)

    def mixtures(self, users: torch.Tensor) -> torch.Tensor:
        """Return the mixture of each comparison's user, (n, k)."""
        names = [self.meta["users"][i] for i in users.tolist()]
        return torch.stack([self.softmax_w(self.user_learner.W[name]) for name in names])

    def forward(self, case: Tensors) -> torch.Tensor:
        """Return y_hat of the batch."""
        f = self.item_learner.projector
        left, right = f(case["in.left"]), f(case["in.right"])
        w = self.mixtures(case["in.user_index"])
        if self.meta["pal"] == "b":
            found = [g(case["in.prompt"]) for g in self.user_learner.projectors]
            ideal = torch.stack(
                [sum((w[i, j] * found[j][i] for j in range(len(found))), torch.zeros(())) for i in range(len(w))]
            )
            s = min(self.logit_scale.exp(), torch.tensor(100.0))
            cosine = nn.CosineSimilarity(dim=-1)
            return torch.stack([s * cosine(left, ideal), s * cosine(right, ideal)], dim=-1)
        ideal = self.ideal(w).unsqueeze(1)
        kind = self.meta["pref_learner_type"]
        if kind != "dist":
            s, cosine = min(self.logit_scale.exp(), torch.tensor(100.0)), nn.CosineSimilarity(dim=-1)
            scores = [s * cosine(side, ideal) for side in (left, right)]
            return torch.stack(scores, dim=-1) if kind == "angle" else (1 - scores[0]) - (1 - scores[1])
        distances = [(side - ideal).square().sum(-1).sqrt() for side in (left, right)]
        return torch.sub(*distances)

    def ideal(self, w: torch.Tensor) -> torch.Tensor:
        """Return PAL-A's ideal points, (n, p)."""
        f, prototypes = self.item_learner.projector, self.user_learner.P
        match self.meta["user_learner_type"]:
            case "Pw":
                return w @ prototypes
            case "f(Pw)":
                return f(w @ prototypes)  # type: ignore[no-any-return]
            case "f(P)w":
                return w @ f(prototypes)  # type: ignore[no-any-return]
            case _:
                rows = f(prototypes)
                return w @ (rows / rows.norm(dim=1, keepdim=True))  # type: ignore[no-any-return]

    def loss(self, y_hat: torch.Tensor, case: Tensors) -> torch.Tensor:
        """Return the loss of the batch, comparison by comparison and token by token."""
        losses = []
        for i, y in enumerate(case["in.y"].tolist()):
            begin, end = int(case["in.divergence"][i]), int(case["in.end"][i])
            tokens = [self.token_loss(y_hat[i, t], y) for t in range(begin, end)]
            losses.append(_weigh(tokens, self.meta["loss_weighting"]))
        if self.meta["loss"].endswith("_w"):
            index = case["in.user_index"].tolist()
            weights = torch.tensor([1 / index.count(i) for i in index])
            return (torch.stack(losses) * weights / weights.sum()).sum()
        return torch.stack(losses).mean()

    def token_loss(self, y_hat: torch.Tensor, y: int) -> torch.Tensor:
        """Return the loss of one comparison at one token."""
        if y_hat.dim():
            return nn.functional.cross_entropy(y_hat.unsqueeze(0), torch.tensor([(y + 1) // 2]))
        kind = self.meta["loss"].removesuffix("_w")
        if kind == "logistic":
            return -nn.functional.logsigmoid(y * y_hat)
        short = (1 - y * y_hat).clamp(min=0)
        if kind == "hinge_smooth":
            return short**2 / 10 if short <= 5 else short - 2.5
        return short


def _weigh(tokens: list[torch.Tensor], weighting: str) -> torch.Tensor:
    if not tokens:
        return torch.zeros(())
    if weighting == "mean":
        return torch.stack(tokens).mean()
    if weighting == "only_last":
        return tokens[-1]
    m = len(tokens)
    return sum(((i + 1) * loss for i, loss in enumerate(tokens)), torch.zeros(())) / (m * (m + 1) / 2)


RATES = {
    "projector_f": (1e-4, 0.01), "projectors_gk": (1e-4, 0.01), "projector": (1e-4, 0.01),
    "P": (5e-3, 0.0), "W": (5e-3, 0.0), "logit_scale": (0.1, 0.0),
}  # fmt: skip
GROUPS = (
    ("projectors_gk", r"user_learner\.projectors\..*"), ("projector_f", r"projector_f\..*"),
    ("projector", r"projector\..*"), ("P", r"user_learner\.P"), ("W", r"user_learner\.W\..*"),
    ("logit_scale", "logit_scale"),
)  # fmt: skip


NAMED: dict[str, dict[str, Any]] = {
    "b-batchnorm-nobias": {"proj_arch": "mlp2-relu-dropout0-batchnorm-nobias", "k": 3, "temperature": 0.5},
    "b-batchnorm-residual": {
        "proj_arch": "mlp1-gelu-dropout0-residual-batchnorm", "d_pref": 7, "loss_weighting": "cumulative"},
    "b-batchnorm-partition": {"proj_arch": "mlp1-linear-dropout0-batchnorm", "partition": True, "k": 4},
    "b-deep-nobias": {
        "proj_arch": "mlp3-linear-dropout0-nobias", "k": 4, "temperature": 2.5, "loss_weighting": "only_last"},
    "b-one-prototype": {"proj_arch": "mlp0-relu-dropout0-residual", "k": 1, "d_pref": 7},
    "b-identity": {"proj_arch": "identity", "k": 3, "d_pref": 7},
    "b-users": {"proj_arch": "mlp1-gelu-dropout0", "loss": "CE_w", "steps": 5},
    "a-identity": {"pal": "a", "user_learner_type": "Pw", "proj_arch": "identity", "d_pref": 7},
    "a-f(Pw)-batchnorm": {"pal": "a", "user_learner_type": "f(Pw)", "proj_arch": "mlp1-relu-dropout0-batchnorm"},
    "a-f(P)w-batchnorm": {"pal": "a", "user_learner_type": "f(P)w", "k": 3, "proj_arch": "mlp2-gelu-dropout0-batchnorm"},
    "a-|f(P)|w": {"pal": "a", "user_learner_type": "|f(P)|w", "k": 4, "temperature": 0.3},
    "a-Pw-logistic": {"pal": "a", "user_learner_type": "Pw", "loss": "logistic_w", "loss_weighting": "only_last"},
    "a-Pw-partition": {"pal": "a", "user_learner_type": "Pw", "partition": True, "proj_arch": "mlp1-relu-dropout0-nobias"},
    "a-angle": {"pal": "a", "user_learner_type": "f(Pw)", "pref_learner_type": "angle", "loss": "CE"},
    "a-smooth": {"pal": "a", "user_learner_type": "Pw", "pref_learner_type": "angle_hinge", "loss": "hinge_smooth"},
}  # fmt: skip


def random_meta(seed: int) -> dict[str, Any]:
    """Return what a file of a random configuration is of."""
    draw = random.Random(seed)  # noqa: S311 - a test's choice
    pal, residual = draw.choice("ab"), draw.random() < 0.3
    d = draw.randint(3, 12)
    p = d if residual else draw.choice([q for q in range(2, 13) if q != d])
    flags = ("-residual" if residual else "") + draw.choice(["", "-batchnorm"]) + draw.choice(["", "", "-nobias"])
    name = f"mlp{draw.randint(0, 3)}-{draw.choice(['relu', 'gelu', 'linear'])}-dropout0{flags}"
    k = draw.randint(1, 5)
    meta: dict[str, Any] = {
        "pal": pal, "k": k, "d_hid": d, "d_pref": p, "proj_arch": name, "partition": draw.random() < 0.3,
        "loss_weighting": draw.choice(["mean", "cumulative", "only_last"]),
        "temperature": draw.choice([0.2, 0.5, 1.0, 1.7, 4.0]), "steps": draw.randint(2, 4),
    }  # fmt: skip
    if pal == "b":
        return meta | {"loss": draw.choice(["CE", "CE_w"]), "pref_learner_type": "angle", "user_learner_type": None}
    kind = draw.choice(["dist", "dist", "angle_hinge", "angle"])
    loss = "CE" if kind == "angle" else draw.choice(["hinge", "logistic", "hinge_w"])
    forms = ["f(Pw)", "Pw", *(["f(P)w", "|f(P)|w"] if k > 1 or "batchnorm" not in name else [])]
    form = draw.choice(forms)  # torch has no statistics of a single row
    return meta | {"pref_learner_type": kind, "loss": loss, "user_learner_type": form, "steps": 1}


def write_file(path: Path, seed: int, *, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Write a reference file made by the oracle; float64 shows that two computations are the same, whatever rounding does."""
    meta: dict[str, Any] = {
        "pal": "b", "k": 2, "d_hid": 7, "d_pref": 5, "proj_arch": "mlp2-gelu-dropout0", "pref_learner_type": "angle",
        "loss": "CE", "loss_weighting": "mean", "user_learner_type": None, "temperature": 1.0, "partition": False,
        "users": [f"user-{i}" for i in range(4)], "steps": 3, "optimizer_class": "Adam",
        "optimizer": {group: {"lr": lr, "weight_decay": decay} for group, (lr, decay) in RATES.items()},
    }  # fmt: skip
    if changes.get("pal") == "a":
        meta |= {"pref_learner_type": "dist", "loss": "hinge", "steps": 1}
    meta |= changes
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            oracle, tensors = Oracle(meta), _inputs(meta)
            tensors |= {f"init.{key}": value.clone() for key, value in oracle.state_dict().items()}
            _train(oracle, tensors)
    finally:
        torch.set_default_dtype(before)
    save_file({name: value.clone() for name, value in tensors.items()}, path, {"meta": json.dumps(meta)})


def _inputs(meta: dict[str, Any], n: int = 6, t: int = 9) -> Tensors:
    sides = {f"in.{side}": torch.randn(n, t, meta["d_hid"]) for side in ("left", "right", "prompt")}
    divergence = torch.randint(0, 3, (n,))
    end = divergence + torch.randint(1, t - 3, (n,))
    end[2] = divergence[2]  # an empty span
    users, y = torch.tensor([1, 1, 2, 0, 1, 0]), torch.tensor([-1, 1, 1, -1, -1, 1])
    return {**sides, "in.divergence": divergence, "in.end": end, "in.user_index": users, "in.y": y}


def _share_right(y_hat: torch.Tensor, case: Tensors) -> float:
    shares = []
    for i, y in enumerate(case["in.y"].tolist()):
        margins: list[float] = (y_hat[i] if y_hat.dim() == 2 else y_hat[i, :, 1] - y_hat[i, :, 0]).tolist()
        inside = margins[int(case["in.divergence"][i]) : int(case["in.end"][i])]
        shares.append(sum(y * margin > 0 for margin in inside) / max(len(inside), 1))
    return float(sum(shares)) / len(shares)


def _train(oracle: Oracle, tensors: Tensors) -> None:
    meta, named = oracle.meta, dict(oracle.named_parameters())
    groups: dict[str, list[torch.Tensor]] = {}
    if meta["pref_learner_type"] != "angle":
        oracle.logit_scale.requires_grad_(False)
    for name, value in named.items():
        group = next((group for group, pattern in GROUPS if re.fullmatch(pattern, name)), None)
        if group and value.requires_grad:
            groups.setdefault(group, []).append(value)
    optimizer = torch.optim.Adam([{"params": members, **meta["optimizer"][group]} for group, members in groups.items()])
    oracle.train()
    losses = []
    for step in range(meta["steps"]):
        y_hat = oracle(tensors)
        loss = oracle.loss(y_hat, tensors)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            tensors["out.y_hat"] = y_hat.detach()
            tensors["out.accuracy_all_tokens"] = torch.tensor(_share_right(y_hat.detach(), tensors))
            tensors |= {f"grad.{name}": v.grad.clone() for name, v in named.items() if v.grad is not None}
        optimizer.step()
        losses.append(loss.detach())
    tensors["out.losses"] = torch.stack(losses).double()
    if meta["pal"] == "b":
        tensors |= {f"final.{key}": value.clone() for key, value in oracle.state_dict().items()}
        tensors["out.y_hat_eval"] = oracle.eval()(tensors).detach()
