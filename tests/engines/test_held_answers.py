# templates stand as models have them
"""Held calls through the engine, with random weights: what is sampled are calls that fit their
schemas, and an answer cut anywhere goes on as it would have."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from broker.protocol.errors import ErrorInfo
from broker.protocol.messages import Kind, Message, Params, Piece, Request, Resume, new_id
from client.core.forced import forced_calls
from client.core.tools import tool_from
from tests.engines import tiny
from tests.engines.test_call_families import read
from tests.engines.test_held_calls import _CALLING, SHOWN, tokenizer
from tests.engines.tiny_tokenizers import byte_level
from worker.engines.base import Ended, Failed, Job, Tokens
from worker.engines.common.answer_parser import merged

pytest.importorskip("llguidance", reason="install tokenbus[structured]")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="install tokenbus[tools]")

SCHEMA = {
    "type": "object",
    "properties": {
        "code": {"type": "string", "pattern": "^[A-Z]{2}$"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["code", "unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get", "parameters": SCHEMA, "strict": True}},
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    },
]
LONGEST = 100
MODELS = {
    "qwen3-coder": ("<tool_call>", "</tool_call>"),
    "hermes, compact": ("<tool_call>", "</tool_call>"),
    "unknown": (),
}


def served(model: str) -> Any:
    made = tokenizer(("<|im_start|>", "<|im_end|>", *MODELS[model]))
    call = SHOWN[model][0] if model in SHOWN else ""
    made.chat_template = _CALLING.replace("@call@", call)
    return tiny.serve(tiny.llama(vocabulary=len(made)), own_tokenizer=made, name="m")


def asked(seed: int, *, choice: Any = "required", tools: Any = None, **more: Any) -> Request:
    tools = tools or TOOLS
    constraint = None
    if choice == "required":
        constraint = forced_calls([t for _, t in map(tool_from, tools) if t], single=False)
    params = Params(
        max_tokens=LONGEST,
        temperature=1.0,
        seed=seed,
        pieces=["reasoning", "call"],
        constraint=constraint,
    )
    return Request(
        model="m",
        kind=Kind.CHAT,
        messages=[Message(role="user", content="Weather?")],
        tools=tools,
        tool_choice=choice,
        params=params,
        window=1 << 20,
        **more,
    )


def told(
    engine: Any, request: Request, until: int = 0
) -> tuple[list[Piece], list[int], ErrorInfo | None]:
    """Pieces and tokens of an answer, or of its beginning; the error."""
    job = Job(new_id(), request)
    engine.add(job)
    pieces: list[Piece] = []
    ids: list[int] = []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Failed):
                return pieces, ids, event.error
            assert isinstance(event, Tokens | Ended)
            if until and len(ids) >= until:
                continue
            pieces += event.pieces or ([Piece("content", event.text)] if event.text else [])
            ids += event.token_ids if isinstance(event, Tokens) else []
        if until and len(ids) >= until:
            engine.cancel(job.request_id)
    return pieces, ids, None


@pytest.mark.parametrize("model", MODELS)
def test_a_forced_answer_is_calls_that_fit_and_goes_on_after_every_interruption(model: str) -> None:
    engine = served(model)
    try:
        ended = 0
        for seed in range(2):
            whole, ids, error = told(engine, asked(seed))
            assert error is None
            text, calls = read(merged(whole))
            assert not text and calls
            if len(ids) < LONGEST:
                ended += 1
                for name, arguments in calls:
                    schema = SCHEMA if name == "get" else {"maxProperties": 0}
                    jsonschema_rs.validate(schema, json.loads(arguments))
            # In the mark, in the name, in the arguments.
            for at in range(1, len(ids), max(1, len(ids) // 3)) if seed == 0 else ():
                begun, prior, _ = told(engine, asked(seed), at)
                assert prior == ids[: len(prior)]
                characters = sum(len(piece.text) for piece in begun)
                resume = Resume(epoch=1, token_ids=prior, text_characters=characters)
                rest, more, error = told(engine, asked(seed, resume=resume))
                assert error is None and prior + more == ids
                assert merged([*begun, *rest]) == merged(whole), at
        # A list of calls in JSON seldom ends so soon.
        assert ended or model == "unknown"
    finally:
        engine.close()


def gpt_oss() -> Any:
    """A model of channels, in which `<|end|>` ends a message and no answer."""
    plain = byte_level()
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str()),
        eos_token="<|call|>",
    )
    marks = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>")
    tokens = [AddedToken(text, special=True) for text in marks]
    made.add_special_tokens({"additional_special_tokens": tokens})
    made.chat_template = (
        "{%- for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}<|start|>assistant{%- endif %}"
    )
    return tiny.serve(tiny.llama(vocabulary=len(made)), own_tokenizer=made, name="m")


def test_a_forced_call_of_channels_follows_a_thought_that_its_budget_ends() -> None:
    engine = gpt_oss()
    thinking = 0
    try:
        for seed in range(6):
            request = asked(seed)
            params = msgspec.structs.replace(request.params, thinking_tokens=5)
            request = msgspec.structs.replace(request, params=params, parallel_tool_calls=False)
            whole, ids, error = told(engine, request)
            assert error is None
            thinking += whole[0].kind == "reasoning"
            pieces = [piece for piece in whole if piece.kind != "reasoning"]
            text, calls = read(merged(pieces))
            assert not text and len(calls) == 1
            if len(ids) < LONGEST:
                schema = SCHEMA if calls[0][0] == "get" else {"maxProperties": 0}
                jsonschema_rs.validate(schema, json.loads(calls[0][1]))
            for at in (2, len(ids) // 2):
                begun, prior, _ = told(engine, request, at)
                characters = sum(len(piece.text) for piece in begun)
                resume = Resume(epoch=1, token_ids=prior, text_characters=characters)
                rest, more, error = told(engine, msgspec.structs.replace(request, resume=resume))
                assert error is None and prior + more == ids
                assert merged([*begun, *rest]) == merged(whole), at
        assert thinking > 0
    finally:
        engine.close()


def test_a_forced_call_that_began_as_json_elsewhere_goes_on_as_json() -> None:
    engine = served("qwen3-coder")
    try:
        made = tokenizer(("<|im_start|>", "<|im_end|>", *MODELS["qwen3-coder"]))
        prior = made.encode('[{"name":"get","arguments":{"code":"', add_special_tokens=False)
        resume = Resume(epoch=1, token_ids=prior, text_characters=3)
        pieces, _, error = told(engine, asked(1, resume=resume))
        assert error is None
        _, [(_, arguments), *_] = read([Piece("call", "get"), *pieces])
        assert arguments.startswith('{"code":"')
    finally:
        engine.close()


def test_a_strict_schema_that_a_family_cannot_say_is_refused_with_its_argument() -> None:
    engine = served("qwen3-coder")
    parameters = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    function = {"name": "f", "parameters": parameters, "strict": True}
    tools = [{"type": "function", "function": function}]
    try:
        _, _, error = told(engine, asked(1, choice="auto", tools=tools))
        assert error is not None and error.details == {"parameter": "tools"}
        assert "tool 'f': argument 'a': `not` cannot be enforced" in error.message
    finally:
        engine.close()


def test_strict_is_no_word_of_the_prompt() -> None:
    engine = served("unknown")
    loose = [{**tool, "function": dict(tool["function"])} for tool in TOOLS]
    for tool in loose:
        tool["function"].pop("strict", None)
    try:
        texts = []
        for tools in (TOOLS, loose):
            made = tokenizer(("<|im_start|>", "<|im_end|>"))
            made.chat_template = "{{ tools | tojson }}"
            request = asked(1, choice="auto", tools=tools)
            request = Request(
                model="m", kind=Kind.TEMPLATE, messages=request.messages, tools=tools, window=1
            )
            job = Job(new_id(), request)
            engine.add(job)
            while engine.busy:
                texts += [
                    e.result["text"] for e in engine.step() if isinstance(e, Ended) and e.result
                ]
        assert texts[0] == texts[1] and "get" in texts[0] and "strict" not in texts[0]
    finally:
        engine.close()
