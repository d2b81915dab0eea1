# ruff: noqa: E501  # answers stand as models write them
"""Calls as today's families write them: the same pieces wherever the text is cut, typed by the
tool's schema. For the families that transformers has a template of (`transformers serve` brings
those of Qwen and Gemma) its parser is the reference; for the others it is what their model cards
and vLLM's parsers show, written down here."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from broker.protocol.messages import Params, Piece
from worker.engines.common.answer_parser import AnswerParser, ChannelSplitter, merged, unsplit
from worker.engines.common.call_families import CallFormat
from worker.engines.common.pieces import PieceText
from worker.engines.common.reasoning import Begun
from worker.engines.common.response_template import TemplateFormat

TOOLS: dict[str, Any] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "where": {"$ref": "#/$defs/Place"},
            "note": {"type": ["string", "null"]},
            "exact": {"type": "boolean"},
        },
        "$defs": {"Place": {"type": "object"}},
    },
    "now": {},
}
WEATHER = {"city": "Graz {é}", "days": 2}
TEXT = json.dumps(WEATHER, ensure_ascii=False)
NOW: tuple[str, dict[str, Any]] = ("now", {})
CALL = ("get_weather", WEATHER)

Call = tuple[str, dict[str, Any]]

XML = "<function=get_weather>\n<parameter=city>\nGraz {é}\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>"
GLM = "get_weather\n<arg_key>city</arg_key>\n<arg_value>Graz {é}</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n"
INVOKE = '<invoke name="get_weather">\n<parameter name="city">Graz {é}</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n'
DSML = '<｜DSML｜invoke name="get_weather">\n<｜DSML｜parameter name="city" string="true">Graz {é}</｜DSML｜parameter>\n<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
OBJECT = f'{{"name": "get_weather", "arguments": {TEXT}}}'
OTHER = '{"name": "now", "arguments": {}}'
PYTHON = 'get_weather(city="Graz {é}", days=2)'

#: What its template shows, an answer, and what is said and called in it.
CASES: dict[str, tuple[str, str, str, list[Call]]] = {
    "qwen3, hermes": (
        "<tool_call>",
        f"Let me see.\n<tool_call>\n{OBJECT}\n</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>",
        "Let me see.",
        [CALL, NOW],
    ),
    "qwen3-coder": (
        "<tool_call>\n<function=",
        f"Sure.\n\n<tool_call>\n{XML}\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        "Sure.",
        [CALL, NOW],
    ),
    "qwen3-coder without the mark": ("<tool_call><function=", XML, "", [CALL]),
    "llama 3.1, its own functions": (
        "<function=",
        f"<function=get_weather>{TEXT}</function>",
        "",
        [CALL],
    ),
    "glm-4.5": (
        "<tool_call>",
        f"Hm.<tool_call>{GLM}</tool_call>\n<tool_call>now\n</tool_call>",
        "Hm.",
        [CALL, NOW],
    ),
    "glm-4.7": ("<tool_call>", f"<tool_call>{GLM.replace(chr(10), '')}</tool_call>", "", [CALL]),
    "deepseek-v3": (
        "<｜tool▁calls▁begin｜>",
        "Ok<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        f"{TEXT}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n"
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "Ok",
        [CALL, NOW],
    ),
    "deepseek-v3.1": (
        "<｜tool▁calls▁begin｜>",
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{TEXT}"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "",
        [CALL],
    ),
    "deepseek-v3.2": (
        "<｜DSML｜function_calls>",
        f"So:\n\n<｜DSML｜function_calls>\n{DSML}</｜DSML｜function_calls>",
        "So:",
        [CALL],
    ),
    "deepseek-v4": (
        "<｜DSML｜tool_calls>",
        f"So:\n\n<｜DSML｜tool_calls>\n{DSML}</｜DSML｜tool_calls>",
        "So:",
        [CALL],
    ),
    "deepseek-v4.1": (
        "<｜DSML｜ calls>",
        f"<｜DSML｜ calls>\n{DSML.replace('｜DSML｜', '｜DSML｜ ')}</｜DSML｜ calls>",
        "",
        [CALL],
    ),
    "kimi-k2": (
        "<|tool_calls_section_begin|>",
        "Ok.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
        f"<|tool_call_argument_begin|>{TEXT}<|tool_call_end|><|tool_call_begin|>functions.now:1"
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
        "Ok.",
        [CALL, NOW],
    ),
    "granite-3": ("<|tool_call|>", f"<|tool_call|>[{OBJECT}, {OTHER}]", "", [CALL, NOW]),
    "phi-4-mini": ("<|tool_call|>", f"<|tool_call|>[{OBJECT}]<|/tool_call|>", "", [CALL]),
    "minimax-m1": (
        "<tool_calls>",
        f"<tool_calls>\n{OBJECT}\n{OTHER}\n</tool_calls>",
        "",
        [CALL, NOW],
    ),
    "minimax-m2": (
        "<minimax:tool_call>",
        f'A\n<minimax:tool_call>\n{INVOKE}<invoke name="now">\n</invoke>\n</minimax:tool_call>',
        "A",
        [CALL, NOW],
    ),
    "cohere": (
        "<|START_ACTION|>",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": '
        f"{TEXT}}}\n]<|END_ACTION|>",
        "",
        [CALL],
    ),
    "internlm": (
        "<|action_start|>",
        f"<|action_start|><|plugin|>{OBJECT}<|action_end|>",
        "",
        [CALL],
    ),
    "seed-oss": ("<seed:tool_call>", f"<seed:tool_call>\n{XML}\n</seed:tool_call>", "", [CALL]),
    "gemma-4": (
        "<|tool_call>",
        '<|tool_call>call:get_weather{city:<|"|>Graz {é}<|"|>,days:2}<tool_call|>',
        "",
        [CALL],
    ),
    "lfm2": (
        "<|tool_call_start|>",
        f"<|tool_call_start|>[{PYTHON}, now()]<|tool_call_end|>",
        "",
        [CALL, NOW],
    ),
    "olmo-3": (
        "<function_calls>",
        f"<function_calls>\n{PYTHON}\nnow()\n</function_calls>",
        "",
        [CALL, NOW],
    ),
    "llama-4": ("<|python_start|>", f"<|python_start|>[{PYTHON}]<|python_end|>", "", [CALL]),
    "llama-4, bare": ("<|python_start|>", f"[{PYTHON}, now()]", "", [CALL, NOW]),
    "llama-4, json": ("<|python_start|>", OBJECT, "", [CALL]),
    "mistral": ("[TOOL_CALLS]", f"[TOOL_CALLS]get_weather[ARGS]{TEXT}", "", [CALL]),
    "llama-3": ("<|python_tag|>", f"<|python_tag|>{OBJECT}", "", [CALL]),
    "apertus": (
        "<|tools_prefix|>",
        f'Ok. <|tools_prefix|>[{{"get_weather": {TEXT}}}, {{"now": {{}}}}]<|tools_suffix|>',
        "Ok.",
        [CALL, NOW],
    ),
    "step-3": (
        "<｜tool_calls_begin｜>",
        "Ok.<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="get_weather"><steptml:parameter name="city">Graz {é}</steptml:parameter>'
        '<steptml:parameter name="days">2</steptml:parameter></steptml:invoke><｜tool_call_end｜>\n'
        "<｜tool_call_begin｜>function<｜tool_sep｜>"
        '<steptml:invoke name="now"></steptml:invoke><｜tool_call_end｜><｜tool_calls_end｜>',
        "Ok.",
        [CALL, NOW],
    ),
    "functionary-3.2": (
        ">>>all",
        f">>>all\nLet me see.>>>get_weather\n{TEXT}>>>now\n{{}}",
        "Let me see.",
        [CALL, NOW],
    ),
    # Tuned on Mistral's or Llama's vocabulary, which has their own marks too.
    "hermes and mistral": (
        "<tool_call> [TOOL_CALLS]",
        f"Let me see.[TOOL_CALLS][{OBJECT}, {OTHER}]",
        "Let me see.",
        [CALL, NOW],
    ),
    "hermes and mistral, by name": (
        "<tool_call> [TOOL_CALLS]",
        f"[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{TEXT}[TOOL_CALLS]now[ARGS]{{}}",
        "",
        [CALL, NOW],
    ),
    "hermes and llama": (
        "<tool_call> <|python_tag|>",
        f"Let me see.<|python_tag|>{OBJECT}; {OTHER}",
        "Let me see.",
        [CALL, NOW],
    ),
    "unknown": ("", f"<tool_call>{OBJECT}</tool_call>", "", [CALL]),
}


def stream(template: str, *, single: bool = False, **params: Any) -> PieceText:
    calls = CallFormat(template, {}).parser(TOOLS, forced=False)
    return PieceText(unsplit(), Params(**params), calls=calls, single=single)


def pieces_of(made: PieceText, feeds: list[str]) -> list[Piece]:
    """All pieces, those before the end first."""
    pieces: list[Piece] = []
    for feed in feeds:
        if made.called or made.stopped_by is not None:
            break
        pieces += made.add(feed, may_stop=True)
    return merged(pieces + made.finish(may_stop=True))


def read(pieces: list[Piece]) -> tuple[str, list[tuple[str, str]]]:
    """The text, and the calls with their arguments as they came."""
    text, calls = "", []
    for piece in pieces:
        if piece.kind == "content":
            text += piece.text
        elif piece.kind == "call":
            calls.append((piece.text, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return text, calls


def cuts(text: str) -> list[list[str]]:
    """A text whole, by the character, in two at every place, and at random."""
    found = [[text], list(text)]
    found += [[text[:at], text[at:]] for at in range(1, len(text))]
    draw = random.Random(text)
    for _ in range(5):
        places = sorted(draw.sample(range(1, len(text)), min(6, len(text) - 1)))
        found.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_calls_of_a_family_are_found_wherever_its_answer_is_cut(case: str) -> None:
    template, answer, said, wanted = CASES[case]
    for feeds in cuts(answer):
        text, calls = read(pieces_of(stream(template), feeds))
        assert (text, [(name, json.loads(arguments)) for name, arguments in calls]) == (
            said,
            wanted,
        )


@pytest.mark.parametrize("case", CASES)
def test_an_answer_of_one_call_is_over_with_it(case: str) -> None:
    template, answer, said, wanted = CASES[case]
    made = stream(template, single=True)
    text, calls = read(pieces_of(made, list(answer + "\n\nmore" * 3)))
    assert made.called
    assert (text, [(name, json.loads(arguments)) for name, arguments in calls]) == (
        said,
        wanted[:1],
    )


@pytest.mark.parametrize("case", CASES)
def test_an_answer_cut_off_anywhere_has_what_was_certain_and_is_the_same_for_every_cut(
    case: str,
) -> None:
    template, answer, _, wanted = CASES[case]
    for end in range(len(answer)):
        cut = answer[:end]
        text, calls = read(pieces_of(stream(template), [cut]))
        assert (text, calls) == read(pieces_of(stream(template), list(cut)))
        whole = [(name, arguments) for name, arguments in calls]
        assert [name for name, _ in whole] == [name for name, _ in wanted[: len(whole)]]


@pytest.mark.parametrize("case", CASES)
def test_a_call_of_no_tool_of_the_request_stays_text(case: str) -> None:
    template, answer, said, _ = CASES[case]
    other = answer.replace("now", "what").replace("get_weather", "unknown")
    for feeds in ([other], list(other)):
        text, calls = read(pieces_of(stream(template), feeds))
        assert calls == [] and "unknown" in text and text.startswith(said)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("city", "null", "null"),
        ("city", "2", "2"),
        ("note", "null", "null"),
        ("days", "2", 2),
        ("days", "12345678901234567890", 12345678901234567890),
        ("days", "soon", "soon"),
        ("exact", "True", True),
        ("where", '{"x": 1}', {"x": 1}),
        ("where", "{'x': True}", {"x": True}),
        ("else", "2", "2"),
        ("else", "[1]", [1]),
    ],
)
def test_a_bare_argument_is_what_the_schema_says(key: str, text: str, value: Any) -> None:
    answer = f"<tool_call>\n<function=get_weather>\n<parameter={key}>\n{text}\n</parameter>\n</function>\n</tool_call>"
    _, [(_, arguments)] = read(pieces_of(stream("<tool_call>"), list(answer)))
    assert json.loads(arguments) == {key: value}


def test_what_a_model_writes_as_json_keeps_its_types() -> None:
    answer = (
        '<tool_call>{"name": "get_weather", "arguments": {"note": "null", "days": "2"}}</tool_call>'
    )
    _, [(_, arguments)] = read(pieces_of(stream("<tool_call>"), [answer]))
    assert arguments == '{"note": "null", "days": "2"}'


def test_a_stop_string_ends_an_answer_within_a_call() -> None:
    made = stream("<tool_call>", stop=['"days"'])
    text, calls = read(pieces_of(made, [f"<tool_call>{OBJECT}</tool_call>"]))
    assert (text, calls) == ("", [("get_weather", '{"city": "Graz {é}", ')])
    assert made.stopped_by == '"days"'


# --- what transformers reads ----------------------------------------------------------------------

WIRE_TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}}
    for name, schema in TOOLS.items()
]
#: By the model type of transformers' own template: cases above, as answers of such a model.
SERVED = {"qwen3": ["qwen3, hermes"], "qwen3_5": ["qwen3-coder"], "gemma4": ["gemma-4"]}


def fallback(model_type: str) -> dict[str, Any]:
    """The response template that `transformers serve` has for a type of model."""
    found = next(t for types, t in _RESPONSE_TEMPLATE_FALLBACKS.items() if model_type in types)
    return dict(found)


@pytest.mark.parametrize(
    ("kind", "case"), [(k, case) for k, cases in SERVED.items() for case in cases]
)
def test_text_and_calls_are_those_that_transformers_reads(kind: str, case: str) -> None:
    template, answer, _, _ = CASES[case]
    message = parse_response(answer, fallback(kind), prefix="", tools=WIRE_TOOLS)
    functions = [call["function"] for call in message["tool_calls"]]
    text, calls = read(pieces_of(stream(template), [answer]))
    assert text == message.get("content", "")
    assert [(name, json.loads(said)) for name, said in calls] == [
        (function["name"], function["arguments"]) for function in functions
    ]


def shipped(template: dict[str, Any], tools: dict[str, Any]) -> PieceText:
    """The text of a model that ships a response template, in a syntax that has no reader here."""
    format_ = TemplateFormat(template, {})
    parser = format_.parser(Begun("<|im_start|>assistant\n", tools=tools))
    calls = CallFormat("", {}).parser(tools, forced=False)
    return PieceText(parser, Params(), calls=calls)


OWN: dict[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"\s*<<(?P<name>\w+)\s",
            "close": ">>",
            "repeats": True,
            "content": "kv-lines",
            "content_args": {"line_sep": ";", "kv_sep": "="},
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{content}"},
            },
        },
        "content": {"close": ["<|im_end|>"], "content": "text"},
    },
}
WRITTEN = "<think>hm</think>Let me see.\n<<get_weather city=Graz {é};days=2>>\n<<now >>"


def test_calls_of_a_shipped_template_are_read_as_it_says() -> None:
    message = parse_response(WRITTEN, OWN, prefix="<|im_start|>assistant\n", tools=WIRE_TOOLS)
    wanted = [
        (call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]
    ]
    assert wanted == [CALL, NOW]
    for feeds in cuts(WRITTEN):
        pieces = pieces_of(shipped(OWN, TOOLS), feeds)
        assert pieces[0] == Piece("reasoning", "hm")
        text, calls = read(pieces[1:])
        assert (text, [(name, json.loads(said)) for name, said in calls]) == ("Let me see.", wanted)


@pytest.mark.parametrize("cut", ["<<get_weather city=Graz", "<<unknown x=1>>"])
def test_what_a_shipped_template_reads_no_tool_in_stays_text(cut: str) -> None:
    for feeds in ([cut], list(cut)):
        text, calls = read(pieces_of(shipped(OWN, {"now": {}}), feeds))
        assert calls == [] and text


def test_a_shipped_template_that_reads_json_cut_off_loses_nothing() -> None:
    calls = {"open": "[[", "close": "]]", "content": "json", "repeats": True}
    own = {**OWN, "fields": {**OWN["fields"], "tool_calls": calls}}
    for feeds in (['Hm.[[{"name": "now"'], list('Hm.[[{"name": "now"')):
        text, found = read(pieces_of(shipped(own, TOOLS), feeds))
        assert (text, found) == ('Hm.{"name": "now"', [])


# --- gpt-oss --------------------------------------------------------------------------------------

HARMONY = {mark: (number, True) for number, mark in enumerate(ChannelSplitter.MARKS)}
CHANNELS: dict[str, tuple[str, str, str, list[Call]]] = {
    "a call": (
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{TEXT}<|call|>",
        "hm",
        "",
        [CALL],
    ),
    "the recipient before the channel": (
        f"<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{TEXT}<|call|>",
        "hm",
        "",
        [CALL],
    ),
    "a preamble and two calls": (
        f"<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>{TEXT}<|call|><|start|>assistant<|channel|>commentary to=functions.now<|message|>{{}}<|call|>",
        "",
        "Let me see.",
        [CALL, NOW],
    ),
    "no call": ("<|channel|>final<|message|>Yes.<|return|>", "", "Yes.", []),
    "a tool of nobody's": (
        "<|channel|>commentary to=functions.other<|message|>{}<|call|>",
        "",
        "commentary to=functions.other{}",
        [],
    ),
}


@pytest.mark.parametrize("case", CHANNELS)
def test_calls_of_gpt_oss_are_messages_to_functions(case: str) -> None:
    answer, thought, said, wanted = CHANNELS[case]
    for feeds in cuts(answer):
        parser = AnswerParser(ChannelSplitter("<|start|>assistant", shows_calls=True))
        calls = CallFormat("", HARMONY).parser(TOOLS, forced=False)
        pieces = pieces_of(PieceText(parser, Params(), calls=calls), feeds)
        assert "".join(piece.text for piece in pieces if piece.kind == "reasoning") == thought
        text, found = read([piece for piece in pieces if piece.kind != "reasoning"])
        assert (text, [(name, json.loads(a)) for name, a in found]) == (said, wanted)


def test_functionarys_first_turn_is_begun_by_its_prompt() -> None:
    format_ = CallFormat(">>>all", {})
    for answer, said, wanted in (
        ("all\nHello.", "Hello.", []),
        (f"get_weather\n{TEXT}", "", [CALL]),
    ):
        for feeds in cuts(answer):
            calls = format_.parser(TOOLS, forced=False, tail="...\n>>>")
            text, found = read(pieces_of(PieceText(unsplit(), Params(), calls=calls), feeds))
            assert (text, [(name, json.loads(a)) for name, a in found]) == (said, wanted)
