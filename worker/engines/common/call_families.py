"""How families of models write tool calls, and which family a model belongs to.

A family is recognised by the marks in a model's chat template or vocabulary; each mark has a reader
for what follows it (see `CallParser`). A model that has several formats has several readers. Must
never import torch; imports transformers only for formats that it can parse.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any, Final

from broker.protocol.tool_parser import MARKS, Arguments, CallStart, ToolCallParser
from worker.engines.common.answer_parser import Marks
from worker.engines.common.calls import CallParser, Calls, DetectedCalls, Reader, Steps
from worker.engines.common.reasoning import AddedTokens
from worker.engines.common.typed_arguments import Tools

__all__ = ["CallFormat"]

_SPACE: Final = " \t\r\n"
_SEPARATORS: Final = _SPACE + ",;"


def _tagged(close: str, *, optional: bool = False, before: str = "") -> Reader:
    """Calls between two marks: JSON objects, a list of them, or one call in XML. `optional`: the
    end of a list also ends the calls. `before`: a mark that stands before an object."""

    def read(calls: CallParser) -> Steps:
        while True:
            first = yield from calls.skip(_SEPARATORS)
            if first == "{":
                if not (yield from calls.read_call()):
                    return False
            elif first == "[":
                calls.take(1)
            elif first == "]":
                calls.take(1)
                if optional:
                    yield from calls.skip()
                    yield from calls.comes(close)
                    return True
            elif first == "<":
                mark = yield from calls.comes(close, _FUNCTION, *([before] if before else ()))
                if mark == close:
                    return True
                if not mark or (mark == _FUNCTION and not (yield from _function(calls))):
                    return False
            elif not first:
                return True
            else:
                return (yield from _keys_and_values(calls, close))

    return read


_FUNCTION: Final = "<function="


def _detected(mark: str) -> Reader:
    """Mistral, and Llama 3 with its mark, as `ToolCallParser` reads them in any model."""

    def read(calls: CallParser) -> Steps:
        reader, told, behind = ToolCallParser(calls.tools), False, ""
        reader.feed(mark)
        ended = False
        while reader.in_calls and not ended:
            if not (calls.text or calls.over):
                yield
                continue
            ended = not calls.text
            found = reader.finish() if ended else reader.feed(calls.take(1))
            if reader.cut:
                return False
            for piece in found:
                if isinstance(piece, CallStart):
                    told = calls.start_call(piece.name)
                elif isinstance(piece, Arguments):
                    calls.add_arguments(piece.text)
                else:
                    behind += piece.text
            if reader.between_calls:
                calls.end_call()
        if told:
            calls.forget()
            calls.give_back(behind + reader.pending)
        return told

    return read


def _function(calls: CallParser) -> Steps:
    """`<function=NAME>`, then its parameters as elements, or all of them as one JSON object."""
    name, mark = yield from calls.until(">")
    if not mark or not calls.start_call(name.strip(_SPACE)):
        return False
    while True:
        first = yield from calls.skip()
        if first == "{":
            if not (yield from calls.read_arguments()):
                return False
            yield from calls.skip()
            return bool((yield from calls.comes("</function>"))) or calls.over
        mark = yield from calls.comes("<parameter=", "</function>")
        if mark == "</function>":
            calls.end_call(closes=True)
            return True
        if not mark or not (yield from _parameter(calls, ">", "</parameter>")):
            return False


def _parameter(calls: CallParser, key_ends: str, value_ends: str) -> Steps:
    """The rest of `<parameter=KEY>` and the value, which stands on lines of its own."""
    key, mark = yield from calls.until(key_ends)
    if not mark:
        return False
    value, mark = yield from calls.until(value_ends)
    value = value.removeprefix("\n")
    if mark:
        value = value.removesuffix("\n")
    calls.add_argument(key.strip(_SPACE), value, cut=not mark)
    return bool(mark)


def _keys_and_values(calls: CallParser, close: str) -> Steps:
    """GLM: the name, then keys and values as elements, up to the closing mark."""
    name, mark = yield from calls.until("\n", "<arg_key>", close)
    if not mark or not calls.start_call(name.strip(_SPACE)):
        return False
    while mark != close:
        if mark != "<arg_key>":
            yield from calls.skip()
            mark = yield from calls.comes("<arg_key>", close)
            if not mark:
                return False
            continue
        key, mark = yield from calls.until("</arg_key>")
        yield from calls.skip()
        if not mark or not (yield from calls.comes("<arg_value>")):
            return False
        value, mark = yield from calls.until("</arg_value>")
        calls.add_argument(key.strip(_SPACE), value, cut=not mark)
        if not mark:
            return False
    calls.end_call(closes=True)
    return True


def _invoked(close: str, prefix: str = "") -> Reader:
    """MiniMax-M2, and DeepSeek V3.2 with a prefix: `<invoke name="f"><parameter name="k">v...`."""
    invoke, parameter = f'<{prefix}invoke name="', f'<{prefix}parameter name="'
    invoke_ends, parameter_ends = f"</{prefix}invoke>", f"</{prefix}parameter>"

    def read(calls: CallParser) -> Steps:
        while True:
            yield from calls.skip()
            mark = yield from calls.comes(invoke, close)
            if mark != invoke:
                return bool(mark) or calls.over
            name, mark = yield from calls.until('"')
            yield from calls.until(">")
            if not mark or not calls.start_call(name):
                return False
            while True:
                yield from calls.skip()
                mark = yield from calls.comes(parameter, invoke_ends)
                if mark == invoke_ends:
                    calls.end_call(closes=True)
                    break
                if not mark or not (yield from argument(calls)):
                    return False

    def argument(calls: CallParser) -> Steps:
        key, mark = yield from calls.until('"')
        said, ends = yield from calls.until(">")
        if not (mark and ends):
            return False
        value, mark = yield from calls.until(parameter_ends)
        calls.add_argument(key, value, cut=not mark, json='string="false"' in said)
        return bool(mark)

    return read


def _named(begin: str, separator: str, end: str, close: str) -> Reader:
    """Name and JSON arguments of each call between marks of their own: Kimi K2, DeepSeek."""

    def read(calls: CallParser) -> Steps:
        while True:
            yield from calls.skip()
            mark = yield from calls.comes(begin, close)
            if mark != begin:
                return bool(mark) or calls.over
            head, mark = yield from calls.until(separator)
            if not mark:
                return False
            # DeepSeek V3 has the name here, after the type of tool, and the object in a code fence.
            between, mark = yield from calls.until("{", end, keeps=True)
            name = between.strip(_SPACE).partition("\n")[0].strip(_SPACE) or head.strip(_SPACE)
            if not calls.start_call(_KIMI_ID.sub(r"\1", name)):
                return False
            if mark == end:
                calls.end_call(closes=True)
            elif not mark or not (yield from calls.read_arguments()):
                return False
            yield from calls.until(end)

    return read


_KIMI_ID: Final = re.compile(r"^functions\.(.*?)(?::\d+)?$")
"""`functions.NAME:0`"""


def _gemma(calls: CallParser) -> Steps:
    """Gemma 4: `call:NAME{key:value,...}`, with strings between `<|"|>`."""
    if not (yield from calls.comes("call:")):
        return False
    name, mark = yield from calls.until("{", _GEMMA_END, keeps=True)
    if not mark or not calls.start_call(name.strip(_SPACE)):
        return False
    body, mark = yield from calls.until(_GEMMA_END)
    if not mark:
        calls.add_arguments(body)
        return False
    arguments = _parsed(body, "json", unquoted_keys=True, string_delims=[['<|"|>', '<|"|>']])
    calls.add_arguments(body if arguments is None else json.dumps(arguments, ensure_ascii=False))
    calls.end_call()
    return True


_GEMMA_END: Final = "<tool_call|>"


def _pythonic(close: str, *, lines: bool = False) -> Reader:
    """Calls as Python writes them, in a list or on `lines`."""

    def read(calls: CallParser) -> Steps:
        body, mark = yield from calls.until(close)
        if lines:
            body = f"[{','.join(line for line in body.splitlines() if line.strip())}]"
        return _say_python(calls, body) if mark or calls.over else False

    return read


def _say_python(calls: CallParser, text: str) -> bool:
    """Emit a list of calls; False if the text is not one, or names an unknown tool."""
    found = _python_calls(text.strip(_SPACE))
    if not found or any(name not in calls.tools for name, _ in found):
        return False
    for name, arguments in found:
        calls.start_call(name)
        calls.add_arguments(arguments)
        calls.end_call()
    return True


class _JsonWords(ast.NodeTransformer):
    """Replaces JSON's `true`, `false` and `null`, which models write in Python, by constants."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node


def _python_calls(text: str) -> list[tuple[str, str]]:
    """Names and JSON arguments of a list of calls that have only keyword arguments; empty if the
    text is not such a list.

    transformers has a reader for this only from 5.24 on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in strings
            tree = ast.parse(text, mode="eval").body
        return [_python_call(one) for one in tree.elts] if isinstance(tree, ast.List) else []
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return []


def _python_call(call: ast.expr) -> tuple[str, str]:
    """Name and JSON arguments of a call. Raises ValueError or TypeError for anything but a call
    that has only keyword arguments, with values that JSON can express."""
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("not a call with keywords alone")
    given = {}
    for word in call.keywords:
        if word.arg is None:
            raise ValueError("a call with `**`")
        given[word.arg] = ast.literal_eval(_JsonWords().visit(word.value))
    return ast.unparse(call.func), json.dumps(given, ensure_ascii=False)


def _bare(calls: CallParser) -> Steps:
    """Llama: an answer that is nothing but calls, without a mark."""
    if (yield from calls.skip()) == "{":
        while (yield from calls.skip(_SEPARATORS)) == "{":
            if not (yield from calls.read_call(strict=True)):
                return False
        return True
    text, mark = yield from calls.until("(", "]", "\n", keeps=True)
    if mark != "(" or text[:1] != "[" or text[1:].strip(_SPACE) not in calls.tools:
        return False
    while mark:
        more, mark = yield from calls.until("]")
        text += more + mark
        if _say_python(calls, text):
            return True
    return False


def _parsed(text: str, format_: str, **arguments: Any) -> Any:
    """What transformers' reader for a format finds; None if it finds nothing."""
    from transformers.utils.chat_parsing.content_parsers import parse_content

    try:
        return parse_content(text, format_, arguments)
    except (ValueError, RecursionError):
        return None


def _harmony(calls: CallParser) -> Steps:
    """gpt-oss: a message to `functions.NAME`, as `ChannelSplitter` shows it."""
    header, mark = yield from calls.until(_MESSAGE)
    found = _RECIPIENT.search(header)
    if not mark or found is None or not calls.start_call(found[1]):
        return False
    if not (yield from calls.read_arguments()):
        return False
    yield from calls.until("<|call|>")
    return True


_MESSAGE: Final = "<|message|>"
_RECIPIENT: Final = re.compile(r" to=functions\.([^\s<]+)")


def _by_name(calls: CallParser) -> Steps:
    """Apertus: `[{NAME: ARGUMENTS}, ...]`."""
    while True:
        first = yield from calls.skip(_SEPARATORS + "[{}")
        if first == "]":
            calls.take(1)
            yield from calls.skip()
            return bool((yield from calls.comes("<|tools_suffix|>"))) or calls.over
        if first != '"':
            return not first
        calls.take(1)
        name, mark = yield from calls.until('"')
        yield from calls.skip(_SPACE + ":")
        if not mark or not calls.start_call(name):
            return False
        if not (yield from calls.read_arguments()):
            return False


def _step(calls: CallParser) -> Steps:
    """Step-3: calls as elements, each between marks of its own."""
    invoke = _invoked("<｜tool_call_end｜>", "steptml:")
    while True:
        yield from calls.skip()
        mark = yield from calls.comes("<｜tool_call_begin｜>", "<｜tool_calls_end｜>")
        if mark != "<｜tool_call_begin｜>":
            return bool(mark) or calls.over
        _, mark = yield from calls.until("<｜tool_sep｜>")
        if not mark or not (yield from invoke(calls)):
            return False


def _functionary(calls: CallParser) -> Steps:
    """Functionary 3.2: `>>>NAME` and the arguments, or `>>>all` and a text."""
    name, mark = yield from calls.until("\n")
    if name.strip(_SPACE) == "all" and mark:
        calls.forget()
        return True
    if not mark or not calls.start_call(name.strip(_SPACE)):
        return False
    return (yield from calls.read_arguments())


_TURN: Final = ">>>"
"""Begins Functionary's messages; the template writes the first one of an answer."""

_FAMILIES: Final[dict[str, Reader]] = {
    # Hermes, Qwen 2.5 and 3, SmolLM3, EXAONE 4, Granite 4, ERNIE 4.5 (JSON); Qwen3-Coder, Qwen 3.5,
    # Nemotron 3, Step 3.5 (XML); GLM 4.5 and later (keys and values)
    "<tool_call>": _tagged("</tool_call>"),
    # Qwen3-Coder, which sometimes leaves out the mark around it; Llama 3.1 with JSON
    _FUNCTION: _function,
    # Phi-4-mini; Granite 3, without a closing mark
    "<|tool_call|>": _tagged("<|/tool_call|>", optional=True),
    # MiniMax-M1, Hunyuan, Jamba
    "<tool_calls>": _tagged("</tool_calls>"),
    "<TOOLCALL>": _tagged("</TOOLCALL>"),
    # Cohere
    "<|START_ACTION|>": _tagged("<|END_ACTION|>"),
    # InternLM
    "<|action_start|>": _tagged("<|action_end|>", before="<|plugin|>"),
    # Seed-OSS
    "<seed:tool_call>": _tagged("</seed:tool_call>"),
    "<minimax:tool_call>": _invoked("</minimax:tool_call>"),
    # DeepSeek V3.2, V4 and V4.1
    "<｜DSML｜function_calls>": _invoked("</｜DSML｜function_calls>", "｜DSML｜"),
    "<｜DSML｜tool_calls>": _invoked("</｜DSML｜tool_calls>", "｜DSML｜"),
    "<｜DSML｜ calls>": _invoked("</｜DSML｜ calls>", "｜DSML｜ "),
    # DeepSeek V3, R1 and V3.1
    "<｜tool▁calls▁begin｜>": _named(
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    "<|tool_calls_section_begin|>": _named(
        "<|tool_call_begin|>",
        "<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
        "<|tool_calls_section_end|>",
    ),
    "<|tool_call>": _gemma,
    # LFM2
    "<|tool_call_start|>": _pythonic("<|tool_call_end|>"),
    # Olmo 3
    "<function_calls>": _pythonic("</function_calls>", lines=True),
    # Llama 4
    "<|python_start|>": _pythonic("<|python_end|>"),
    "<|channel|>": _harmony,
    # Apertus
    "<|tools_prefix|>": _by_name,
    "<｜tool_calls_begin｜>": _step,
}
"""Readers, by the mark that begins calls."""

_MARKS: Final = (
    *_FAMILIES,
    "</tool_call>",
    "<|/tool_call|>",
    "<|END_ACTION|>",
    "<|action_end|>",
    "<|plugin|>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    "<|tool_calls_section_end|>",
    _GEMMA_END,
    '<|"|>',
    "<|python_end|>",
    _MESSAGE,
    "<|call|>",
    "<|tools_suffix|>",
    "<｜tool_calls_end｜>",
    "<｜tool_call_begin｜>",
    "<｜tool_sep｜>",
    "<｜tool_call_end｜>",
    *MARKS,
)
"""All marks that may be special tokens of a model."""

_BESIDE: Final[dict[str, Reader]] = {
    mark: _detected(mark) for mark in ("[TOOL_CALLS]", "<|python_tag|>")
}
"""Marks that `ToolCallParser` reads, for models that also have the marks of a family."""

#: How a template tells the model to write calls as Python, without a mark.
_PYTHONIC: Final = "func_name1(params_name1"


class CallFormat:
    """How one model writes calls. `template`: the source of its chat template."""

    def __init__(self, template: str, added: AddedTokens) -> None:
        self._readers = {
            mark: reader for mark, reader in _FAMILIES.items() if mark in template or mark in added
        }
        if f"{_TURN}all" in template:
            self._readers[_TURN] = _functionary
        if self._readers:
            self._readers |= {
                mark: reader
                for mark, reader in _BESIDE.items()
                if mark in template or mark in added
            }
        self._bare = _bare if "<|python_start|>" in self._readers or _PYTHONIC in template else None
        #: Special tokens that the parser must see.
        self.special = tuple(mark for mark in _MARKS if mark in added and added[mark][1])

    def parser(
        self,
        tools: Tools,
        *,
        forced: bool,
        shows_special: bool = False,
        thoughts: Marks | None = None,
        opened: bool = False,
        tail: str = "",
        said: str = "",
        special: Sequence[str] = (),
    ) -> Calls:
        """The parser for the content of one answer.

        `forced`: it can only be calls, as `tool_choice` asked. `thoughts`: marks of the thoughts
        that it contains; `opened`: it begins within one. `tail`: the end of the prompt; `said`: the
        message that the answer continues. `special`: further special tokens that are dropped from
        the text, unless `shows_special`."""
        hidden = () if shows_special else (*self.special, *special)
        if forced or not (self._readers or self._bare):
            detector = ToolCallParser(tools, forced=forced, shows_special=shows_special, said=said)
            detector.begin(special=hidden, tail=tail)
            return DetectedCalls(detector)
        parser = CallParser(
            self._readers,
            tools,
            bare=self._bare,
            special=hidden,
            thoughts=thoughts,
            opened=opened,
        )
        if _TURN in self._readers and tail.endswith(_TURN):
            parser.feed(_TURN)
        return parser

    @staticmethod
    def all_marks() -> tuple[str, ...]:
        """Every mark of calls, of any family."""
        return _MARKS

    @property
    def marks(self) -> tuple[str, ...]:
        """What begins calls in the known syntaxes; for calls without a mark, the brackets."""
        return (*self._readers, *(("[", "{") if self._bare else ()))

    @property
    def known(self) -> bool:
        """Whether the model writes calls in a syntax that has a reader here."""
        return bool(self._readers or self._bare)
