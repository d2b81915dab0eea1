"""The tool-call parser: formats, what is no call, and that cutting never matters."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gateway.tools import Arguments, CallStart, Text, ToolCallParser

NAMES = ("get_weather", "add")
WEATHER = '{"city": "Graz", "days": [1, {"a": "}"}]}'


def parsed(
    feeds: list[str], *, parallel: bool = True, names: tuple[str, ...] = NAMES
) -> tuple[str, list[tuple[str, str]]]:
    """All text, and the calls as (name, arguments)."""
    parser = ToolCallParser(names, parallel=parallel)
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
    "without arguments": ('{"name": "add"}', "", [("add", "{}")]),
    "null arguments": ('{"name": "add", "arguments": null}', "", [("add", "{}")]),
}

NO_CALLS = {
    "prose": "The answer is 42.\n",
    "an unknown tool": '{"name": "rm", "arguments": {}}',
    "other JSON": '{"city": "Graz", "name": "add"}',
    "a list of numbers": "[1, 2, 3]",
    "a list of other objects": '[{"x": 1}]',
    "an empty object": "{}",
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
def test_what_is_no_call_stays_text_to_the_letter(case: str) -> None:
    text = NO_CALLS[case]
    assert parsed([text]) == (text, [])
    assert parsed(list(text)) == (text, [])


@given(
    st.sampled_from([whole for whole, _, _ in CALLS.values()] + list(NO_CALLS.values())),
    st.lists(st.integers(0, 200)),
)
def test_how_the_text_is_cut_never_matters(whole: str, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    feeds = [whole[a:b] for a, b in itertools.pairwise(edges)]
    assert parsed(feeds) == parsed([whole])


@given(st.text(alphabet='{}[]"\\:, \nabc<>tool_call/namersguTOOL_CALLSARGS|py', max_size=60))
def test_any_text_is_taken_and_none_without_a_known_tool_is_lost(text: str) -> None:
    assert parsed(list(text), names=("zzz",)) == (text, [])


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = ToolCallParser(NAMES)
    pieces = parser.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "Gr')
    assert pieces == [CallStart(0, "get_weather"), Arguments(0, '{"city": "Gr')]
    assert parser.feed('az"}}') == [Arguments(0, 'az"}')]


def test_an_answer_cut_off_inside_of_a_call_keeps_what_it_has() -> None:
    assert parsed(['{"name": "add", "arguments": {"a": 1']) == ("", [("add", '{"a": 1')])


def test_without_parallel_calls_the_first_one_is_the_last() -> None:
    whole = CALLS["hermes twice, after text"][0]
    assert parsed(list(whole), parallel=False) == ("Let me look.", [("add", '{"a": 1}')])


def test_nesting_as_deep_as_it_likes_is_only_text() -> None:
    deep = json.dumps({"name": "add", "arguments": {}})[:-1] + ', "arguments": ' + "[" * 5000
    text, calls = parsed([deep])
    assert text == "" and calls[0][0] == "add"
