"""Embeddings: pooled as the files of a sentence model say, beside running streams and adapters."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from broker.protocol.messages import Kind, Request, new_id
from tests.engines import tiny
from tests.engines.tiny import load, plain
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.engine import TransformersEngine

# --- embeddings -----------------------------------------------------------------------------------


def embed(engine: TransformersEngine, inputs: list[Any], model: str, **arguments: Any) -> Any:
    request = Request(model=model, kind=Kind.EMBED, inputs=inputs, embed_args=arguments, window=1)
    answer = tiny.run(engine, [Job(new_id(), request)])[0]
    assert answer.ended is not None and answer.ended.result is not None, answer.failed
    result = answer.ended.result
    width = result["dimensions"]
    return np.array([struct.unpack(f"<{width}f", row) for row in result["embeddings"]])


def test_embeddings_are_the_normalised_mean_of_the_states(folder: Path) -> None:
    engine = load(folder)
    inputs = tiny.prompts(7, low=3, high=60, seed=2)
    try:
        got = embed(engine, inputs, "tiny-llama")
        base = tiny.llama().model
        with torch.inference_mode():
            rows = [base(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in inputs]
        wanted = torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()
        assert np.allclose(got, wanted, atol=1e-5)
        text = embed(engine, ["hello world", [307, 382]], "tiny-llama")
        assert np.allclose(text[0], text[1], atol=1e-6)
        short = embed(engine, inputs, "tiny-llama", dimensions=16, pooling="last")
        assert short.shape == (7, 16)
        assert np.allclose(np.linalg.norm(short, axis=1), 1.0, atol=1e-5)
    finally:
        engine.close()


def sentence_model(path: Path, *kinds: str, pooling: dict[str, Any]) -> Any:
    """A BERT with the files of sentence-transformers, saved at `path`."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = BertModel(config).eval()
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    sentence_files(path, *kinds, pooling=pooling)
    return model


def sentence_files(path: Path, *kinds: str, pooling: dict[str, Any]) -> None:
    modules = [
        {
            "path": f"{number}_{kind}" if number else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for number, kind in enumerate(("Transformer", *kinds))
    ]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def pooled(states: torch.Tensor) -> Any:
    return torch.nn.functional.normalize(states, dim=-1).numpy()


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda s: s[0]),
        ({"pooling_mode_lasttoken": True}, lambda s: s[-1]),
        ({"pooling_mode_max_tokens": True}, lambda s: s.amax(0)),
        ({"pooling_mode": "mean"}, lambda s: s.mean(0)),
    ],
)
def test_a_sentence_model_pools_as_its_files_say(
    pooling: dict[str, Any], wanted: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "sentences"
    model = sentence_model(path, "Pooling", "Normalize", pooling=pooling)
    engine = load(path)
    inputs = tiny.prompts(4, low=3, high=30, seed=2)
    try:
        assert Kind.CHAT not in engine.capabilities.models[0].kinds
        got = embed(engine, inputs, "sentences")
        with torch.inference_mode():
            rows = [wanted(model(torch.tensor([ids])).last_hidden_state[0]) for ids in inputs]
        assert np.allclose(got, pooled(torch.stack(rows)), atol=1e-5)
        chat = tiny.run(engine, [tiny.ids_job([20, 21], model="sentences")])[0]
        assert chat.failed is not None and "does not generate text" in chat.failed.message
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("kinds", "pooling", "words"),
    [
        (("Pooling", "LayerNorm"), {"pooling_mode_mean_tokens": True}, "LayerNorm"),
        (("Pooling",), {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        (
            ("Pooling",),
            {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True},
            "mean and max",
        ),
    ],
)
def test_a_sentence_model_that_would_be_embedded_otherwise_is_refused(
    kinds: tuple[str, ...], pooling: dict[str, Any], words: str, tmp_path: Path
) -> None:
    sentence_model(tmp_path / "sentences", *kinds, pooling=pooling)
    with pytest.raises(EngineLoadError, match=words):
        load(tmp_path / "sentences")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("beside", [True, False])
def test_an_adapter_of_a_sentence_model_embeds_as_itself(beside: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = sentence_model(tmp_path / "base", "Pooling", pooling={"pooling_mode_mean_tokens": True})
    inputs = tiny.prompts(4, low=3, high=30, seed=2)
    with torch.inference_mode():
        unchanged = torch.stack(
            [model(torch.tensor([ids])).last_hidden_state[0].mean(0) for ids in inputs]
        )
    with_it = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in with_it.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    with_it.eval().save_pretrained(tmp_path / "a")
    if beside:
        engine = load(tmp_path / "base", engine_args={"adapters": f"a={tmp_path / 'a'}"})
    else:
        # Its own pooling is the last token's.
        sentence_files(tmp_path / "a", "Pooling", pooling={"pooling_mode_lasttoken": True})
        engine = load(tmp_path / "a", model_base=str(tmp_path / "base"))
    try:
        got = embed(engine, inputs, "a")
        with torch.inference_mode():
            states = [with_it(torch.tensor([ids])).last_hidden_state[0] for ids in inputs]
        rows = [state.mean(0) if beside else state[-1] for state in states]
        assert np.allclose(got, torch.stack(rows).numpy(), atol=1e-5)
        assert not beside or np.allclose(embed(engine, inputs, "base"), unchanged, atol=1e-5)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pooling": "sum"}, "pooling"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": 65}, "dimensions"),
        ({"normalise": True}, "normalise"),
        ({"truncate": 1}, "truncate"),
    ],
)
def test_a_wrong_embedding_argument_is_refused(
    folder: Path, arguments: dict[str, Any], words: str
) -> None:
    engine = tiny.serve(tiny.llama())
    request = Request(
        model="tiny", kind=Kind.EMBED, inputs=["hello"], embed_args=arguments, window=1
    )
    try:
        answer = tiny.run(engine, [Job(new_id(), request)])[0]
        assert answer.failed is not None and words in answer.failed.message
    finally:
        engine.close()


def test_a_text_that_is_too_long_is_refused_or_its_end_is_left_out() -> None:
    engine = tiny.serve(tiny.llama())
    context = engine.capabilities.models[0].context_tokens
    assert context is not None
    word = tiny.tokenizer()("hello")["input_ids"]
    long = [word[0]] * (context + 5)
    request = Request(model="tiny", kind=Kind.EMBED, inputs=[long], window=1)
    text = "hello " * (context + 5)
    try:
        answer = tiny.run(engine, [Job(new_id(), request)])[0]
        assert answer.failed is not None and answer.failed.code == "context_overflow"
        fits = embed(engine, [long[:context]], "tiny")
        assert np.array_equal(embed(engine, [long], "tiny", truncate=True), fits)
        [ids] = tiny.tokenizer()([text], truncation=True, max_length=context)["input_ids"]
        cut = embed(engine, [text, "hello"], "tiny", truncate=True)
        assert np.allclose(cut, embed(engine, [ids, "hello"], "tiny"), atol=1e-6)
    finally:
        engine.close()


def test_embedding_goes_on_beside_running_streams() -> None:
    engine = tiny.serve(tiny.llama())
    stream = tiny.ids_job([20, 21, 22], max_tokens=40)
    request = Request(
        model="tiny", kind=Kind.EMBED, inputs=tiny.prompts(100, low=100, high=200), window=1
    )
    try:
        answers = tiny.run(engine, [stream, Job(new_id(), request)])
        assert answers[0].token_ids == plain(tiny.llama(), [20, 21, 22], 40)
        assert answers[1].ended is not None and answers[1].ended.result is not None
        assert len(answers[1].ended.result["embeddings"]) == 100
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("activation", "cause"),
    [("torch.nn.modules.activation.Tanh", "has no model.safetensors"), ("own.Curve", "own.Curve")],
)
def test_a_dense_layer_that_cannot_be_made_is_said_so(
    activation: str, cause: str, tmp_path: Path
) -> None:
    sentence_model(tmp_path, "Pooling", "Dense", pooling={"pooling_mode": "mean"})
    dense = tmp_path / "2_Dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({"activation_function": activation}))
    if "own" in activation:
        save_file({"linear.weight": torch.eye(32)}, dense / "model.safetensors")
    with pytest.raises(EngineLoadError, match=cause):
        load(tmp_path)
