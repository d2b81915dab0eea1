"""Decisions: a request, what transformers' own pipeline answers to it, and models that decide."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image

from broker.protocol.messages import Kind, Question, Request, new_id
from tests.engines import tiny
from worker.engines.base import Job

pytest.importorskip("transformers.decision", reason="before transformers 5.24")
from transformers import JevConfig, JevForDecision
from transformers.decision import DecisionConfig
from transformers.pipelines import DecisionPipeline

STATE = "the quick brown fox jumps over the lazy dog. " * 3
QUESTIONS: dict[str, Any] = {
    "colour": {
        "type": "choice",
        "instructions": "what is the red square?",
        "criteria": {"red": None, "blue": "like the circle", "green": {"of": ["fox", "dog"]}},
    },
    "count": {
        "type": "score",
        "instructions": ["how many?"],
        "criteria": ["two", "three", {"a": 4}],
    },
    "side": {"type": "choice", "criteria": {"left": "the lazy dog", "right": None}},
    "alone": {"type": "choice", "criteria": {"left": None}},
}
TRUE = {"true": {"type": "noul", "instructions": "is this a picture?"}}
#: A head's prompt with every question in it, read before each mark.
ALL_AT_ONCE = (
    "<|user|>{{ state if state is string else state|tojson }}"
    "{% for question in questions %} {{ question.instructions or '' }}"
    "{% for option in question.options %} {{ option }}{% endfor %} [answer]:<|mark|> then"
    "{% endfor %}<|assistant|>"
)
ONE_BY_ONE = (
    "<|user|>{{ state if state is string else state|tojson }} {{ question.instructions or '' }}"
    "{% for option in question.options %} {{ option }}{% endfor %} [answer]:<|mark|>"
)


def job(
    state: Any = STATE,
    questions: Mapping[str, Any] = QUESTIONS,
    images: Mapping[str, bytes] | None = None,
    model: str = "tiny",
) -> Job:
    images = images or {}
    request = Request(
        model=model,
        kind=Kind.DECIDE,
        state=state,
        questions={name: Question(**question) for name, question in questions.items()},
        assets={name: index for index, name in enumerate(images)},
        attachments=[],
        window=1,
    )
    return Job(new_id(), request, tuple(images.values()))


def pipeline_answers(
    pipe: DecisionPipeline,
    state: Any = STATE,
    questions: Mapping[str, Any] = QUESTIONS,
    images: Mapping[str, bytes] | None = None,
) -> dict[str, Any]:
    opened = {name: Image.open(io.BytesIO(data)) for name, data in (images or {}).items()}
    request = {"state": state, "questions": dict(questions), "assets": opened or None}
    answers: dict[str, Any] = pipe(request)
    return answers


def pipeline(model: Any, processor: Any = None, config: DecisionConfig | None = None) -> Any:
    """transformers' own, with a tokenizer of its own: it adds to it."""
    own = copy.deepcopy(processor if processor is not None else tiny.tokenizer())
    return DecisionPipeline(
        model=model,
        tokenizer=getattr(own, "tokenizer", own),
        processor=own if processor is not None else None,
        decision_config=config,
    )


def check(answer: tiny.Answer, wanted: dict[str, Any]) -> None:
    assert answer.ended is not None, answer.failed
    got = (answer.ended.result or {})["answers"]
    assert got.keys() == wanted.keys()
    for name, right in wanted.items():
        assert got[name].keys() == right.keys()
        for field, value in right.items():
            if isinstance(value, float):
                assert got[name][field] == pytest.approx(value, abs=1e-5), (name, field)
            elif field == "probabilities":
                assert got[name][field] == pytest.approx(value, abs=1e-5), name
            elif field != "choice":
                assert got[name][field] == value
        if "choice" in right:
            # Which of two that are equally likely is the first may differ.
            shares = right["probabilities"]
            assert shares[got[name]["choice"]] == pytest.approx(max(shares.values()), abs=1e-5)


def jev(backbone: Any, **own: Any) -> JevForDecision:
    """A decision model over the backbone's configuration, with random weights."""
    torch.manual_seed(1)
    width = backbone.get_text_config().hidden_size
    config = JevConfig(text_config=backbone, hidden_size=width, **own)
    model = JevForDecision(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.1:
                parameter.normal_(0.0, 0.15)
    return model
