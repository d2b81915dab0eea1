"""Grammars for tool calls, in llguidance's Lark, that hold a model to the form of calls it knows.

`forced` makes the grammar of an answer that consists of calls, `awaited` that of free text in which
every call that the model begins is constrained. What a grammar admits, the model's own parser
reads, and arguments satisfy their tools' schemas. Schemas that cannot be expressed in a form raise
`Unsayable`: they are never widened. Must never import a tokenizer library or torch, or compile a
grammar.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from worker.engines.common.call_forms import ID, INDEX, Form
from worker.engines.common.call_values import (
    OneByOne,
    Rules,
    Unsayable,
    quoted,
    slashed,
    takes_none,
)
from worker.engines.common.reasoning import AddedTokens
from worker.engines.common.schemas import for_llguidance
from worker.engines.common.typed_arguments import Tools

__all__ = ["MAX_CALLS", "Unsayable", "Vocabulary", "awaited", "forced"]

MAX_CALLS: Final = 8
"""A model may keep adding calls for ever, so an answer that can only be calls needs a limit; the
model can make more in its next turn. Calls in JSON have the same limit (`client.core.forced`)."""

_NAME: Final = re.compile(r"[\w.-]+", re.ASCII)
"""Names that need no escaping in any form."""

_CHANNEL: Final = "<|channel|>"
_TURN: Final = ">>>"
"""Marks that begin any message, calls among them: gpt-oss's and Functionary's."""

_JSON: Final = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""Blanks in JSON: those that templates write, or none. The JSON shares only these blanks with the
grammar around it, so that a token may begin in one and end in the other."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens that a grammar must name."""

    added: AddedTokens
    #: Tokens that end an answer.
    end_ids: frozenset[int]

    def split(self, text: str) -> list[str | int]:
        """Split a text into plain texts and ids of special tokens. Raises `Unsayable` if one of
        those ends an answer."""
        special = {mark: i for mark, (i, special) in self.added.items() if special and mark in text}
        if not special:
            return [text] if text else []
        pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        made: list[str | int] = []
        for piece in re.split(f"({pattern})", text):
            if piece in special:
                if special[piece] in self.end_ids:
                    raise Unsayable(f"its calls contain {piece}, which ends an answer")
                made.append(special[piece])
            elif piece:
                made.append(piece)
        return made

    def without_end(self, text: str) -> str:
        """The text without a final token that ends an answer by itself."""
        for mark, (token_id, _) in self.added.items():
            if token_id in self.end_ids and text.endswith(mark):
                return text.removesuffix(mark)
        return text

    def said(self, text: str) -> str:
        """A text in Lark, empty for an empty text. Special tokens are named by id."""
        return " ".join(
            f"<[{piece}]>" if isinstance(piece, int) else _opened(piece)
            for piece in self.split(text)
        )

    def begun(self, text: str) -> str:
        """A text that begins with a mark, in Lark; the mark is one token if the vocabulary has
        it."""
        marks = [mark for mark in self.added if text.startswith(mark)]
        if not marks:
            return self.said(text)
        mark = max(marks, key=len)
        return f"<[{self.added[mark][0]}]> {self.said(text[len(mark) :])}"

    def free(self, marks: Collection[str]) -> str:
        """Special tokens that may stand in free text, in Lark: all but those that begin calls or
        end the answer. Empty: there are none."""
        ids = {i for mark, (i, special) in self.added.items() if special and mark not in marks}
        ranges: list[list[int]] = []
        for token_id in sorted(ids - self.end_ids):
            if ranges and ranges[-1][1] == token_id - 1:
                ranges[-1][1] = token_id
            else:
                ranges.append([token_id, token_id])
        return f"<[{','.join(f'{a}-{b}' for a, b in ranges)}]>" if ranges else ""


_OPEN: Final = {ID: "/[a-zA-Z0-9]{9}/", INDEX: "/[0-9]{1,2}/"}


def _opened(text: str) -> str:
    """A text in Lark, with a form's placeholders as patterns."""
    pieces = (piece for piece in re.split(f"([{ID}{INDEX}])", text) if piece)
    return " ".join(_OPEN.get(piece) or quoted(piece) for piece in pieces)


class _CallRules:
    """The rules of the calls of one form."""

    def __init__(self, form: Form, tools: Tools, vocabulary: Vocabulary, rules: Rules) -> None:
        self.form = replace(form, closes=vocabulary.without_end(form.closes))
        self._vocabulary = vocabulary
        self._rules = rules
        alternatives = [self._call(name, schema) for name, schema in tools.items()]
        self._one = rules.add("call", " | ".join(alternatives))

    def _call(self, name: str, schema: Mapping[str, Any]) -> str:
        if not _NAME.fullmatch(name):
            raise Unsayable(
                f"the name {name!r} has characters that the model's calls cannot contain"
            )
        try:
            return self._rules.add("tool", self._named(name, schema))
        except Unsayable as error:
            raise Unsayable(f"tool {name!r}: {error}") from None

    def _named(self, name: str, schema: Mapping[str, Any]) -> str:
        form, said = self.form, self._vocabulary.said
        if form.style != "json":
            return OneByOne(form, schema, self._rules, said).call(name)
        try:
            arguments = for_llguidance(_object(schema))
        except (TypeError, ValueError) as error:
            raise Unsayable(str(error)) from None
        except RecursionError:
            raise Unsayable("its schema is nested too deeply") from None
        return f"{said(name + form.middle)} {self._rules.json(arguments, _JSON)}"

    def region(self, opens: str, *, most: int) -> str:
        """Calls from `opens` (in Lark) to their end: one, or up to `most` if the form allows
        several in a turn."""
        said = self._vocabulary.said
        calls = f"{opens} {self._one}"
        if most > 1 and self.form.between is not None:
            more = self._rules.add("more", f"{said(self.form.between)} {self._one}")
            calls += f" {more}{{0,{most - 1}}}"
        return f"{calls} {said(self.form.closes)}"


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a call's arguments, which are always an object. A tool without properties,
    which is how OpenAI declares a function without parameters, takes none.

    `$schema` is removed: older drafts ignore `$id` next to `$ref`, or do not know it.
    """
    if takes_none(schema):
        return {"type": "object", "additionalProperties": False}
    return {"type": "object"} | {k: v for k, v in schema.items() if k != "$schema"}


def forced(form: Form, tools: Tools, vocabulary: Vocabulary, *, single: bool, tail: str) -> str:
    """The grammar of an answer that is one call, or up to `MAX_CALLS` unless `single`. `tail`: the
    end of the prompt. Raises `Unsayable`."""
    rules = Rules()
    calls = _CallRules(form, tools, vocabulary, rules)
    opens, begins = form.opens, ""
    if opens.startswith(_CHANNEL):
        begins = _thought(vocabulary, tail)
    elif opens.startswith(_TURN) and tail.endswith(_TURN):
        opens = opens.removeprefix(_TURN)
    else:
        # What models write between a thought and a call.
        begins = r"/[ \n]{0,2}/"
    region = calls.region(vocabulary.begun(opens), most=1 if single else MAX_CALLS)
    return rules.grammar(f"{begins} {region}")


def _thought(vocabulary: Vocabulary, tail: str) -> str:
    """gpt-oss: the reasoning that may stand before a call."""
    if not tail.endswith("<|start|>assistant"):
        raise Unsayable("its answer continues a message that has already begun")
    said = vocabulary.said
    opens = said(f"{_CHANNEL}analysis<|message|>")
    return f"({opens} /(?s:.*)/ {said('<|end|><|start|>assistant')})?"


def awaited(
    forms: Mapping[str, Sequence[Form]],
    tools: Tools,
    strict: Collection[str],
    vocabulary: Vocabulary,
    *,
    tail: str = "",
) -> str:
    """The grammar of free text in which calls must name one of the tools, and calls of those in
    `strict` must satisfy their schemas.

    `forms`: by the mark that begins calls, the model's own first; of the others, those that cannot
    express the schemas are forbidden. Raises `Unsayable`.
    """
    rules = Rules()
    held = {name: schema if name in strict else _ANY for name, schema in tools.items()}
    known: dict[str, list[_CallRules]] = {}
    for number, (mark, several) in enumerate(forms.items()):
        known[mark] = []
        for form in several:
            try:
                known[mark].append(_CallRules(form, held, vocabulary, rules))
            except Unsayable:
                if not number:
                    raise
    if known.get(_CHANNEL):
        return rules.grammar(_messages(known[_CHANNEL][0], vocabulary, tail))
    return _Free(known, vocabulary, rules, tail).grammar()


_ANY: Final[Mapping[str, Any]] = {"type": "object"}


def _messages(calls: _CallRules, vocabulary: Vocabulary, tail: str) -> str:
    """gpt-oss: messages, of which the last may be a call."""
    if not tail.endswith("<|start|>assistant"):
        raise Unsayable("its answer continues a message that has already begun")
    said = vocabulary.said
    header = f"{said(_CHANNEL)} /analysis|commentary|final/"
    if "<|constrain|>" in vocabulary.added:
        header += f" (/ ?/ {said('<|constrain|>')} /\\w+/)?"
    message = f"{header} {said('<|message|>')} /(?s:.*)/"
    call = calls.region(vocabulary.begun(calls.form.opens), most=1)
    return f"({message} {said('<|end|><|start|>assistant')})* ({message} | {call})"


_BARE: Final = {"[": r"\s*\[\s*[A-Za-z_]", "{": r"\s*(\[\s*)?\{"}
"""How an answer begins if it is a call without a mark."""


class _Free:
    """Free text with calls, by the marks that begin them. A mark is allowed only before a call."""

    def __init__(
        self,
        known: Mapping[str, Sequence[_CallRules]],
        vocabulary: Vocabulary,
        rules: Rules,
        tail: str,
    ) -> None:
        self._marked = {m: calls for m, calls in known.items() if calls and m not in _BARE}
        self._bare = [one for mark in _BARE for one in known.get(mark, ())]
        self._marks = [mark for mark in known if mark not in _BARE]
        self._vocabulary = vocabulary
        self._rules = rules
        self._tail = tail
        never = [mark for mark in self._marks if mark not in self._marked]
        none = [f"(?s:.*){re.escape(mark)}(?s:.*)" for mark in never]
        self._text = rules.terminal(_but("(?s:.*)", none))
        #: Text at the beginning of the answer, which must not look like a call without a mark.
        begins = [f"{pattern}(?s:.*)" for mark, pattern in _BARE.items() if mark in known]
        self._first = rules.terminal(_but("(?s:.*)", [*none, *begins]))

    def grammar(self) -> str:
        chunks = self._chunks(self._text)
        rest = f"({' | '.join(chunks)})* {self._text}" if chunks else self._text
        if _TURN in self._marked and self._tail.endswith(_TURN):
            return self._rules.grammar(f"({self._turn()}) {rest}")
        if self._first == self._text:
            return self._rules.grammar(rest)
        begun = [f"{chunk} {rest}" for chunk in self._chunks(self._first)]
        bare = [
            calls.region(self._vocabulary.begun(calls.form.opens), most=MAX_CALLS)
            for calls in self._bare
        ]
        return self._rules.grammar(" | ".join([*begun, self._first, *bare]))

    def _chunks(self, text: str) -> list[str]:
        """Pieces of free text, each with the call or the special token that ends it."""
        chunks = []
        for mark, several in self._marked.items():
            begins = self._begins(text, mark)
            if mark == _TURN:
                chunks.append(f"({begins}) ({self._turn()})")
                continue
            regions = [
                calls.region(
                    self._vocabulary.said(calls.form.opens.removeprefix(mark)), most=MAX_CALLS
                )
                for calls in several
            ]
            chunks.append(f"({begins}) ({' | '.join(regions)})")
        free = self._vocabulary.free(self._marks)
        chunks += [f"{text} {free}"] if free else []
        return [self._rules.add("chunk", chunk) for chunk in chunks]

    def _begins(self, text: str, mark: str) -> str:
        """A text up to a mark, and the mark: spelled out, or as one token."""
        spelled = self._rules.lazy(f"{text} {quoted(mark)}")
        token_id, special = self._vocabulary.added.get(mark, (0, False))
        return f"{spelled} | {text} <[{token_id}]>" if special else spelled

    def _turn(self) -> str:
        """Functionary: what follows the mark of a message."""
        calls = self._marked[_TURN][0]
        return f'"all\\n" | {calls.region("", most=1)}'


def _but(pattern: str, others: Collection[str]) -> str:
    """A terminal for what matches the pattern and none of the others."""
    return " & ".join([slashed(pattern), *(f"~{slashed(other)}" for other in others)])
