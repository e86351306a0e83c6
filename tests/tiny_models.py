"""Tiny sentence-transformers models with random weights, built in code and saved to a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

WIDTH = 20
LIMIT = 24
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = ("the", "cat", "dog", "sat", "mat", "query", "passage", "why", "so")


def build_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    pooling: str = "mean",
    include_prompt: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    dense: bool = False,
    act: str = "gelu",
    words: tuple[str, ...] = _WORDS,
    padding_side: str = "right",
    lowercase: bool = True,
) -> Path:
    """Build and save a BERT of two layers with a WordPiece tokenizer, pooling and normalisation.

    Args:
        folder: where to.
        seed: of the weights.
        pooling: sentence-transformers' pooling mode.
        include_prompt: pool over the prompt's tokens too.
        prompts: by name.
        default_prompt: which one is used where none is named.
        dense: add a linear layer from 20 to 7 values with a tanh.
        act: activation of the transformer.
        words: whole words of the vocabulary beside letters.
        padding_side: `left` or `right`.
        lowercase: of the tokenizer.
    """
    from transformers import BertConfig, BertModel

    tokenizer = build_tokenizer(words, padding_side=padding_side, lowercase=lowercase)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=28,
        max_position_embeddings=LIMIT + 8,
        hidden_act=act,
        initializer_range=0.5,
    )
    raw = folder.with_name(folder.name + "-raw")
    BertModel(config).save_pretrained(raw)
    tokenizer.save_pretrained(raw)
    save_sentence_transformer(
        raw,
        folder,
        pooling=pooling,
        include_prompt=include_prompt,
        prompts=prompts,
        default_prompt=default_prompt,
        dense=dense,
    )
    return folder


def build_tokenizer(words: tuple[str, ...] = _WORDS, *, padding_side: str = "right", lowercase: bool = True) -> Any:
    """Return a WordPiece tokenizer of letters and some words, with BERT's special tokens."""
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,:"]
    pieces = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in _SPECIAL}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LIMIT, padding_side=padding_side, **names
    )


def save_sentence_transformer(
    raw: Path,
    folder: Path,
    *,
    pooling: str,
    include_prompt: bool,
    prompts: dict[str, str] | None,
    default_prompt: str | None,
    dense: bool,
) -> None:
    """Wrap a saved transformer with pooling and normalisation, and save it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modules = [Transformer(str(raw)), Pooling(WIDTH, pooling, include_prompt=include_prompt)]
        if dense:
            modules.append(Dense(WIDTH, 7, activation_function=torch.nn.Tanh()))
        model = SentenceTransformer(
            modules=[*modules, Normalize()], device="cpu", prompts=prompts, default_prompt_name=default_prompt
        )
        model.save(str(folder))
