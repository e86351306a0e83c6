"""One small frozen dataclass per stage; a value that cannot work is refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from palcache.choices import (
    LINEAR_HEADS,
    PROJECTOR,
    PROJECTOR_GRAMMAR,
    HeadKind,
    Loss,
    Mixture,
    Optimizer,
    Precision,
    PromptAlignment,
    Schedule,
    Score,
    Start,
    TokenWeighting,
    UserForm,
    UserWeights,
    Weighting,
)
from palcache.option_checks import Config, read_config_file, require
from palcache.toml_files import read_toml

__all__ = [
    "ComputeDtype",
    "Config",
    "Device",
    "EmbedConfig",
    "EncoderKind",
    "ExportFormat",
    "FitConfig",
    "HeadConfig",
    "Items",
    "Pooling",
    "SplitBy",
    "SplitConfig",
    "StoredDtype",
    "TokenLevel",
    "UnknownUsers",
    "read_config_file",
    "read_toml",
]

Device = str
"""`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
StoredDtype = Literal["float16", "bfloat16", "float32", "int8"]
EncoderKind = Literal["auto", "sentence", "hidden"]
Pooling = Literal["auto", "last", "mean", "cls"]
Items = Literal["separate", "joint"]
TokenLevel = Literal["none", "responses", "all"]
SplitBy = Literal["auto", "row", "pair", "prompt", "user", "column"]
UnknownUsers = Literal["refuse", "generic", "drop"]
ExportFormat = Literal["safetensors", "parquet", "npy"]


MIN_STEPS: Final = 600
MIN_EPOCHS: Final = 4
"""What `epochs = None` stands for: short tables are seen more often, long ones a few times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitConfig(Config):
    """How comparisons are divided into train, validation and test.

    Attributes:
        by: the unit that stays in one split; `auto` takes the table's split column, else splits by pair.
        val: share of the units for validation, in [0, 1).
        test: share of the units for testing, in [0, 1).
        seed: of the draw.
    """

    by: SplitBy = "auto"
    val: float = 0.1
    test: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        require(
            0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1,
            f"Got val = {self.val} and test = {self.test}; expected shares in [0, 1) that leave something for training.",
        )
        require(0 <= self.seed < 2**32, f"Got seed = {self.seed}; expected a whole number in [0, 2**32).")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedConfig(Config):
    """How texts become vectors (stage 1).

    Attributes:
        model: `minilm`, the id of a model on the hub, or a folder.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let the model's repository run its own code.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        compute_dtype: type of the forward pass; `auto` is bfloat16 on CUDA devices that have it, else float32.
        dtype: type of the stored vectors.
        max_tokens: truncate texts to this many tokens; None keeps the model's own limit.
        truncate_dim: sentence-transformers models: keep this many values of a vector, for models trained so (Matryoshka);
            None keeps the model's own number.
        token_budget: padded tokens per batch; None chooses by device.
        shard_rows: rows per shard file; fewer where tokens are kept.
        encoder: `sentence` (sentence-transformers), `hidden` (hidden states of any transformers model), or `auto`:
            `sentence` where the model has a modules.json.
        pooling: hidden states: state of the last token, mean over all, state of the first; `auto` is `last` for causal
            models, else `mean`.
        layer: hidden states: of which layer; 0 is the embeddings, -1 the last.
        prompt_template: hidden states: what stands around a prompt, with `{text}` where it goes.
        response_template: the same for a response.
        chat_template: hidden states: write prompts, and joint items, by the tokenizer's chat template.
        attn: hidden states: implementation of attention (`sdpa`, `eager`, `flash_attention_2`, ...); None is the model's.
        items: `separate`: prompts and responses each by itself; `joint`: prompt + response in one forward pass.
        tokens: hidden states: keep the state of every token of responses, or of all items.
    """

    model: str = "minilm"
    revision: str | None = None
    trust_remote_code: bool = False
    device: Device = "auto"
    compute_dtype: ComputeDtype = "auto"
    dtype: StoredDtype = "float16"
    max_tokens: int | None = None
    token_budget: int | None = None
    shard_rows: int = 32_768
    encoder: EncoderKind = "auto"
    pooling: Pooling = "auto"
    layer: int = -1
    prompt_template: str = "{text}"
    response_template: str = "{text}"
    chat_template: bool = False
    attn: str | None = None
    items: Items = "separate"
    tokens: TokenLevel = "none"
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.model), "Got an empty model; expected minilm, a hub id or a folder.")
        require(self.shard_rows >= 1, f"Got shard_rows = {self.shard_rows}; expected at least 1.")
        for name in ("max_tokens", "token_budget", "truncate_dim"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"Got {name} = {value}; expected at least 1.")
        for name in ("prompt_template", "response_template"):
            value = getattr(self, name)
            require(
                value.count("{text}") == 1,
                f"Got {name} = {value!r}; expected a text with {{text}} once, where the item goes.",
            )
        require(
            not self.chat_template or self.prompt_template == self.response_template == "{text}",
            "Got a chat template and a prompt or response template; expected one of the two: leave the other out.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig(Config):
    """The shape of a head.

    Attributes:
        k: number of prototypes; 1 is the user-blind head.
        p: width of the preference space; None is the encoder's width.
        projector: name in the grammar `PROJECTOR_GRAMMAR`.
        temperature: of the softmax over a user's weights.
        head: `pal-b`, `pal-a`, or a yardstick: `bradley-terry`, `low-rank`, `pca`, `per-user`.
        score: how an item and an ideal point make a reward; None is `dist` for `pal-a`, else `angle`.
        user_form: how a PAL-A user's ideal point is made.
        mixture: how user weights become a point of the simplex.
        user_weights: of `low-rank`: on the simplex, or free.
        start: `shared`, prototypes with small differences and users in the middle; or `published`, both drawn at random.
    """

    later: ClassVar[frozenset[str]] = frozenset({"head", "score", "user_form", "mixture", "user_weights", "start"})

    k: int = 2
    p: int | None = 64
    projector: str = "mlp2-relu-dropout1"
    temperature: float = 1.0
    head: HeadKind = "pal-b"
    score: Score | None = None
    user_form: UserForm = "f(Pw)"
    mixture: Mixture = "softmax"
    user_weights: UserWeights = "simplex"
    start: Start = "shared"

    def __post_init__(self) -> None:
        require(self.k >= 1, f"Got k = {self.k}; expected at least one prototype.")
        require(self.p is None or self.p >= 1, f"Got p = {self.p}; expected a width of at least 1.")
        require(
            0 < self.temperature < float("inf"),
            f"Got temperature = {self.temperature}; expected a finite number above 0.",
        )
        require(
            PROJECTOR.fullmatch(self.projector) is not None,
            f"Got the projector {self.projector!r}; expected {PROJECTOR_GRAMMAR}, for example mlp2-gelu-dropout05.",
        )
        if self.head in LINEAR_HEADS:
            require(
                self.score is None, f"Got the score {self.score} for {self.head}; scores belong to pal-a and pal-b."
            )
        require(
            self.head == "pal-a" or self.user_form == "f(Pw)",
            f"Got the user form {self.user_form} for {self.head}; user forms belong to pal-a.",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FitConfig(Config):
    """How a head is trained (stage 2).

    Attributes:
        batch_size: comparisons per step.
        epochs: passes over the training comparisons; None takes as many as make `MIN_STEPS` steps, at least `MIN_EPOCHS`.
        lr: peak learning rate of the projectors.
        lr_users: peak learning rate of the user weights.
        lr_scale: peak learning rate of logit_scale.
        weight_decay: of the projectors.
        warmup: share of the steps in which the learning rates rise linearly.
        evaluations: how often, evenly over the run, validation is measured.
        patience: stop after this many evaluations without a lower validation loss; 0 never stops early.
        seed: of the initialisation, the order of the comparisons and the dropout.
        lr_prototypes: peak learning rate of PAL-A's prototypes P.
        optimizer: `adamw`, or `adam`, whose weight decay is coupled with the gradient, as published.
        schedule: after the warmup the learning rates fall as a `cosine` or `linear` to 0, or stay `constant`.
        loss: of the margins; None is the one that the head's score was published with.
        weighting: every comparison counts the same, or every user of a batch does.
        token_weighting: train on the margins at every token of the spans, weighted so; None trains on pooled vectors.
        prompt_alignment: for token losses of PAL-B: the prompt is one vector, or its state at the response's position.
        bound_weight: weight of the sum of the norms of the batch's ideal points beyond `bound`; 0 leaves the term out.
        bound: norm up to which ideal points are free.
        precision: `bfloat16` runs the forward pass under autocast; the loss and the parameters stay float32.
    """

    later: ClassVar[frozenset[str]] = frozenset(
        {"lr_prototypes", "optimizer", "schedule", "loss", "weighting", "token_weighting", "prompt_alignment",
         "bound_weight", "bound", "precision"}
    )  # fmt: skip

    batch_size: int = 256
    epochs: int | None = None
    lr: float = 1e-3
    lr_users: float = 0.1
    lr_scale: float = 0.01
    weight_decay: float = 0.01
    warmup: float = 0.05
    evaluations: int = 20
    patience: int = 8
    seed: int = 0
    lr_prototypes: float = 5e-3
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "cosine"
    loss: Loss | None = None
    weighting: Weighting = "comparisons"
    token_weighting: TokenWeighting | None = None
    prompt_alignment: PromptAlignment = "pooled"
    bound_weight: float = 0.0
    bound: float = 4.0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"Got batch_size = {self.batch_size}; expected at least 1.")
        require(self.epochs is None or self.epochs >= 1, f"Got epochs = {self.epochs}; expected at least 1.")
        require(self.evaluations >= 1, f"Got evaluations = {self.evaluations}; expected at least 1.")
        require(self.patience >= 0, f"Got patience = {self.patience}; expected 0 (never stop early) or more.")
        require(0 <= self.warmup < 1, f"Got warmup = {self.warmup}; expected a share in [0, 1).")
        require(0 <= self.seed < 2**32, f"Got seed = {self.seed}; expected a whole number in [0, 2**32).")
        for name in ("lr", "lr_users", "lr_scale", "lr_prototypes", "weight_decay", "bound_weight", "bound"):
            value = getattr(self, name)
            require(0 <= value < float("inf"), f"Got {name} = {value}; expected a finite number of at least 0.")

        require(
            self.prompt_alignment == "pooled" or self.token_weighting is not None,
            f"Got the prompt alignment {self.prompt_alignment} without a token weighting; it belongs to token losses: add "
            "--token-weighting.",
        )

    def total_epochs(self, comparisons: int) -> int:
        """Return the number of epochs for a number of training comparisons."""
        if self.epochs is not None:
            return self.epochs
        steps_per_epoch = -(-comparisons // self.batch_size)
        return max(MIN_EPOCHS, -(-MIN_STEPS // steps_per_epoch))
