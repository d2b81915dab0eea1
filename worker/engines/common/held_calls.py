"""Which grammar constrains an answer's calls: those that `tool_choice` forces, and `strict` ones.

A model is held to its own form of calls: the one its chat template shows, else the usual one for
the mark that begins its calls; either only if the model's own parser reads it back. If no form
serves, a forced call is held to JSON by the client's constraint, and a strict one is refused. The
grammar depends on the request and the model alone, so that an interrupted answer continues under
the same one. Must never import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Constraint, Request
from worker.engines.common.call_families import CallFormat
from worker.engines.common.call_forms import Form, Read, reads_back, shown_form, table_forms
from worker.engines.common.call_grammar import Unsayable, Vocabulary, awaited, forced
from worker.engines.common.reasoning import AddedTokens
from worker.engines.common.typed_arguments import Tools, forces_calls, strict_tools

__all__ = ["Held", "HeldCalls"]

#: What begins calls in answers of models of unknown families (`ToolCallParser`).
_DETECTED: Final = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{")


@dataclass(frozen=True, slots=True)
class Held:
    """A grammar for an answer with calls."""

    constraint: Constraint
    #: Whether the answer consists of calls only.
    forced: bool
    #: Whether the grammar includes thoughts, and so applies from the first token on.
    whole: bool


@dataclass(frozen=True, slots=True)
class Known:
    """How a model writes calls."""

    #: Its own form; None: unknown.
    own: Form | None
    #: All forms that its parser reads, by the mark that begins them; its own first.
    forms: Mapping[str, tuple[Form, ...]]


class HeldCalls:
    """Grammars for the calls of one model.

    `probed` renders turns with its chat template; `read` returns the calls that its parser finds.
    `template` is the source of the chat template; `opens` begins calls in its response template, if
    that reads them.
    """

    def __init__(
        self,
        calls: CallFormat,
        added: AddedTokens,
        *,
        template: str,
        probed: Callable[[list[dict[str, Any]]], str | None],
        read: Read,
        opens: str = "",
    ) -> None:
        self._calls = calls
        self._added = added
        self._template = template
        self._probed = probed
        self._read = read
        self._opens = opens
        self._lock = Lock()
        self._found: Known | None = None

    def held(
        self, request: Request, tools: Tools, *, end_ids: frozenset[int], tail: str
    ) -> Held | None:
        """The grammar of an answer to a request with these tools; None: it needs none, or the
        client's own constraint governs a forced call. `tail`: the end of the prompt. Raises
        RequestError for a strict tool that cannot be enforced."""
        vocabulary = Vocabulary(self._added, end_ids)
        if forces_calls(request):
            return self._forced(request, tools, vocabulary, tail)
        strict = strict_tools(request)
        if not strict or not tools:
            return None
        if request.params.constraint is not None:
            raise _refused(
                "the request's constraint already says what the answer must be: leave one of the "
                "two out"
            )
        forms = self.known().forms
        if not forms:
            raise _refused(
                f"how model {request.model} writes calls is unknown: leave `strict` out, or force "
                "a call with tool_choice"
            )
        try:
            lark = awaited(forms, tools, strict, vocabulary, tail=tail)
        except Unsayable as error:
            style = next(iter(forms.values()))[0].style
            how = "" if style == "json" else f"model {request.model} does not call in JSON; "
            raise _refused(f"{how}{error}: leave `strict` out, or change the schema") from None
        return self._made(lark, forced=False)

    def _forced(
        self, request: Request, tools: Tools, vocabulary: Vocabulary, tail: str
    ) -> Held | None:
        form = self.known().own
        named = _named(request.tool_choice)
        called = {name: tools[name] for name in ([named] if named else tools) if name in tools}
        if form is None or not called:
            return None
        single = named is not None or not request.parallel_tool_calls
        try:
            lark = forced(form, called, vocabulary, single=single, tail=tail)
        except Unsayable:
            return None
        return self._made(lark, forced=True)

    def _made(self, lark: str, *, forced: bool) -> Held:
        whole = "<|channel|>" in self.known().forms
        return Held(Constraint(type="grammar", value=lark), forced, whole)

    def known(self) -> Known:
        """How the model writes calls; found out once."""
        with self._lock:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> Known:
        is_family = self._calls.known or bool(self._opens)
        marks = list(self._calls.marks if is_family else _DETECTED)
        # Marks in the template are the model's own; some vocabularies have those of other models.
        marks.sort(key=lambda mark: mark not in self._template)
        own, forms = self._own(), dict[str, tuple[Form, ...]]()
        if own is not None:
            begins = [mark for mark in (*marks, self._opens) if mark and own.opens.startswith(mark)]
            if begins:
                forms[max(begins, key=len)] = (own,)
            else:
                own = None
        for mark in marks:
            usual = table_forms(mark, self._shows)
            usual = tuple(form for form in usual if reads_back(form, self._read))
            if usual and mark not in forms:
                forms[mark] = usual
                own = usual[0] if own is None and is_family else own
        return Known(own, forms)

    def _own(self) -> Form | None:
        """The form that the chat template shows."""
        known = {mark for mark in self._calls.special}
        stops = [
            text for text, (_, special) in self._added.items() if special and text not in known
        ]
        form = shown_form(self._probed, (*self._calls.marks, self._opens), stops)
        return form if form is not None and reads_back(form, self._read) else None

    def _shows(self, text: str) -> bool:
        return text in self._template or text in self._added


def _named(choice: Any) -> str | None:
    """The tool that `tool_choice` names."""
    if not isinstance(choice, Mapping):
        return None
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _refused(why: str) -> RequestError:
    return RequestError(
        ErrorCode.INVALID_REQUEST,
        f"a strict tool cannot be enforced: {why}",
        details={"parameter": "tools"},
    )
