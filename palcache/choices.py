"""The names that configurations, heads and losses share, and which of them go together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, Literal

HeadKind = Literal["pal-b", "pal-a", "bradley-terry", "low-rank", "pca", "per-user"]
Score = Literal["dist", "dist_normalized", "dist_logistic", "angle", "angle_hinge"]
Loss = Literal["hinge", "smooth_hinge", "logistic", "cross_entropy"]
UserForm = Literal["f(Pw)", "f(P)w", "Pw", "|f(P)|w"]
"""How a PAL-A user's ideal point is made of prototypes P, weights w and the projector f."""
Mixture = Literal["softmax", "gumbel", "gumbel_hard", "partition"]
"""How user weights become a point of the simplex."""
UserWeights = Literal["simplex", "free"]
Start = Literal["shared", "published"]
TokenWeighting = Literal["mean", "cumulative", "only_last"]
PromptAlignment = Literal["pooled", "position"]
Weighting = Literal["comparisons", "users"]
"""Every comparison counts the same, or every user."""
Optimizer = Literal["adamw", "adam"]
Schedule = Literal["cosine", "linear", "constant"]
Precision = Literal["float32", "bfloat16"]

RULE_NAMES: Final[Mapping[str, str]] = {
    "head": "head",
    "user_blind": "user-blind (k = 1)",
    "longer": "longer response",
}
"""What people read for the rules that evaluations compare."""
LOSS_OF: Final[Mapping[Score, Loss]] = {
    "dist": "hinge",
    "dist_normalized": "hinge",
    "dist_logistic": "logistic",
    "angle": "cross_entropy",
    "angle_hinge": "hinge",
}
"""The loss that each score was published with."""
SCORE_OF: Final[Mapping[str, Score]] = {"pal-a": "dist"}
"""The score of a head that is asked for without one; `angle` where none is named here."""
CLOSED_FORM: Final = frozenset({"pca", "per-user"})
"""Heads that are solved, not trained step by step."""
LINEAR_HEADS: Final = frozenset({"bradley-terry", "low-rank", "pca", "per-user"})
"""Heads whose reward is no score of an item and an ideal point."""

PROJECTOR = re.compile(
    r"identity|mlp(?P<hidden>\d+)-(?P<activation>relu|gelu|linear)-dropout(?P<dropout>\d+)"
    r"(?P<residual>-residual)?(?P<batchnorm>-batchnorm)?(?P<nobias>-nobias)?"
)
PROJECTOR_GRAMMAR = "identity or mlp{L}-{relu|gelu|linear}-dropout{D}[-residual][-batchnorm][-nobias]"

EMBED_JOINT: Final = "palcache embed ... --encoder hidden --items joint"
EMBED_TOKENS: Final = "palcache embed ... --encoder hidden --tokens responses"
EMBED_ALL_TOKENS: Final = "palcache embed ... --encoder hidden --tokens all"
EMBED_JOINT_TOKENS: Final = "palcache embed ... --encoder hidden --items joint --tokens responses"
"""The commands that make the vectors which some heads and losses need."""
