"""Sentence-transformers models of less common kinds: routers, shortened vectors, no pad token, texts that break them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palcache.cache import Cache
from palcache.care.verification import reencode_sample
from palcache.comparisons import Comparisons
from palcache.configs import EmbedConfig, SplitConfig
from palcache.embedding.stages import embed_tables
from palcache.encoders import Role, loading
from palcache.encoders.choices import load_encoder as load_any
from palcache.encoders.sentence import SentenceEncoder, load_encoder
from palcache.errors import InputError, ModelError
from tests.models import save_model
from tests.tiny_models import WIDTH, build_tiny_model

TEXTS = ["the cat sat", "why so", "dog " * 40, "a", "so so the mat"]
ROLES: tuple[Role, ...] = ("prompt", "response")


def load(folder: Path, **options: Any) -> SentenceEncoder:
    return load_encoder(EmbedConfig(model=str(folder), device="cpu", **options))


def encode(encoder: SentenceEncoder, role: Role, *, alone: bool = False) -> torch.Tensor:
    """Return vectors of all texts together, or one by one."""
    window = encoder.tokenize(TEXTS, role)
    each = alone or encoder.equal_lengths
    batches = np.arange(len(TEXTS))[:, None] if each else np.arange(len(TEXTS))[None]
    return torch.cat([encoder.encode(window, rows, role) for rows in batches])


def theirs(folder: Path, role: Role, **options: Any) -> torch.Tensor:
    """Return what sentence-transformers itself gives, one text at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", **options)
    method = model.encode_query if role == "prompt" else model.encode_document
    return torch.from_numpy(method(TEXTS, batch_size=1))


def save_router(folder: Path, *, pooling: str = "cls", act: str = "relu") -> Path:
    """Save a model with a transformer and a tokenizer of its own for queries and for documents."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Router, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    for name, options in (("q", {}), ("d", {"seed": 3, "words": ("the", "zebra"), "act": act})):
        build_tiny_model(folder.with_name(f"{folder.name}-{name}"), **options)  # type: ignore[arg-type]
    raw = [str(folder.with_name(f"{folder.name}-{name}-raw")) for name in "qd"]
    router = Router.for_query_document(
        query_modules=[Transformer(raw[0]), Pooling(WIDTH, "mean")],
        document_modules=[Transformer(raw[1]), Pooling(WIDTH, pooling)],
    )
    prompts = {"query": "query: ", "document": "passage: "}
    SentenceTransformer(modules=[router, Normalize()], device="cpu", prompts=prompts).save(str(folder))
    return folder


def test_a_router_sends_prompts_and_responses_their_own_ways(tmp_path: Path) -> None:
    """Each way has its own transformer, tokenizer and pooling; batches are cut out of the window on both."""
    folder = save_router(tmp_path / "router")
    encoder = load(folder)
    for role in ROLES:
        torch.testing.assert_close(encode(encoder, role), theirs(folder, role), atol=1e-5, rtol=0)
        assert encoder._constants[role] is not None
    queries = encoder.tokenize(TEXTS, "prompt").features["input_ids"]
    assert queries.tolist() != encoder.tokenize(TEXTS, "response").features["input_ids"].tolist()


def test_every_way_of_a_router_is_part_of_its_identity(tmp_path: Path) -> None:
    spec = load(save_router(tmp_path / "one")).spec("prompt")
    assert load(save_router(tmp_path / "again")).spec("prompt") == spec
    for options in ({"pooling": "mean"}, {"act": "gelu"}):
        other = load(save_router(tmp_path / next(iter(options)), **options)).spec("prompt")
        assert [name for name in spec if spec[name] != other[name]] == [
            {"pooling": "modules", "act": "architecture"}[next(iter(options))]
        ]


def test_a_router_computes_its_transformers_in_bfloat16(tmp_path: Path) -> None:
    folder = save_router(tmp_path / "router")
    ours = encode(load(folder, compute_dtype="bfloat16"), "response")
    assert ours.dtype == torch.float32
    assert float(torch.nn.functional.cosine_similarity(ours, theirs(folder, "response")).min()) > 0.99


def test_vectors_may_be_shortened(tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path / "model")
    encoder = load(folder, truncate_dim=7)
    assert encoder.width == 7
    expected = theirs(folder, "response", truncate_dim=7)
    torch.testing.assert_close(encode(encoder, "response"), expected, atol=1e-5, rtol=0)
    spec, whole = encoder.spec("prompt"), load(folder).spec("prompt")
    assert [name for name in spec if spec[name] != whole[name]] == ["truncate_dim"]
    with pytest.raises(InputError, match=rf"Got truncate_dim = 21; the vectors of model have {WIDTH} values"):
        load(folder, truncate_dim=WIDTH + 1)
    with pytest.raises(InputError, match="Got truncate_dim = 0; expected at least 1"):
        EmbedConfig(truncate_dim=0)


def test_hidden_states_are_not_shortened(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "gpt2")
    with pytest.raises(InputError, match=r"Got --truncate-dim 4 for hidden states of .*; it belongs to sentence-tr"):
        load_any(EmbedConfig(model=str(folder), device="cpu", truncate_dim=4))


def save_without_pad(folder: Path) -> Path:
    """Save a decoder with mean pooling whose tokenizer has no pad token."""
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    (folder / "1_Pooling").mkdir(parents=True)
    transformer, pooling = Transformer(str(save_model("gpt2", folder.with_name("raw")))), Pooling(28, "mean")
    assert transformer.tokenizer.pad_token is None
    transformer.save(str(folder))
    pooling.save(str(folder / "1_Pooling"))
    kinds = ("sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling")
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": kind}
        for at, (kind, path) in enumerate(zip(kinds, ("", "1_Pooling"), strict=True))
    ]
    (folder / "modules.json").write_text(str(modules).replace("'", '"'))
    return folder


def test_a_model_without_a_pad_token_reads_batches(tmp_path: Path) -> None:
    """Its end of text fills them; a vector is that of its text alone."""
    encoder = load(save_without_pad(tmp_path / "model"))
    torch.testing.assert_close(encode(encoder, "response"), encode(encoder, "response", alone=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize("cut", [True, False])
def test_a_text_that_breaks_the_tokenizer_fails_alone(
    cut: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether batches are cut out of the window or prepared one by one."""
    encoder = load(build_tiny_model(tmp_path / "model"))
    tokenizer = type(encoder._model.tokenizer)
    call = tokenizer.__call__

    def breaking(self: Any, text: Any = None, **options: Any) -> Any:
        if any("BREAK" in one for one in ([text] if isinstance(text, str) else text or [])):
            raise RuntimeError("tokenizer broke")
        return call(self, text, **options)

    monkeypatch.setattr(tokenizer, "__call__", breaking)
    if not cut:
        monkeypatch.setattr(SentenceEncoder, "_constants_of", lambda *_: None)
    rows = [
        {"user_id": "u", "prompt": "why", "response_1": a, "response_2": b, "y": 1}
        for a, b in (("BREAK it", "the cat"), ("so", "a dog"), ("the mat sat", "a dog"))
    ]
    whole = SplitConfig(by="row", val=0.0, test=0.0)
    summary = embed_tables(Comparisons.from_rows(rows), tmp_path / "c", encoder=encoder, split=whole)
    assert (summary.failed, summary.encoded) == (1, 5)
    failed = [path.read_text() for path in (tmp_path / "c").glob("spaces/*/failed.jsonl")]
    assert len(failed) == 1
    assert "tokenizer broke" in failed[0]
    assert reencode_sample(Cache(tmp_path / "c"), encoder, 9)[2] == ()


def test_a_model_of_a_folder_with_code_of_its_own_needs_trust(tmp_path: Path) -> None:
    """The code of a module runs only where it was allowed to."""
    import json

    folder = build_tiny_model(tmp_path / "model")
    (folder / "own.py").write_text(
        "from sentence_transformers.base.modules import Module\n"
        "class Own(Module):\n"
        "    def forward(self, features):\n"
        "        features['sentence_embedding'] = features['sentence_embedding'] * 2\n"
        "        return features\n"
        "    def save(self, *args, **options):\n"
        "        pass\n"
        "    @classmethod\n"
        "    def load(cls, *args, **options):\n"
        "        return cls()\n"
    )
    modules = json.loads((folder / "modules.json").read_text())
    modules.append({"idx": len(modules), "name": "own", "path": "own", "type": "own.Own"})
    (folder / "own").mkdir()
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="runs code of its own repository; if you trust it, add --trust-remote-code"):
        load(folder)
    norms = torch.linalg.vector_norm(encode(load(folder, trust_remote_code=True), "response"), dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.0))
    assert "401" in loading.why_not("acme/gated", "acme/gated", OSError("401 Client Error"))
