"""The tool-call parser: its formats, text that is not a call, and that cuts never matter."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, strategies as st

from broker.protocol.tool_parser import Arguments, CallStart, Text, ToolCallParser

NAMES = ("get_weather", "add")
WEATHER = '{"city": "Graz", "days": [1, {"a": "}"}]}'


def parsed(
    feeds: list[str],
    *,
    parallel: bool = True,
    names: tuple[str, ...] = NAMES,
    special: list[str] | None = None,
    tail: str = "",
    **options: Any,
) -> tuple[str, list[tuple[str, str]]]:
    """The whole text, and the calls as (name, arguments)."""
    parser = ToolCallParser(names, parallel=parallel, **options)
    parser.begin(special=special or [], tail=tail)
    pieces = [piece for feed in feeds for piece in parser.feed(feed)] + parser.finish()
    calls: list[tuple[str, str]] = []
    text = ""
    for piece in pieces:
        match piece:
            case Text():
                text += piece.text
            case CallStart():
                assert piece.index == len(calls)
                calls.append((piece.name, ""))
            case Arguments():
                name, arguments = calls[piece.index]
                calls[piece.index] = (name, arguments + piece.text)
    assert parser.calls == len(calls)
    return text, calls


CALLS = {
    "hermes": (
        f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>',
        "",
        [("get_weather", WEATHER)],
    ),
    "hermes twice, after text": (
        'Let me look.\n\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"arguments": {"a": "\\"}"}, "name": "add"}</tool_call>\n',
        "Let me look.",
        [("add", '{"a": 1}'), ("add", '{"a": "\\"}"}')],
    ),
    "hermes and text behind": (
        '<tool_call>{"name": "add", "arguments": {}}</tool_call>\nDone.',
        "Done.",
        [("add", "{}")],
    ),
    "hermes without its end": (
        '<tool_call>{"name": "add", "arguments": {"a": 1}}',
        "",
        [("add", '{"a": 1}')],
    ),
    "mistral": (
        '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, '
        '{"name": "get_weather", "arguments": {}, "id": "abc"}]',
        "",
        [("add", '{"a": 1}'), ("get_weather", "{}")],
    ),
    "mistral, newer": (
        '[TOOL_CALLS]add[ARGS]{"a": 1}[TOOL_CALLS]get_weather{"city": "[TOOL_CALLS]"}',
        "",
        [("add", '{"a": 1}'), ("get_weather", '{"city": "[TOOL_CALLS]"}')],
    ),
    "mistral, newest": (
        '[TOOL_CALLS]add[CALL_ID]a1B2c3D41[ARGS]{"a": 1}'
        '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D42[ARGS] {"city": "[CALL_ID]"}',
        "",
        [("add", '{"a": 1}'), ("get_weather", '{"city": "[CALL_ID]"}')],
    ),
    "mistral, newest, after text": (
        'Sure.[TOOL_CALLS]add[CALL_ID]x[ARGS]{"a": 1}',
        "Sure.",
        [("add", '{"a": 1}')],
    ),
    "arguments twice": (
        '<tool_call>{"name": "add", "arguments": {"a": 1}, "arguments": {"a": 2}}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    "llama": (
        '{"type": "function", "name": "add", "parameters": {"a": 1}}; '
        '{"name": "add", "parameters": {}}',
        "",
        [("add", '{"a": 1}'), ("add", "{}")],
    ),
    "llama with its tag": (
        '<|python_tag|>{"name": "add", "parameters": {"a": 1}}',
        "",
        [("add", '{"a": 1}')],
    ),
    "a bare list": (
        ' [ {"name": "add", "arguments": {"a": [1]}} ] ',
        "",
        [("add", '{"a": [1]}')],
    ),
    "arguments in a string": (
        '{"name": "add", "arguments": "{\\"a\\": 1}"}',
        "",
        [("add", '{"a": 1}')],
    ),
    "without arguments": ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    "null arguments": ('{"name": "add", "arguments": null}', "", [("add", "{}")]),
}

CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
BARE = '{"name": "add", "parameters": {"a": 1}}'
#: Text that contains calls in reasoning, and how many real calls it has.
THOUGHTS = {
    "a thought and a call": (f"<think>try {CALL} no</think>{CALL}", 1),
    "a thought of Mistral": (f"[THINK]try [TOOL_CALLS][{BARE}] no[/THINK][TOOL_CALLS][{BARE}]", 1),
    "a thought by another name": (f"<reasoning>{CALL}</reasoning>{CALL}", 1),
    "a thought of Apertus": (f"<|inner_prefix|>{CALL}<|inner_suffix|>{CALL}", 1),
    "a bare call after a thought": (f"<think>{BARE}</think>\n\n{BARE}", 1),
    "two thoughts": (f"<think>{CALL}</think>{CALL}<think>{CALL}</think>", 1),
    "a thought after text": (f"Sure. <think>{CALL}</think> Well.", 0),
    "a thought that does not end": (f"<think>{CALL} or", 0),
    "nothing but a thought": (f"<think>{CALL}</think>", 0),
    "half a mark": (f"<think>{CALL}</thin</think{CALL}", 0),
}

NO_CALLS = {
    "prose": "The answer is 42.\n",
    "an unknown tool": '{"name": "rm", "arguments": {}}',
    "other JSON": '{"city": "Graz", "name": "add"}',
    "a list of numbers": "[1, 2, 3]",
    "a list of other objects": '[{"x": 1}]',
    "an empty object": "{}",
    "an answer with a name": '{"name": "add", "age": 30}',
    "an answer with no more than a name": '{"name": "add"}',
    "an answer with one key too many": '{"name": "add", "parameters": {"a": 1}, "age": 30}',
    "an answer whose parameters are a list": '{"name": "add", "parameters": [1]}',
    "an answer whose parameters are a word": '{"name": "add", "arguments": "none"}',
    "an answer of another type": '{"type": "person", "name": "add", "parameters": {}}',
    "an answer that names twice": '{"name": "add", "name": "add", "parameters": {}}',
    "a list of which one is no call": '[{"name": "add", "arguments": {}}, {"name": "rm"}]',
    "a list that ends in words": '[{"name": "add", "arguments": {}}, and so on]',
    "a list without its end": '[{"name": "add", "arguments": {}}',
    "a cut answer": '{"name": "add", "arguments": {"a": 1',
    "JSON inside of prose": 'Call {"name": "add", "arguments": {}} yourself.',
    "a marker that is only mentioned": "Use <tool_call> for tools, or [TOOL_CALLS] in brackets.",
    "a beginning of a marker": "a < b, [TOOL, <tool",
    "an unknown tool of hermes": '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
    "an unknown tool of mistral": '[TOOL_CALLS]rm[ARGS]{"a": 1}',
    "unfinished JSON": '{"na',
    "an unfinished name": '{"name": "ad',
    "a brace": "{",
    "a name that is a number": '{"name": 1}',
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_found_in_every_format(case: str) -> None:
    whole, text, calls = CALLS[case]
    assert parsed([whole]) == (text, calls)
    assert parsed(list(whole)) == (text, calls)


@pytest.mark.parametrize("case", NO_CALLS)
def test_text_that_is_not_a_call_is_unchanged(case: str) -> None:
    text = NO_CALLS[case]
    assert parsed([text]) == (text, [])
    assert parsed(list(text)) == (text, [])


@given(
    st.sampled_from([whole for whole, _, _ in CALLS.values()] + list(NO_CALLS.values())),
    st.lists(st.integers(0, 200)),
)
def test_cuts_in_the_text_never_matter(whole: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    feeds = [whole[a:b] for a, b in itertools.pairwise(edges)]
    assert parsed(feeds) == parsed([whole])


@given(st.text(alphabet='{}[]"\\:, \nabc<>tool_call/namersguTOOL_CALLSARGS|py', max_size=60))
def test_any_text_is_accepted_and_none_of_it_is_lost_without_a_known_tool(text: str) -> None:
    assert parsed(list(text), names=("zzz",)) == (text, [])


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolCallParser(NAMES)
    pieces = parser.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "Gr')
    assert pieces == [CallStart(0, "get_weather"), Arguments(0, '{"city": "Gr')]
    assert parser.feed('az"}}') == [Arguments(0, 'az"}')]


@pytest.mark.parametrize("case", THOUGHTS)
def test_a_call_within_reasoning_is_not_a_call(case: str) -> None:
    whole, count = THOUGHTS[case]
    for feeds in ([whole], list(whole)):
        text, calls = parsed(feeds)
        assert calls == [("add", '{"a": 1}')] * count
        thought = whole.removesuffix(CALL) if count else whole
        assert text.startswith(thought.partition("</think>")[0].partition("[/THINK]")[0])


@pytest.mark.parametrize("said", ["", "Hm. <think>first", "[THINK]a[/THINK]b<think>c"])
def test_reasoning_may_have_begun_before_the_answer(said: str) -> None:
    """A template may open it, or the message that is continued."""
    tail = "" if said else "<|im_start|>assistant\n<think>\n"
    whole = f"perhaps {CALL}</think>{CALL}"
    for feeds in ([whole], list(whole)):
        text, calls = parsed(feeds, tail=tail, said=said)
        assert (text, calls) == (f"perhaps {CALL}</think>", [("add", '{"a": 1}')])


@pytest.mark.parametrize(
    ("tail", "said"),
    [("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""), ("", "<think>a</think>")],
)
def test_reasoning_that_has_ended_hides_no_call(tail: str, said: str) -> None:
    assert parsed([CALL], tail=tail, said=said) == ("", [("add", '{"a": 1}')])


def test_marks_that_are_special_tokens_are_not_part_of_the_text() -> None:
    for special, whole, text, count in (
        (["[THINK]", "[/THINK]"], f"[THINK]a {CALL}[/THINK]b{CALL}", f"a {CALL}b", 1),
        (["[TOOL_CALLS]", "[ARGS]"], 'Use [TOOL_CALLS] or [ARGS]{"a": 1}', 'Use  or {"a": 1}', 0),
        (["<tool_call>", "</tool_call>"], f"{CALL} </tool_call>b", "b", 1),
        (["<tool_call>", "</tool_call>"], "a</tool_call>", "a", 0),
        (["</tool_call>"], "a <tool_call>b", "a <tool_call>b", 0),
    ):
        for feeds in ([whole], list(whole)):
            assert parsed(feeds, special=special) == (text, [("add", '{"a": 1}')] * count)
    shown = parsed(["a</tool_call>"], special=["</tool_call>"], shows_special=True)
    assert shown == ("a</tool_call>", [])


def test_a_forced_call_streams_whatever_its_form() -> None:
    parser = ToolCallParser(NAMES, forced=True)
    assert parser.feed('[{"name":"add","arguments":{"a') == [
        CallStart(0, "add"),
        Arguments(0, '{"a'),
    ]
    assert parsed(['{"name":"add","arguments":{"a":1'], forced=True) == ("", [("add", '{"a":1')])


def test_an_answer_cut_off_within_a_call_keeps_its_part_and_reports_the_cut() -> None:
    for whole, cut in (
        ('<tool_call>{"name": "add", "arguments": {"a": 1', True),
        ('[TOOL_CALLS]add[ARGS]{"a": 1', True),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', False),
        ('<tool_call>{"na', False),
    ):
        parser = ToolCallParser(NAMES)
        parser.feed(whole)
        parser.finish()
        assert parser.cut is cut
    assert parsed(['<tool_call>{"name": "add", "arguments": {"a": 1']) == ("", [("add", '{"a": 1')])


def test_without_parallel_calls_only_the_first_one_counts() -> None:
    whole = CALLS["hermes twice, after text"][0]
    assert parsed(list(whole), parallel=False) == ("Let me look.", [("add", '{"a": 1}')])


def test_extreme_nesting_is_only_text() -> None:
    deep = json.dumps({"name": "add", "arguments": {}})[:-1] + ', "arguments": ' + "[" * 5000
    assert parsed([deep]) == (deep, [])
    text, calls = parsed(["<tool_call>" + deep])
    assert text == "" and calls[0][0] == "add"
