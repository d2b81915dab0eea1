"""Rerank and classify by the transformers engine: scores equal the model's own forward, at any
batch; any other model is refused."""

from __future__ import annotations

import copy
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from broker.protocol.messages import FinishReason, Kind, Request, new_id
from tests.engines import tiny
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.engine import TransformersEngine

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PAIRS = [
    ("the fox", "the quick brown fox"),
    ("the fox", "a"),
    ("hello world", "the lazy dog sleeps until noon and then it runs through the world again"),
    ("a", "b"),
] * 5
TEXTS = [text for pair in PAIRS for text in pair]


def bert(labels: int, **more: Any) -> Any:
    torch.manual_seed(labels)
    config = transformers.BertConfig(
        **SIZES, max_position_embeddings=128, num_labels=labels, pad_token_id=0, **more
    )
    return transformers.BertForSequenceClassification(config)


def roberta(labels: int, **more: Any) -> Any:
    torch.manual_seed(labels)
    config = transformers.RobertaConfig(
        **SIZES, max_position_embeddings=66, num_labels=labels, pad_token_id=1, **more
    )
    return transformers.RobertaForSequenceClassification(config)


def llama(labels: int, **more: Any) -> Any:
    torch.manual_seed(labels)
    config = transformers.LlamaConfig(
        **SIZES, max_position_embeddings=128, num_labels=labels, **more
    )
    return transformers.LlamaForSequenceClassification(config)


def tokenizer(*, types: bool) -> Any:
    """The tiny tokenizer with a frame around texts and pairs; `types`: with token type ids."""
    from tokenizers.processors import TemplateProcessing

    made = copy.deepcopy(tiny.tokenizer())
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>",
        pair="<|user|> $A <|end|> $B:1 <|end|>:1",
        special_tokens=[("<|user|>", tiny.USER), ("<|end|>", tiny.END)],
    )
    made.model_input_names = ["input_ids", "attention_mask", *(["token_type_ids"] if types else [])]
    return made


def saved(folder: Path, model: Any, *, types: bool = False) -> Path:
    model.eval()
    for parameter in model.parameters():  # far from what every small model says
        parameter.data.mul_(3)
    model.save_pretrained(folder)
    tokenizer(types=types).save_pretrained(folder)
    return folder


def ask(engine: TransformersEngine, kind: Kind, name: str, **fields: Any) -> Any:
    request = Request(model=name, kind=kind, window=1, **fields)
    return tiny.run(engine, [Job(new_id(), request)])[0]


def scores(engine: TransformersEngine, kind: Kind, name: str, **fields: Any) -> list[list[float]]:
    answer = ask(engine, kind, name, **fields)
    assert answer.ended is not None, answer.failed
    result = answer.ended.result
    width = len(result["labels"])
    return [list(struct.unpack(f"<{width}f", row)) for row in result["scores"]]


def own(folder: Path, items: list[Any], activation: Any) -> list[list[float]]:
    """What transformers itself says of each, alone."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return [
            activation(
                model(**encode(*([x] if isinstance(x, str) else x), return_tensors="pt")).logits[0]
            ).tolist()
            for x in items
        ]


def softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1)


@pytest.mark.parametrize("make", [bert, roberta, llama])
def test_a_cross_encoder_scores_as_transformers_does_at_any_batch(
    make: Any, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "cross", make(1), types=make is bert)
    engine = tiny.load(folder)
    try:
        [info] = engine.capabilities.models
        assert {"rerank", "classify"} <= set(info.further_kinds) and not info.serial
        assert not {Kind.CHAT, Kind.COMPLETE, Kind.EMBED} & set(info.kinds)
        wanted = own(folder, PAIRS, torch.sigmoid)
        assert len({round(score, 4) for [score] in wanted}) > 3
        got = scores(engine, Kind.RERANK, "cross", pairs=PAIRS)
        assert got == [pytest.approx(row, abs=1e-5) for row in wanted]
        for pair, row in zip(PAIRS[:4], wanted, strict=False):
            alone = scores(engine, Kind.RERANK, "cross", pairs=[pair])
            assert alone == [pytest.approx(row, abs=1e-5)]
        raw = scores(
            engine, Kind.CLASSIFY, "cross", pairs=PAIRS, classify_args={"activation": False}
        )
        assert raw == [pytest.approx(row, abs=1e-4) for row in own(folder, PAIRS, lambda x: x)]
    finally:
        engine.close()


@pytest.mark.parametrize("make", [bert, roberta, llama])
def test_a_classifier_gives_the_probability_of_every_label(make: Any, tmp_path: Path) -> None:
    names = {0: "bad", 1: "so-so", 2: "good"}
    folder = saved(tmp_path / "mood", make(3, id2label=names), types=make is bert)
    engine = tiny.load(folder)
    try:
        [info] = engine.capabilities.models
        assert info.details["labels"] == list(names.values())
        assert "rerank" not in info.further_kinds
        answer = ask(engine, Kind.CLASSIFY, "mood", inputs=["hello"])
        assert answer.ended.result["labels"] == list(names.values())
        got = scores(engine, Kind.CLASSIFY, "mood", inputs=TEXTS)
        assert got == [pytest.approx(row, abs=1e-5) for row in own(folder, TEXTS, softmax)]
        ids = tokenizer(types=False)("the fox")["input_ids"]
        assert scores(engine, Kind.CLASSIFY, "mood", inputs=["the fox", ids])[0] == pytest.approx(
            scores(engine, Kind.CLASSIFY, "mood", inputs=[ids])[0], abs=1e-6
        )
        refused = ask(engine, Kind.RERANK, "mood", pairs=PAIRS)
        assert "one label, and it has 3" in refused.failed.message
        for kind, fields in ((Kind.EMBED, {"inputs": ["x"]}), (Kind.COMPLETE, {"prompt": "x"})):
            assert ask(engine, kind, "mood", **fields).failed.code == "invalid_request"
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("more", "activation"),
    [
        ({"problem_type": "multi_label_classification"}, torch.sigmoid),
        ({"problem_type": "regression"}, lambda x: x),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            lambda x: x,
        ),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"},
            torch.sigmoid,
        ),
    ],
)
def test_the_activation_is_the_models_own(more: Any, activation: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "own", bert(2, **more))
    engine = tiny.load(folder)
    try:
        got = scores(engine, Kind.CLASSIFY, "own", inputs=TEXTS[:4])
        assert got == [pytest.approx(row, abs=1e-5) for row in own(folder, TEXTS[:4], activation)]
    finally:
        engine.close()


def test_an_activation_of_somebodys_own_is_refused_at_load(tmp_path: Path) -> None:
    noted = {"sentence_transformers": {"activation_fn": "my.package.Sharper"}}
    folder = saved(tmp_path / "odd", bert(1, **noted))
    with pytest.raises(EngineLoadError, match=re.escape("my.package.Sharper")):
        tiny.load(folder)


def test_what_is_too_long_is_refused_or_cut(tmp_path: Path) -> None:
    """RoBERTa's positions begin after its padding token: of 66 positions, 64 are for tokens."""
    folder = saved(tmp_path / "short", roberta(1))
    engine = tiny.load(folder)
    long = ("the fox", "hello " * 200)
    try:
        [info] = engine.capabilities.models
        assert info.context_tokens == 64
        answer = ask(engine, Kind.RERANK, "short", pairs=[long])
        assert answer.failed is not None and answer.failed.code == "context_overflow"
        cut = {"truncate": True}
        got = scores(engine, Kind.RERANK, "short", pairs=[long, PAIRS[0]], classify_args=cut)
        encode = transformers.AutoTokenizer.from_pretrained(folder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
        made = encode(*long, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            wanted = model(**made).logits.sigmoid().item()
        assert got[0] == [pytest.approx(wanted, abs=1e-5)]
        wrong = ask(engine, Kind.RERANK, "short", pairs=PAIRS, classify_args={"normalize": True})
        assert "classify_args" in wrong.failed.message
    finally:
        engine.close()


def test_labels_of_one_name_stay_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "twins", bert(2, id2label={0: "x", 1: "x"}))
    engine = tiny.load(folder)
    try:
        assert engine.capabilities.models[0].details["labels"] == ["x", "x (1)"]
    finally:
        engine.close()


@pytest.mark.parametrize("kind", [Kind.RERANK, Kind.CLASSIFY])
def test_a_model_that_writes_neither_reranks_nor_classifies(kind: Kind) -> None:
    engine = tiny.serve(tiny.llama())
    try:
        [info] = engine.capabilities.models
        assert kind.value not in info.further_kinds
        failed = ask(engine, kind, "tiny", pairs=PAIRS).failed
        assert failed.code == "invalid_request" and f"cannot {kind.value}" in failed.message
    finally:
        engine.close()


def test_requests_take_turns_and_a_cancelled_one_ends(tmp_path: Path) -> None:
    folder = saved(tmp_path / "busy", bert(1))
    engine = tiny.load(folder)
    try:
        long = Job(new_id(), Request(model="busy", kind=Kind.RERANK, pairs=PAIRS * 200, window=1))
        short = Job(new_id(), Request(model="busy", kind=Kind.CLASSIFY, inputs=TEXTS, window=1))
        engine.add(long)
        engine.add(short)
        answers: dict[bytes, Any] = {}
        while short.request_id not in answers:
            tiny.collect(engine.step(), answers)
        assert long.request_id not in answers and answers[short.request_id].ended is not None
        engine.cancel(long.request_id)
        while engine.busy:
            tiny.collect(engine.step(), answers)
        assert answers[long.request_id].reason is FinishReason.CANCELLED
    finally:
        engine.close()
