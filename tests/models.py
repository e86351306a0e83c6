"""The published PAL backbone families as tiny random models with tokenizers of their own, made in code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.trainers import Trainer

from palcache.sentences import TOPICS

VOCABULARY: Final = 300
FAMILIES: Final = ("opt", "distilbert", "xlm-roberta", "qwen2", "gpt2")
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_BYTES: Final = sorted(pre_tokenizers.ByteLevel.alphabet())


def corpus() -> list[str]:
    """Return the texts of the sample."""
    return [text for topic in TOPICS for text in (topic.prompt, *(response.text for response in topic.responses))]


def _byte_level(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=_BYTES, show_progress=False
    )
    return _trained(tokenizer, trainer)


def _trained(tokenizer: Tokenizer, trainer: Trainer) -> Tokenizer:
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def _around(tokenizer: Tokenizer, first: str, last: str | None) -> Tokenizer:
    names = [name for name in (first, last) if name is not None]
    single = f"{first} $A {last}" if last else f"{first} $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, tokenizer.token_to_id(name)) for name in names]
    )
    return tokenizer


def _wrap(tokenizer: Tokenizer, **options: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def _opt() -> tuple[Any, Any]:
    tokenizer = _around(_byte_level(["<s>", "<pad>", "</s>", "<unk>"]), "</s>", None)
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=48, word_embed_proj_dim=20, ffn_dim=56, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, do_layer_norm_before=False, pad_token_id=1,
        bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    return transformers.OPTModel(config), _wrap(
        tokenizer, pad_token="<pad>", bos_token="</s>", eos_token="</s>", unk_token="<unk>"
    )


def _distilbert() -> tuple[Any, Any]:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer = _around(_trained(tokenizer, trainer), "[CLS]", "[SEP]")
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=36, hidden_dim=52, n_layers=3, n_heads=3, max_position_embeddings=64
    )
    return transformers.DistilBertModel(config), _wrap(
        tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]"
    )


def _xlm_roberta() -> tuple[Any, Any]:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer = _around(_trained(tokenizer, trainer), "<s>", "</s>")
    config = transformers.XLMRobertaConfig(
        vocab_size=VOCABULARY, hidden_size=44, intermediate_size=60, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=66, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
    )  # fmt: skip
    return transformers.XLMRobertaModel(config), _wrap(
        tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>", mask_token="<mask>"
    )


def _qwen2() -> tuple[Any, Any]:
    tokenizer = _byte_level(["<|endoftext|>", "<|im_start|>"])
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=40, intermediate_size=68, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.Qwen2Model(config), _wrap(
        tokenizer, pad_token="<|endoftext|>", eos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def _gpt2() -> tuple[Any, Any]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=28, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2Model(config), _wrap(_byte_level(["<|endoftext|>"]), eos_token="<|endoftext|>")


_BUILDERS: Final[dict[str, Callable[[], tuple[Any, Any]]]] = {
    "opt": _opt,
    "distilbert": _distilbert,
    "xlm-roberta": _xlm_roberta,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
}


def save_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny random model of a family and its tokenizer; return the folder."""
    torch.manual_seed(seed)
    network, tokenizer = _BUILDERS[family]()
    for parameter in network.parameters():  # large enough that every layer matters
        parameter.data.mul_(3.0 if parameter.ndim > 1 else 1.0)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
