"""Answers of models that ship a response template, read by transformers' own streaming parser.

Only the parser's events about regions are used, since its final message keeps only the last piece
of a field. Text in none of the template's fields is content, so nothing is lost. Must never import
torch itself.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any, Final

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.content_parsers import process_field
from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplateField,
    load_response_template,
)

from broker.protocol.messages import Piece, PieceKind
from worker.engines.base import EngineLoadError
from worker.engines.common.answer_parser import (
    CONTENT,
    REASONING,
    AnswerParser,
    held_back,
)
from worker.engines.common.failures import one_line
from worker.engines.common.reasoning import AddedTokens, Begun
from worker.engines.common.typed_arguments import Tools, typed

__all__ = ["TemplateFormat"]

_THOUGHTS: Final = ("reasoning_content", "thinking", "reasoning")
"""Names of the field for reasoning in templates."""


class TemplateFormat:
    """The response template of one model. Raises `EngineLoadError` if it is not valid."""

    name = "response_template"
    shown = True

    def __init__(self, template: dict[str, Any], added: AddedTokens) -> None:
        written = "\n".join(_strings(template))
        self.special = tuple(
            text
            for text, (_, special) in added.items()
            if special and (text in written or re.escape(text) in written)
        )
        thoughts = [template.get("fields", {}).get(name) for name in _THOUGHTS]
        opens, closes = (
            [text for field in thoughts if field for text in _literals(field.get(key))]
            for key in ("open", "close")
        )
        self.opening_ids = frozenset(added[text][0] for text in opens if text in added)
        self.closing = next(iter(closes), None)
        self.closing_before_call = self.closing
        calls = template.get("fields", {}).get(_CALLS) or {}
        self.calls_open = next(iter(_literals(calls.get("open"))), "")
        self._whole = template
        fields = {
            name: copy.deepcopy(field)
            for name, field in template.get("fields", {}).items()
            if name in (CONTENT, *_THOUGHTS)
        }
        for field in fields.values():
            # The text is used as it streams, so nothing is to be computed from a whole region.
            for key in ("transform", "transform_each", "optional", "repeats", "join"):
                field.pop(key, None)
            field |= {"content": "text", "content_args": {}}
        try:
            if load_response_template(template).implicit not in fields:
                fields[_OUTSIDE] = {"content": "text"}
            self._template = load_response_template({**template, "defaults": {}, "fields": fields})
            self._with_calls = self._and_calls(template, fields)
        except (ValueError, TypeError) as error:
            raise EngineLoadError(
                f"the model's response template is not valid: {one_line(error)}: correct it, or "
                "name a parser with --reasoning-parser"
            ) from None

    def _and_calls(
        self, template: dict[str, Any], fields: dict[str, Any]
    ) -> tuple[Any, ResponseTemplateField] | None:
        """The template with a field for calls, also taken as text, and the reader of that text."""
        calls = template.get("fields", {}).get(_CALLS)
        if calls is None:
            return None
        taken = copy.deepcopy(calls)
        for key in ("transform_each", "optional", "join"):
            taken.pop(key, None)
        names = {
            name for key in _PATTERNS for name in re.findall(r"\?P<(\w+)>", calls.get(key, ""))
        }
        taken |= {
            "content": "text",
            "content_args": {"strip": False},
            "transform": {"content": "{content}"} | {name: "{" + name + "}" for name in names},
        }
        template = {**template, "defaults": {}, "fields": {**fields, _CALLS: taken}}
        reader = load_response_template({**self._whole, "defaults": {}}).fields[_CALLS]
        return load_response_template(template), reader

    def parser(self, begun: Begun) -> AnswerParser:
        turn = self._template.truncate_past_last_anchor(begun.tail)
        # A prompt without the anchor was not written by this model's template.
        prefix = "" if turn == begun.tail else begun.tail
        template, reader = self._template, None
        if begun.tools and not begun.calls_known and self._with_calls is not None:
            template, reader = self._with_calls
        calls = None if reader is None else _CallReader(reader, begun.tools)
        splitter = _TemplateSplitter(template, prefix, self.special, calls)
        return AnswerParser(splitter, continues=splitter.said)


_CALLS: Final = "tool_calls"
_PATTERNS: Final = ("open_pattern", "close_pattern")
_OUTSIDE: Final = "outside"
"""Our own field, for text in none of the template's."""


def _literals(value: Any) -> list[str]:
    """The marks of a field, which may be one or several."""
    return [value] if isinstance(value, str) else list(value or ())


def _strings(value: Any) -> Iterator[str]:
    """Every string of a template."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class _CallReader:
    """Reads regions of calls as the template says, each once it is complete."""

    def __init__(self, reader: ResponseTemplateField, tools: Tools) -> None:
        self._reader = reader
        self._tools = tools

    def read(self, region: dict[str, str]) -> list[Piece]:
        """The calls of a region; its text if it does not consist of calls of these tools."""
        captures = {name: text for name, text in region.items() if name != "content"}
        text = Piece(CONTENT, region["content"])
        try:
            found = process_field(region["content"], self._reader, captures)
        except (ValueError, TypeError, KeyError, RecursionError):
            return [text]
        pieces: list[Piece] = []
        for call in found if isinstance(found, list) else [found]:
            function = call.get("function") if isinstance(call, dict) else None
            name = function.get("name") if isinstance(function, dict) else None
            arguments = function.get("arguments") if isinstance(function, dict) else None
            if not isinstance(name, str) or name not in self._tools:
                return [text]
            if not isinstance(arguments, dict | str):
                return [text]
            if isinstance(arguments, dict):
                arguments = json.dumps(self._typed(name, arguments), ensure_ascii=False)
            pieces += [
                Piece(PieceKind.CALL.value, name),
                Piece(PieceKind.ARGUMENTS.value, arguments),
            ]
        return pieces

    def _typed(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments, with bare text typed by the tool's schema; JSON has its own types."""
        if self._reader.content == "json":
            return arguments
        schema = self._tools[name]
        return {
            key: typed(value, key, schema) if isinstance(value, str) else value
            for key, value in arguments.items()
        }


class _TemplateSplitter:
    """Turns the events of transformers' parser into pieces."""

    def __init__(
        self,
        template: Any,
        prefix: str,
        special: tuple[str, ...],
        calls: _CallReader | None = None,
    ) -> None:
        self._calls = calls
        #: Text of the current call.
        self._region = ""
        self._parser = ResponseParser(template, prefix=prefix)
        #: What is not text outside of every field: the beginning of a turn, and special tokens.
        self._marks = (*(template.start_anchor_literals or ()), *special)
        self._field = ""
        #: Text outside of every field that may be the beginning of a mark.
        self._outside = ""
        #: Whether the prompt has a text that the answer continues.
        self.said = False
        for piece in self._pieces(self._parser.initial_events):
            self.said = not piece.text.isspace()
        self.said = self.said and self._field != ""

    @property
    def kind(self) -> str:
        return REASONING if self._field in _THOUGHTS else CONTENT

    @property
    def speaks(self) -> bool:
        return self.kind == CONTENT

    def feed(self, text: str) -> list[Piece]:
        return list(self._pieces(self._parser.feed(text)))

    def finish(self) -> list[Piece]:
        try:
            _, events = self._parser.finalize()
            pieces = list(self._pieces(events, at_end=True))
        except KeyError:
            # A call was cut off before its closing mark, which would have given its name.
            pieces = [Piece(CONTENT, self._region)] if self._region else []
        rest = self._outside
        for mark in self._marks:
            rest = rest.replace(mark, "")
        if rest:
            pieces.append(Piece(CONTENT, rest))
        return pieces

    def _pieces(self, events: list[dict[str, Any]], *, at_end: bool = False) -> Iterator[Piece]:
        for event in events:
            match event["type"]:
                case "region_open":
                    self._field = event["field"]
                case "region_chunk" if event["field"] == _CALLS:
                    self._region += event["text"]  # it is read as a whole
                case "region_chunk" if event["field"] == _OUTSIDE:
                    yield from self._said_outside(event["text"])
                case "region_chunk":
                    yield Piece(self.kind, event["text"])
                case "region_close" if event["field"] == _CALLS and self._calls is not None:
                    self._field = self._region = ""
                    yield from self._calls.read(event["value"])
                case "region_close":
                    # At the end of an answer every field is closed, even one that was cut off.
                    self._field = self._field if at_end else ""

    def _said_outside(self, text: str) -> Iterator[Piece]:
        self._outside += text
        sure = len(self._outside) - held_back(self._outside, self._marks)
        said, self._outside = self._outside[:sure], self._outside[sure:]
        for mark in self._marks:
            said = said.replace(mark, "")
        if said:
            yield Piece(CONTENT, said)
