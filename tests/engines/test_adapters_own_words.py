"""Adapters that bring words of their own: embeddings, tokenizers and templates."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from broker.protocol.messages import Kind, Message, Params, Request, new_id
from tests.engines import tiny
from tests.engines.tiny import load
from tests.engines.tuned_models import (
    IN_BATCH,
    MERGED,
    answers,
    beside,
    generated,
    how,
    images_and_question,
    save,
    tied_llama,
    tuned,
)
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.engine import TransformersEngine

# peft uses names that transformers is about to change.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


# --- embeddings -----------------------------------------------------------------------------------


def embedded(engine: TransformersEngine, name: str, inputs: list[list[int]]) -> Any:
    request = Request(model=name, kind=Kind.EMBED, inputs=inputs, window=1)
    ended = tiny.run(engine, [Job(new_id(), request)])[0].ended
    assert ended is not None and ended.result is not None
    width = ended.result["dimensions"]
    return np.array([struct.unpack(f"<{width}f", row) for row in ended.result["embeddings"]])


@torch.inference_mode()
def states(model: Any, inputs: list[list[int]]) -> Any:
    """The normalised mean of the last hidden states."""
    rows = [
        model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].mean(0)
        for ids in inputs
    ]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).numpy()


def test_base_and_adapters_each_give_their_own_embeddings(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    models = {
        "base": tiny.llama(),
        "a": tuned(tmp_path / "a", tiny.llama()),
        "b": tuned(tmp_path / "b", tiny.llama(), seed=2),
        "dora": tuned(tmp_path / "dora", tiny.llama(), seed=3, use_dora=True),
    }
    inputs = tiny.prompts(5, low=3, high=40)
    engine = beside(base, **{name: tmp_path / name for name in ("a", "b", "dora")})
    try:
        # In an order that would reveal a leftover choice of adapter.
        for name in ("base", "a", "base", "b", "dora", "a"):
            got = embedded(engine, name, inputs)
            assert np.allclose(got, states(models[name], inputs), atol=1e-5), name
    finally:
        engine.close()


def test_embeddings_beside_streams_keep_to_their_own_adapters(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    models = {
        "base": tiny.llama(),
        "a": tuned(tmp_path / "a", tiny.llama()),
        "b": tuned(tmp_path / "b", tiny.llama(), seed=2),
    }
    ids, inputs = tiny.prompts(1, low=10)[0], tiny.prompts(60, low=90, high=120)
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    try:
        jobs = [tiny.ids_job(ids, model=name, max_tokens=30) for name in models]
        request = Request(model="b", kind=Kind.EMBED, inputs=inputs, window=1)
        ran = tiny.run(engine, [*jobs, Job(new_id(), request)])
        for answer, model in zip(ran, models.values(), strict=False):
            assert answer.token_ids == generated(model, ids, 30)
        ended = ran[-1].ended
        assert ended is not None and ended.result is not None
        got = np.array([np.frombuffer(row, "<f4") for row in ended.result["embeddings"]])
        assert np.allclose(got, states(models["b"], inputs), atol=1e-5)
    finally:
        engine.close()


# --- tokenizers and templates ---------------------------------------------------------------------

OWN_TEMPLATE = (
    "{% for m in messages %}<|user|>please: {{ m['content'] }}<|end|>{% endfor %}<|assistant|>"
)


def own_tokenizer(*added: str) -> Any:
    """The base's tokenizer with another template, and perhaps tokens beyond all its rows."""
    result = copy.deepcopy(tiny.tokenizer())
    result.chat_template = OWN_TEMPLATE
    if added:
        fillers = [f"<filler-{number}>" for number in range(len(result), tiny.VOCABULARY)]
        result.add_tokens([*fillers, *added])
    return result


def template_text(engine: TransformersEngine, name: str) -> str:
    messages = [Message(role="user", content="hello")]
    request = Request(model=name, kind=Kind.TEMPLATE, messages=messages, window=1)
    ended = tiny.run(engine, [Job(new_id(), request)])[0].ended
    assert ended is not None and ended.result is not None
    return str(ended.result["text"])


def chat(engine: TransformersEngine, name: str) -> list[int]:
    request = Request(
        model=name,
        messages=[Message(role="user", content="hello <new> world")],
        params=Params(temperature=0.0, max_tokens=12, ignore_eos=True),
        window=1 << 30,
    )
    answer = tiny.run(engine, [Job(new_id(), request)])[0]
    assert answer.failed is None, answer.failed
    return answer.token_ids


OWN_TEXT = "<|user|>please: hello<|end|><|assistant|>"


@pytest.mark.parametrize("saved", ["tokenizer", "template"])
def test_an_adapter_uses_its_own_template(saved: str, tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    if saved == "tokenizer":
        own_tokenizer().save_pretrained(tmp_path / "a")
    else:
        (tmp_path / "a" / "chat_template.jinja").write_text(OWN_TEMPLATE)
    tuned(tmp_path / "b", tiny.llama(), seed=2)
    ids = tiny.tokenizer()("<|user|>please: hello <new> world<|end|><|assistant|>")["input_ids"]
    wanted = generated(with_it, ids)
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    alone = load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    try:
        assert how(engine, "a") == IN_BATCH
        assert template_text(engine, "a") == template_text(alone, "a") == OWN_TEXT
        for name in ("base", "b"):
            assert "please" not in template_text(engine, name)
        assert chat(engine, "a") == chat(alone, "a") == wanted
    finally:
        engine.close()
        alone.close()


@pytest.mark.parametrize(
    "kept", ["modules_to_save", "embedding layers", "trained tokens", "tied embedding layers"]
)
def test_tokens_that_an_adapter_added_are_its_own(kept: str, tmp_path: Path) -> None:
    make = tied_llama if "tied" in kept else tiny.llama
    base = save(tmp_path / "base", make())
    wider = make()
    torch.manual_seed(5)
    wider.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False)
    with torch.no_grad():
        wider.model.embed_tokens.weight[-1].normal_(0.0, 0.5)
        if "tied" not in kept:
            wider.lm_head.weight[-1].normal_(0.0, 0.5)
    more: dict[str, Any] = {
        "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "embedding layers": {},
        "tied embedding layers": {},
        "trained tokens": {"trainable_token_indices": [tiny.VOCABULARY]},
    }[kept]
    with_it = tuned(tmp_path / "a", wider, **more)
    with_it.save_pretrained(tmp_path / "a", save_embedding_layers=kept != "modules_to_save")
    tokenizer = own_tokenizer("<new>")
    tokenizer.save_pretrained(tmp_path / "a")
    ids = tokenizer("<|user|>please: hello <new> world<|end|><|assistant|>")["input_ids"]
    assert tiny.VOCABULARY in ids
    wanted = generated(with_it, ids)
    engine = beside(base, a=tmp_path / "a")
    alone = load(tmp_path / "a", model_base=str(base), model_names=(("a",),))
    try:
        assert how(engine, "a") == MERGED
        assert chat(engine, "a") == chat(alone, "a") == wanted
        plain = generated(make(), [20, 21, 22])
        assert answers(engine, [20, 21, 22], "base")["base"] == plain
    finally:
        engine.close()
        alone.close()


def test_added_tokens_without_embeddings_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    tuned(tmp_path / "a", tiny.llama())
    own_tokenizer("<new>").save_pretrained(tmp_path / "a")
    for refused in (
        lambda: beside(base, a=tmp_path / "a"),
        lambda: load(tmp_path / "a", model_base=str(base)),
    ):
        with pytest.raises(EngineLoadError, match="<new>"):
            refused()


def test_new_rows_that_the_file_does_not_hold_are_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    wider = tiny.llama()
    wider.resize_token_embeddings(tiny.VOCABULARY + 1, mean_resizing=False)
    tuned(tmp_path / "a", wider, modules_to_save=["embed_tokens"])
    own_tokenizer("<new>").save_pretrained(tmp_path / "a")
    with pytest.raises(EngineLoadError, match="output head"):
        beside(base, a=tmp_path / "a")


def test_an_adapter_with_another_vocabulary_of_the_same_size_keeps_it(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llama())
    with_it = tuned(tmp_path / "a", tiny.llama())
    facts = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    ids_of = facts["model"]["vocab"]
    ids_of["l"], ids_of["o"] = ids_of["o"], ids_of["l"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(facts)), eos_token="<|end|>"
    )
    other.chat_template = OWN_TEMPLATE
    other.save_pretrained(tmp_path / "a")
    ids = other("<|user|>please: hello <new> world<|end|><|assistant|>")["input_ids"]
    engine = beside(base, a=tmp_path / "a")
    try:
        assert how(engine, "a") == MERGED
        assert chat(engine, "a") == generated(with_it, ids)
    finally:
        engine.close()


def test_the_template_of_a_vision_language_adapter_is_its_own(tmp_path: Path) -> None:
    base = save(tmp_path / "base", tiny.llava(), tiny.llava_processor())
    tuned(tmp_path / "a", tiny.llava(), target_modules=r".*language_model.*(q|v)_proj")
    template = tiny.CHAT_TEMPLATE.replace("'<|assistant|>'", "'<|assistant|>well'")
    own = copy.deepcopy(tiny.tokenizer())
    own.chat_template = template
    own.save_pretrained(tmp_path / "a")
    tuned(tmp_path / "b", tiny.llava(), target_modules=r".*language_model.*(q|v)_proj")
    processor = tiny.llava_processor()
    processor.chat_template = template
    processor.save_pretrained(tmp_path / "b")
    engine = beside(base, a=tmp_path / "a", b=tmp_path / "b")
    try:
        assert how(engine, "a") == how(engine, "b") == IN_BATCH
        for name in ("a", "b"):
            assert template_text(engine, name).endswith("<|assistant|>well")
        assert template_text(engine, "base").endswith("<|assistant|>")
        wanted = images_and_question(engine, "a", 1)
        assert images_and_question(engine, "b", 1) == wanted
        assert images_and_question(engine, "base", 1) != wanted
    finally:
        engine.close()
