"""palcache: encode once, then train, adapt and serve pluralistic reward models.

The public names are loaded when they are first used, so that importing the package imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palcache.cache import Cache as Cache
    from palcache.cache import Space as Space
    from palcache.care.compactions import compact_cache as compact_cache
    from palcache.care.exports import export_cache as export_cache
    from palcache.care.imports import import_vectors as import_vectors
    from palcache.care.merges import merge_caches as merge_caches
    from palcache.care.repairs import repair_cache as repair_cache
    from palcache.care.vectors import NamedVectors as NamedVectors
    from palcache.care.vectors import read_vectors as read_vectors
    from palcache.care.verification import verify_cache as verify_cache
    from palcache.checkpoints import TrainedHead as TrainedHead
    from palcache.checkpoints import load_head as load_head
    from palcache.checkpoints import save_head as save_head
    from palcache.comparisons import Comparisons as Comparisons
    from palcache.configs import EmbedConfig as EmbedConfig
    from palcache.configs import FitConfig as FitConfig
    from palcache.configs import HeadConfig as HeadConfig
    from palcache.configs import SplitConfig as SplitConfig
    from palcache.contrasts import Contrasts as Contrasts
    from palcache.contrasts import compare_runs as compare_runs
    from palcache.embedding.encoding import embed_comparisons as embed_comparisons
    from palcache.embedding.encoding import plan_embedding as plan_embedding
    from palcache.embedding.stages import embed_tables as embed_tables
    from palcache.encoders.choices import load_encoder as load_encoder
    from palcache.encoders.hidden_states import HiddenStateEncoder as HiddenStateEncoder
    from palcache.encoders.sentence import SentenceEncoder as SentenceEncoder
    from palcache.errors import PalcacheError as PalcacheError
    from palcache.evaluation import Evaluation as Evaluation
    from palcache.evaluation import evaluate_head as evaluate_head
    from palcache.evaluation import predict_margins as predict_margins
    from palcache.heads import PalA as PalA
    from palcache.heads import PalB as PalB
    from palcache.heads import build_head as build_head
    from palcache.joints import JointData as JointData
    from palcache.joints import load_joint as load_joint
    from palcache.lints import lint_cache as lint_cache
    from palcache.pages.pages import write_page as write_page
    from palcache.presets import load_preset as load_preset
    from palcache.runs.adapted import AdaptedRun as AdaptedRun
    from palcache.runs.adapted import adapt_run as adapt_run
    from palcache.runs.imported import export_checkpoint as export_checkpoint
    from palcache.runs.imported import import_checkpoint as import_checkpoint
    from palcache.runs.seen_users import list_users as list_users
    from palcache.runs.seen_users import suggest_run as suggest_run
    from palcache.runs.trainings import RunResult as RunResult
    from palcache.runs.trainings import evaluate_run as evaluate_run
    from palcache.runs.trainings import load_run as load_run
    from palcache.runs.trainings import train_run as train_run
    from palcache.spans import comparison_spans as comparison_spans
    from palcache.spans import divergence_spans as divergence_spans
    from palcache.splits import split_comparisons as split_comparisons
    from palcache.stacks import Member as Member
    from palcache.stacks import fit_stack as fit_stack
    from palcache.sweeps.grids import Grid as Grid
    from palcache.sweeps.grids import parse_grid as parse_grid
    from palcache.sweeps.grids import read_grid as read_grid
    from palcache.sweeps.sweeps import SweepResult as SweepResult
    from palcache.sweeps.sweeps import run_sweep as run_sweep
    from palcache.tables import read_comparisons as read_comparisons
    from palcache.tensors import PreferenceData as PreferenceData
    from palcache.tensors import load_preferences as load_preferences
    from palcache.training import FitResult as FitResult
    from palcache.training import fit as fit

_HOMES = {
    "AdaptedRun": "runs.adapted",
    "Cache": "cache",
    "Comparisons": "comparisons",
    "Contrasts": "contrasts",
    "EmbedConfig": "configs",
    "Evaluation": "evaluation",
    "FitConfig": "configs",
    "FitResult": "training",
    "Grid": "sweeps.grids",
    "HeadConfig": "configs",
    "HiddenStateEncoder": "encoders.hidden_states",
    "JointData": "joints",
    "Member": "stacks",
    "NamedVectors": "care.vectors",
    "PalA": "heads",
    "PalB": "heads",
    "PalcacheError": "errors",
    "PreferenceData": "tensors",
    "RunResult": "runs.trainings",
    "SentenceEncoder": "encoders.sentence",
    "Space": "cache",
    "SplitConfig": "configs",
    "SweepResult": "sweeps.sweeps",
    "TrainedHead": "checkpoints",
    "adapt_run": "runs.adapted",
    "compact_cache": "care.compactions",
    "build_head": "heads",
    "compare_runs": "contrasts",
    "comparison_spans": "spans",
    "divergence_spans": "spans",
    "embed_comparisons": "embedding.encoding",
    "embed_tables": "embedding.stages",
    "evaluate_head": "evaluation",
    "evaluate_run": "runs.trainings",
    "export_cache": "care.exports",
    "export_checkpoint": "runs.imported",
    "fit": "training",
    "fit_stack": "stacks",
    "import_checkpoint": "runs.imported",
    "import_vectors": "care.imports",
    "lint_cache": "lints",
    "list_users": "runs.seen_users",
    "load_encoder": "encoders.choices",
    "load_head": "checkpoints",
    "load_joint": "joints",
    "load_preferences": "tensors",
    "load_preset": "presets",
    "load_run": "runs.trainings",
    "merge_caches": "care.merges",
    "parse_grid": "sweeps.grids",
    "plan_embedding": "embedding.encoding",
    "predict_margins": "evaluation",
    "read_comparisons": "tables",
    "read_grid": "sweeps.grids",
    "read_vectors": "care.vectors",
    "repair_cache": "care.repairs",
    "run_sweep": "sweeps.sweeps",
    "save_head": "checkpoints",
    "split_comparisons": "splits",
    "suggest_run": "runs.seen_users",
    "train_run": "runs.trainings",
    "verify_cache": "care.verification",
    "write_page": "pages.pages",
}
__all__ = sorted(_HOMES)  # noqa: PLE0605 - one list for both
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'palcache' has no attribute {name!r}")
    return getattr(importlib.import_module(f"palcache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
