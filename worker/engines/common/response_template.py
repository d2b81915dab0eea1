"""Answers of models that ship a response template: transformers' own streaming parser reads them.

Only what it says of its regions is taken: its final message keeps the last piece of a field alone.
What stands in no field of the template is content, so nothing is lost. Must never import torch
itself.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any, Final

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from broker.protocol.messages import Piece
from worker.engines.base import EngineLoadError
from worker.engines.common.answer_parser import (
    CONTENT,
    REASONING,
    AnswerParser,
    held_back,
)
from worker.engines.common.failures import one_line
from worker.engines.common.reasoning import AddedTokens, Begun

__all__ = ["TemplateFormat"]

_THOUGHTS: Final = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates keep what was thought."""


class TemplateFormat:
    """The response template of one model. Raises `EngineLoadError` for one that is not valid."""

    name = "response_template"

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
        fields = {
            name: copy.deepcopy(field)
            for name, field in template.get("fields", {}).items()
            if name in (CONTENT, *_THOUGHTS)
        }
        for field in fields.values():
            # The text is taken as it streams, so nothing is made of a whole region.
            for key in ("transform", "transform_each", "optional", "repeats", "join"):
                field.pop(key, None)
            field |= {"content": "text", "content_args": {}}
        try:
            if load_response_template(template).implicit not in fields:
                fields[_OUTSIDE] = {"content": "text"}
            self._template = load_response_template({**template, "defaults": {}, "fields": fields})
        except (ValueError, TypeError) as error:
            raise EngineLoadError(
                f"the model's response template is not valid: {one_line(error)}: correct it, or "
                "name a parser with --reasoning-parser"
            ) from None

    def parser(self, begun: Begun) -> AnswerParser:
        turn = self._template.truncate_past_last_anchor(begun.tail)
        # Without the anchor it is not a prompt of this model's.
        prefix = "" if turn == begun.tail else begun.tail
        splitter = _TemplateSplitter(self._template, prefix, self.special)
        return AnswerParser(splitter, continues=splitter.said)


_OUTSIDE: Final = "outside"
"""A field of ours for what stands in none of the template's."""


def _literals(value: Any) -> list[str]:
    """A template's mark, or its marks."""
    return [value] if isinstance(value, str) else list(value or ())


def _strings(value: Any) -> Iterator[str]:
    """Every string of a template."""
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if not isinstance(value, str):
            yield from _strings(inner)


class _TemplateSplitter:
    """Events of transformers' parser as pieces."""

    def __init__(self, template: Any, prefix: str, special: tuple[str, ...]) -> None:
        self._parser = ResponseParser(template, prefix=prefix)
        #: What says nothing outside of every field: how a turn begins, and special tokens.
        self._marks = (*(template.start_anchor_literals or ()), *special)
        self._field = ""
        #: Of what stands outside of every field: it may be the beginning of a mark.
        self._outside = ""
        #: The prompt has a text that the answer goes on with.
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
        _, events = self._parser.finalize()
        pieces = list(self._pieces(events, at_end=True))
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
                case "region_chunk" if event["field"] == _OUTSIDE:
                    yield from self._said_outside(event["text"])
                case "region_chunk":
                    yield Piece(self.kind, event["text"])
                case "region_close":
                    # At the end of an answer every field is closed, also one that was cut off.
                    self._field = self._field if at_end else ""

    def _said_outside(self, text: str) -> Iterator[Piece]:
        self._outside += text
        sure = len(self._outside) - held_back(self._outside, self._marks)
        said, self._outside = self._outside[:sure], self._outside[sure:]
        for mark in self._marks:
            said = said.replace(mark, "")
        if said:
            yield Piece(CONTENT, said)
