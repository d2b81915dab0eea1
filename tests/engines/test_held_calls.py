# ruff: noqa: E501  # templates and answers stand as models have them
"""Forced and strict calls are held to the form of the model's family: what the grammar lets a model
write is what its own parser reads, wherever the text is cut, and fits the tools' schemas."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import pytest
from jinja2 import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from broker.protocol.messages import Constraint, Params
from tests.engines.test_call_families import cuts, pieces_of, read
from tests.engines.tiny_tokenizers import byte_level
from worker.engines.common.answer_parser import unsplit
from worker.engines.common.call_families import CallFormat
from worker.engines.common.call_forms import (
    Form,
    probe_schemas,
    reads_back,
    shown_form,
    table_forms,
    usual_forms,
)
from worker.engines.common.call_grammar import MAX_CALLS, Unsayable, Vocabulary, awaited, forced
from worker.engines.common.constrain import ConstraintFactory, ConstraintState
from worker.engines.common.pieces import PieceText
from worker.engines.common.reasoning import added_tokens

jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="install tokenbus[tools]")
torch = pytest.importorskip("torch")
pytest.importorskip("llguidance", reason="install tokenbus[structured]")

PLACE = {
    "type": "object",
    "properties": {"x": {"type": "number"}, "s": {"type": "string", "maxLength": 5}},
    "required": ["x"],
    "additionalProperties": False,
}
TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "minLength": 2, "maxLength": 9},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F"]},
            "note": {"type": ["string", "null"]},
            "exact": {"type": "boolean"},
            "where": {"$ref": "#/$defs/Place"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 3},
            "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        },
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {"Place": PLACE},
    },
    "now": {},
    "get": {
        "type": "object",
        "properties": {"code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$"}},
        "required": ["code"],
        "additionalProperties": False,
    },
}
WEATHER = (
    "get_weather",
    {
        "city": "Graz {é}",
        "days": 2,
        "unit": "C",
        "exact": True,
        "where": {"x": 1.5, "s": "a"},
        "tags": ["a", "b"],
        "either": "so so",
    },
)
CALLS: list[tuple[str, dict[str, Any]]] = [WEATHER, ("now", {}), ("get", {"code": "AB/1"})]
ALL = list(usual_forms())
#: gpt-oss has tests of its own: its calls are messages.
CASES = [case for case in ALL if case[0] != "<|channel|>"]
IDS = [f"{mark} {hint}".strip() for mark, hint, _ in CASES]
CHANNEL = "<|channel|>"
END = "<|end|>"


@cache
def tokenizer(special: tuple[str, ...], added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    plain = byte_level()
    made = PreTrainedTokenizerFast(
        tokenizer_object=type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str()),
        eos_token=plain.eos_token,
    )
    tokens = [AddedToken(text, special=True) for text in special]
    made.add_special_tokens({"additional_special_tokens": tokens})
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    return made


class Model:
    """How a model of a family is held. `special`: whether its marks are special tokens."""

    def __init__(self, mark: str, hint: str, form: Form, *, special: bool) -> None:
        self.form = form
        written = form.written([("get", {"code": "AB/1"}), ("now", {})][: 2 if form.between else 1])
        known = [text for text in MARKS if text in written]
        self.tokenizer = tokenizer(tuple(known)) if special else tokenizer((), tuple(known))
        self.added = added_tokens(self.tokenizer)
        shows = {"[": "func_name1(params_name1", "{": "", ">>>": ">>>all"}
        self.calls = CallFormat(shows.get(mark, mark + hint), self.added)
        self.end = self.tokenizer.convert_tokens_to_ids(END)
        self.vocabulary = Vocabulary(self.added, frozenset({self.end}))
        self.tail = "<|start|>assistant" if mark == CHANNEL else ""
        self._factory = ConstraintFactory(self.tokenizer)

    def forced(self, tools: Any = TOOLS, *, single: bool = False) -> ConstraintState:
        lark = forced(self.form, tools, self.vocabulary, single=single, tail=self.tail)
        return self._built(lark)

    def awaited(self, mark: str, tools: Any = TOOLS, strict: Any = tuple(TOOLS)) -> ConstraintState:
        return self._built(
            awaited({mark: (self.form,)}, tools, strict, self.vocabulary, tail=self.tail)
        )

    def _built(self, lark: str) -> ConstraintState:
        return self._factory.build(Constraint(type="grammar", value=lark), {self.end})

    def takes(self, state: ConstraintState, text: str) -> bool:
        """Whether a whole answer may be this text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        ids = ids[:-1] if ids and ids[-1] == self.end else ids
        return state.allows(ids) and _after(state, ids).accepting

    def read(self, feeds: list[str]) -> tuple[str, list[tuple[str, Any]]]:
        calls = self.calls.parser(TOOLS, forced=not self.calls.known)
        text, found = read(pieces_of(PieceText(unsplit(), Params(), calls=calls), feeds))
        return text, [(name, json.loads(arguments)) for name, arguments in found]


MARKS = sorted(CallFormat.all_marks(), key=len)


def _after(state: ConstraintState, ids: list[int]) -> ConstraintState:
    state.replay(ids)
    return state


def calls_of(form: Form) -> list[tuple[str, dict[str, Any]]]:
    return CALLS if form.between is not None else CALLS[:1]


@pytest.mark.parametrize(("mark", "hint", "form"), CASES, ids=IDS)
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
def test_a_forced_call_is_written_in_the_family_s_form_and_read_back_at_every_cut(
    mark: str, hint: str, form: Form, special: bool
) -> None:
    model = Model(mark, hint, form, special=special)
    calls = calls_of(form)
    text = form.written(calls)
    assert model.takes(model.forced(), text)
    for feeds in ([text], list(text)):
        assert model.read(feeds) == ("", calls)
    some = calls_of(form)[1:] or [("get", {"code": "AB/1"})]
    for feeds in cuts(form.written(some)) if special else ():
        assert model.read(feeds) == ("", some)
    for wrong in (
        form.written([("get", {"code": "ab/1"})]),
        form.written([("got", {})]),
        form.written([("get", {})]),
        f"Well. {text}",
        "Well.",
        text + "more",
    ):
        assert not model.takes(model.forced(), wrong), wrong
    one, two = form.written(calls[:1]), form.written(calls[:2])
    assert model.takes(model.forced(single=True), one)
    if form.between is not None:
        assert not model.takes(model.forced(single=True), two)
        assert not model.takes(model.forced(), form.written([("now", {})] * (MAX_CALLS + 1)))


@pytest.mark.parametrize(("mark", "hint", "form"), CASES, ids=IDS)
@pytest.mark.parametrize("special", [True, False], ids=["tokens", "text"])
def test_a_strict_call_is_held_from_its_mark_on_and_text_is_free(
    mark: str, hint: str, form: Form, special: bool
) -> None:
    model = Model(mark, hint, form, special=special)
    calls = calls_of(form)
    text = form.written(calls)
    before = "" if mark in ("{", "[") else "Let me see.\n"
    if mark == ">>>":
        before = ">>>all\nLet me see."
    assert model.takes(model.awaited(mark), before + text)
    assert model.takes(model.awaited(mark), "Let me see." if mark != ">>>" else before)
    for wrong in (
        form.written([("get", {"code": "ab/1"})]),
        form.written([("got", {})]),
        form.written([("get", {})]),
    ):
        assert not model.takes(model.awaited(mark), before + wrong), wrong
    loose = form.written([("get", {"code": "ab/1"})])
    assert model.takes(model.awaited(mark, strict=("now",)), before + loose)
    for feeds in ([before + text], list(before + text)):
        assert model.read(feeds) == ("Let me see." if before else "", calls)


@pytest.mark.parametrize(("mark", "hint", "form"), CASES, ids=IDS)
def test_whatever_a_model_writes_under_the_grammar_is_read_and_fits_the_schemas(
    mark: str, hint: str, form: Form
) -> None:
    model = Model(mark, hint, form, special=True)
    finished = 0
    for seed in range(4):
        state, draw = model.forced(), random.Random(seed)
        ids: list[int] = []
        while len(ids) < 300 and not state.finished:
            token_id = drawn(model, state, draw)
            state.accept(token_id)
            if token_id == model.end:
                break
            ids.append(token_id)
        if not state.accepting:
            continue
        text, calls = model.read([model.tokenizer.decode(ids)])
        assert not text.strip() and calls, model.tokenizer.decode(ids)
        for name, arguments in calls:
            jsonschema_rs.validate(TOOLS[name] or {"maxProperties": 0}, arguments)
        finished += 1
    assert finished


def drawn(model: Model, state: ConstraintState, draw: random.Random) -> int:
    """A token that the grammar allows; those that end something more often."""
    logits = torch.zeros(len(model.tokenizer))
    state.mask_logits_(logits)
    allowed = [int(i) for i in (logits == 0).nonzero()]
    if model.end in allowed:
        return model.end
    texts = {i: model.tokenizer.decode([i]) for i in allowed}
    ending = [i for i in allowed if set(texts[i]) & set('"}])<\n|,:')]
    return draw.choice(ending if ending and draw.random() < 0.6 else allowed)


# --- gpt-oss --------------------------------------------------------------------------------------


def test_a_forced_call_of_gpt_oss_may_think_first_and_then_must_call() -> None:
    mark, hint, form = next(case for case in ALL if case[0] == CHANNEL)
    model = Model(mark, hint, form, special=True)
    model.tokenizer = tokenizer(
        ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "<|over|>")
    )
    # `<|end|>` is the end of an answer of the tokenizers here: it has another name.
    model.added = {
        ("<|end|>" if text == "<|over|>" else text): value
        for text, value in added_tokens(model.tokenizer).items()
        if text != "<|end|>"
    }
    call_id = model.added["<|call|>"][0]
    model.end = call_id
    model.vocabulary = Vocabulary(model.added, frozenset({call_id}))
    model._factory = ConstraintFactory(model.tokenizer)
    call = form.written([("get", {"code": "AB/1"})])
    thought = "<|channel|>analysis<|message|>Hm.<|over|><|start|>assistant"
    said = "<|channel|>commentary<|message|>Let me see.<|over|><|start|>assistant"
    final = "<|channel|>final<|message|>No."
    assert model.takes(model.forced(), call) and model.takes(model.forced(), thought + call)
    assert not model.takes(model.forced(), thought + final)
    assert not model.takes(model.forced(), form.written([("get", {"code": "1"})]))
    for text in (call, thought + call, thought + said + call, thought + final, final):
        assert model.takes(model.awaited(mark), text), text
    assert not model.takes(model.awaited(mark), thought + form.written([("get", {"code": "1"})]))
    assert not model.takes(model.awaited(mark), form.written([("got", {})]))


# --- what cannot be said --------------------------------------------------------------------------

XML = next(form for mark, hint, form in CASES if (mark, hint) == ("<tool_call>", "<function="))
JSON = next(form for mark, hint, form in CASES if (mark, hint) == ("<tool_call>", ""))


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {"type": "string"}}, "`not` cannot be enforced"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "`allOf` cannot be enforced"),
        ({"type": "string", "pattern": r"\bx"}, "pattern"),
        ({"type": "array", "items": {"$ref": "#/properties/b"}}, "outside its definitions"),
        (False, "nothing is allowed"),
    ],
)
def test_a_schema_that_bare_text_cannot_say_is_told_by_its_argument(schema: Any, why: str) -> None:
    tools = {"f": {"type": "object", "properties": {"a": schema, "b": {"type": "integer"}}}}
    with pytest.raises(Unsayable, match=f"tool 'f': argument 'a': .*{why}"):
        forced(XML, tools, Vocabulary({}, frozenset({0})), single=True, tail="")


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"type": "string"}, "null", None),
        ({"type": ["string", "null"], "minLength": 5}, "nulls", "null"),
        ({"type": ["integer", "string"], "maxLength": 3}, "abc", "abcd"),
        ({"enum": ["1", "x", True]}, "x", "1"),
        ({"type": "string", "enum": ["1", "x"]}, "1", "y"),
        (
            {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
            "a",
            '["a"]',
        ),
        ({"type": "string", "pattern": "b+"}, "abc", "ac"),
        ({"type": "string", "pattern": r"^\d{2}/"}, "12/x", "1/x"),
    ],
)
def test_a_bare_text_is_what_its_schema_allows_once_it_is_typed(
    schema: Any, right: str, wrong: str | None
) -> None:
    tools = {"f": {"type": "object", "properties": {"a": schema}}}
    model = Model("<tool_call>", "<function=", XML, special=True)
    assert model.takes(model.forced(tools), XML.written([("f", {"a": right})]))
    if wrong is not None:
        assert not model.takes(model.forced(tools), XML.written([("f", {"a": wrong})]))


# --- what a chat template shows -------------------------------------------------------------------

_CALLING = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ m.content or '' }}{%- for c in m.tool_calls or [] %}@call@{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
SHOWN: dict[str, tuple[str, str]] = {
    "hermes, compact": (
        "{{ '<tool_call>{\"name\":\"' + c.function.name + '\",\"arguments\":' + (c.function.arguments | tojson) + '}</tool_call>' }}",
        '<tool_call>{"name":"now","arguments":{}}</tool_call><tool_call>{"name":"now","arguments":{}}</tool_call>',
    ),
    "llama 3.1": (
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one') }}{% endif %}{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' + (c.function.arguments | tojson) + '}' }}{# <|python_tag|> #}",
        '{"name": "now", "parameters": {}}',
    ),
    "glm-4.7, without breaks": (
        "{{ '<tool_call>' + c.function.name }}{% for k, v in c.function.arguments.items() %}{{ '<arg_key>' + k + '</arg_key><arg_value>' + (v if v is string else v | tojson) + '</arg_value>' }}{% endfor %}{{ '</tool_call>' }}",
        "<tool_call>now</tool_call><tool_call>now</tool_call>",
    ),
    "qwen3-coder": (
        "{{ '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}{% for k, v in c.function.arguments.items() %}{{ '<parameter=' + k + '>\\n' + (v if v is string else v | tojson) + '\\n</parameter>\\n' }}{% endfor %}{{ '</function>\\n</tool_call>' }}",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    "mistral": (
        "{% if loop.first %}[TOOL_CALLS]{% endif %}{{ c.function.name + '[CALL_ID]' + c.id + '[ARGS]' + (c.function.arguments | tojson) }}",
        "[TOOL_CALLS]now[CALL_ID]a1b2c3d4e[ARGS]{}",
    ),
    "lfm2": (
        "{{ '<|tool_call_start|>[' + c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}){{ ']<|tool_call_end|>' }}",
        "<|tool_call_start|>[now()]<|tool_call_end|><|tool_call_start|>[now()]<|tool_call_end|>",
    ),
    "cohere": (
        '{% if loop.first %}<|START_ACTION|>[{% endif %}{{ \'{"tool_call_id": "\' ~ loop.index0 ~ \'", "tool_name": "\' + c.function.name + \'", "parameters": \' + (c.function.arguments | tojson) + \'}\' }}{% if loop.last %}]<|END_ACTION|>{% else %}, {% endif %}',
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "now", "parameters": {}}, {"tool_call_id": "1", "tool_name": "now", "parameters": {}}]<|END_ACTION|>',
    ),
}


@pytest.mark.parametrize("case", SHOWN)
def test_a_chat_template_shows_the_form_before_the_family_does(case: str) -> None:
    call, written = SHOWN[case]
    template = _CALLING.replace("@call@", call)
    made = tokenizer(("<|im_start|>", "<|im_end|>"))
    calls = CallFormat(template, {})

    def probed(turns: list[dict[str, Any]]) -> str | None:
        try:
            return str(made.apply_chat_template(turns, chat_template=template, tokenize=False))
        except TemplateError:
            return None

    form = shown_form(probed, calls.marks, ["<|im_end|>"])
    assert form is not None
    count = 2 if form.between is not None and case != "mistral" else 1
    assert form.written([("now", {})] * count) == written

    def found(text: str) -> list[tuple[str, str]]:
        parser = calls.parser(probe_schemas(), forced=not calls.known)
        return read(pieces_of(PieceText(unsplit(), Params(), calls=parser), list(text)))[1]

    assert reads_back(form, found)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'no turns at all' }}",
        _CALLING.replace("@call@", ""),
        _CALLING.replace("@call@", "{{ c }}"),
    ],
)
def test_a_template_that_writes_no_calls_shows_no_form(template: str) -> None:
    made = tokenizer(("<|im_start|>", "<|im_end|>"))

    def probed(turns: list[dict[str, Any]]) -> str | None:
        try:
            return str(made.apply_chat_template(turns, chat_template=template, tokenize=False))
        except TemplateError:
            return None

    form = shown_form(probed, (), ["<|im_end|>"])
    assert form is None or not reads_back(form, lambda text: [])


def test_the_first_form_of_which_a_model_shows_something_is_its_family_s() -> None:
    assert table_forms("<tool_call>", lambda text: text == "<arg_key>")[0].style == "text"
    assert table_forms("<tool_call>", lambda text: False) == (JSON,)
    assert table_forms("<unheard>", lambda text: True) == ()
