"""Heads equal the published implementation: its own numbers in files, and files of an independent oracle.

The files are those of `PALCACHE_REFERENCE_DIR`, and as many again of random configurations that the oracle writes; the
checks see a file and nothing else.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import reference_checks
from tests.published_oracle import NAMED, random_meta, write_file
from tests.reference_checks import Case, read_case

FOLDER = Path(os.environ.get("PALCACHE_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "reference" / "heads"))
FILES = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []
RANDOM = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(params=[*FILES, *NAMED, *range(RANDOM)], ids=lambda p: p.stem if isinstance(p, Path) else str(p))
def case(request: pytest.FixtureRequest, folder: Path) -> Case:
    if isinstance(request.param, Path):
        return read_case(request.param)
    path = folder / f"{request.param}.safetensors"
    if not path.exists():
        if isinstance(request.param, str):
            write_file(path, len(request.param), **NAMED[request.param])
        else:
            write_file(path, request.param, dtype=torch.float64, **random_meta(request.param))
    return read_case(path)


def test_there_are_reference_files() -> None:
    if not FILES:
        pytest.skip(f"no reference files in {FOLDER}; name their folder by PALCACHE_REFERENCE_DIR")
    assert all(read_case(path).meta["pal"] in {"a", "b"} for path in FILES)


def test_scores_and_loss(case: Case) -> None:
    reference_checks.check_scores(case)


def test_gradients(case: Case) -> None:
    reference_checks.check_gradients(case)


def test_training(case: Case) -> None:
    reference_checks.check_training(case)


def test_fit_takes_the_published_steps(case: Case) -> None:
    if case.meta["pal"] == "a":
        pytest.skip("the published optimizer steps PAL-A's projector twice")
    if "batchnorm" in case.meta["proj_arch"]:
        pytest.skip("statistics of ragged states are those of the spans")
    reference_checks.check_fit(case)


def test_random_configurations_reach_everything() -> None:
    metas = [random_meta(seed) for seed in range(RANDOM)]
    seen: dict[str, set[Any]] = {
        key: {meta[key] for meta in metas} for key in metas[0] if key not in {"users", "optimizer"}
    }
    assert seen["pal"] == {"a", "b"}
    assert seen["k"] == {1, 2, 3, 4, 5}
    assert seen["loss_weighting"] == {"mean", "cumulative", "only_last"}
    assert seen["user_learner_type"] == {None, "f(Pw)", "f(P)w", "Pw", "|f(P)|w"}
    assert seen["pref_learner_type"] == {"dist", "angle", "angle_hinge"}
    assert seen["partition"] == {True, False}
    assert len(seen["temperature"]) > 3
    words = {word for name in seen["proj_arch"] for word in name.split("-")}
    assert words >= {"mlp0", "mlp1", "mlp2", "mlp3", "relu", "gelu", "linear", "residual", "batchnorm", "nobias"}
    assert any(meta["d_hid"] != meta["d_pref"] for meta in metas)


@pytest.mark.parametrize(
    "name", ["out.y_hat", "out.losses", "grad.logit_scale", "final.projector_f.mlp.layers.0.weight"]
)
def test_a_file_that_is_wrong_fails(name: str, folder: Path) -> None:
    """Negative control: the checks fail where a tensor of the file is a little off."""
    path = folder / "control.safetensors"
    write_file(path, 3, **NAMED["b-users"])
    case = read_case(path)
    case.tensors[name] = case.tensors[name] + 1e-3
    failed = 0
    for check in (reference_checks.check_scores, reference_checks.check_gradients, reference_checks.check_training):
        try:
            check(case)
        except AssertionError:
            failed += 1
    assert failed
