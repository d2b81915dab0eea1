"""One answer of a server that returns text: from the server's chunks to the events of the bus.

What the server sends, whether it splits off thoughts and calls or not, becomes the pieces that the
client asked for, with token ids that carry them (`text_ids`). An answer that another worker began
is continued in one of two ways: the server continues its text, if it can; or the server writes it
again from the beginning, and only what follows the client's part is passed on. If that part comes
out differently, the request fails: two answers are never joined. Must never open a connection.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from broker.protocol.errors import ErrorCode, ErrorInfo, RequestError
from broker.protocol.messages import (
    FinishReason,
    Kind,
    Piece,
    PieceKind,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from broker.protocol.tool_parser import ToolCallParser
from worker.engines.base import Ended, EngineEvent, Failed, Job, PromptFacts, Tokens, check_received
from worker.engines.common.answer_parser import PieceParser, merged, unsplit
from worker.engines.common.calls import DetectedCalls
from worker.engines.common.pieces import PieceText
from worker.engines.common.reasoning import AnswerFormat, Begun
from worker.engines.common.typed_arguments import forces_calls, said_before, tools_asked_for
from worker.engines.openai import text_ids

__all__ = ["TextAnswer"]

_CONTENT: Final = PieceKind.CONTENT.value
_REASONING: Final = PieceKind.REASONING.value
_CALL: Final = PieceKind.CALL.value
_ARGUMENTS: Final = PieceKind.ARGUMENTS.value

_REASONS: Final = {"length": FinishReason.LENGTH}
_ENDED_BY_FAULT: Final = ("abort", "error")
"""Finish reasons of a server that gave up the request."""

_UNKNOWN_ID: Final = text_ids.hashed(b"")


class _Given:
    """Pieces as the server split them, and its content as the model's own marks split it."""

    def __init__(self, inner: PieceParser) -> None:
        self._inner = inner
        self._pieces: list[Piece] = []

    def put(self, pieces: list[Piece]) -> None:
        """Add the server's pieces; `feed` returns them."""
        for piece in pieces:
            self._pieces += self._inner.feed(piece.text) if piece.kind == _CONTENT else [piece]

    @property
    def in_thought(self) -> bool:
        return self._inner.in_thought

    def feed(self, text: str) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def finish(self) -> list[Piece]:
        return self._inner.finish()


class TextAnswer:
    """One request at a server that returns text."""

    def __init__(self, job: Job, format_: AnswerFormat | None, *, server: str, manner: str) -> None:
        """`manner`: how the server continues a message in a chat; empty: it cannot. Raises
        RequestError if the answer so far cannot be resumed."""
        request, params = job.request, job.request.params
        self.request_id = job.request_id
        self._server = server
        self._params = params
        self._chat = request.kind is Kind.CHAT
        self._wants_thoughts = PieceKind.REASONING in params.pieces
        tools = tools_asked_for(request)
        self._wants_calls = bool(tools)
        self.stopped_by: str | None = None
        self.reason: FinishReason | None = None
        self._ended_by: str | int | None = None
        self._usage: Mapping[str, Any] = {}
        self._chunks = 0
        #: Number of tokens for which ids have been sent.
        self._counted = 0
        self._added_s = self._first_s = time.monotonic()
        resume = request.resume
        prior = resume.token_ids if resume is not None else []
        received = resume.text_characters if resume is not None else 0
        self._prior = _prior(prior)
        #: Hashes of the tokens that must come again.
        self._hashes = list(prior) if text_ids.is_hashed(prior) else []
        length = sum(len(piece.text) for piece in self._prior)
        if not self._hashes and not tools:  # arguments are JSON, which may be longer
            check_received(received, length)
        self.spent = text_ids.tokens(prior)
        self.prefix = "".join(piece.text for piece in self._prior)
        can = bool(manner) if self._chat else request.prompt is not None
        by_text = can and not self._hashes and self._only_text(request, tools)
        #: Whether the server writes the answer again from the beginning, not on from `prefix`.
        self.anew = bool(prior) and not by_text
        #: The pieces that must come again.
        self._expected = list(self._prior) if self.anew else []
        if self.anew:
            self.prefix, self.spent = "", 0
        split = format_ is not None and self._wants_thoughts
        inner = format_.parser(Begun("")) if split and format_ is not None else unsplit()
        self._given = _Given(inner)
        calls = None
        if tools:
            calls = DetectedCalls(
                ToolCallParser(tools, forced=forces_calls(request), said=said_before(request))
            )
        self._text = PieceText(
            self._given,
            params,
            received,
            calls=calls,
            single=bool(tools) and not request.parallel_tool_calls,
        )
        self._splits = split or self._wants_thoughts or bool(tools)
        #: Whether a call or a thought is open in a text that is not split.
        self._open_call = False
        self._open_thought = False
        self._calls_seen = -1
        self._start: list[EngineEvent] = []
        owes_prompt = not (resume is not None and resume.prompt_seen)
        #: Whether the prompt's number of tokens is still to be sent before the answer.
        self._owes_usage = owes_prompt and params.prompt_usage
        if owes_prompt and params.keep_special and not self._owes_usage:
            self._start.append(PromptFacts(self.request_id, []))
        if self._owes_usage and self._prior:
            # The server will count the text that it continues as part of the prompt.
            self._start += self._prompt_facts(None)
        if self._prior:
            self._start += self._told([], self._passed(self._prior))

    def _only_text(self, request: Any, tools: Mapping[str, Any]) -> bool:
        """Whether the rest of the answer depends only on the text so far, as the server sees it."""
        params = self._params
        return (
            all(piece.kind == _CONTENT for piece in self._prior)
            # Marks of ours or of the model, which the server would take for content.
            and not any(mark in self.prefix for mark in ("<think>", "<tool_call>"))
            and not request.tools
            and not tools
            and params.constraint is None
            and params.logprobs is None
            and not params.presence_penalty
            and not params.frequency_penalty
            and not params.min_tokens
        )

    # --- what comes -------------------------------------------------------------------------------

    def begin(self) -> list[EngineEvent]:
        """The events due before the server sends anything; with the end if the answer is
        complete."""
        events, self._start = self._start, []
        if self.over or (self.spent and self.spent >= (self._params.max_tokens or 1 << 60)):
            self.reason = FinishReason.STOP if self.over else FinishReason.LENGTH
            events += self.end()
        return events

    @property
    def over(self) -> bool:
        """Whether a stop string or the only call allowed has ended the answer."""
        return self._text.stopped_by is not None or self._text.called

    def take(self, data: Mapping[str, Any]) -> list[EngineEvent]:
        """Take a chunk of the server's. Raises RequestError if the answer cannot go on."""
        if isinstance(data.get("usage"), Mapping):
            self._usage = data["usage"]
        events = self._take(data)
        if not self._owes_usage:
            return events
        usage = _prompt_usage(data)
        return [*self._prompt_facts(usage), *events] if events or usage else events

    def _prompt_facts(self, usage: Usage | None) -> list[EngineEvent]:
        """What is known of the prompt before the answer; many servers do not report its tokens."""
        self._owes_usage = False
        return [PromptFacts(self.request_id, [], usage=usage)]

    def _take(self, data: Mapping[str, Any]) -> list[EngineEvent]:
        choices = data.get("choices")
        if not choices:
            return []
        choice = choices[0]
        delta = choice.get("delta") or choice.get("message") or {}
        pieces = self._pieces_of(delta if self._chat else {"content": choice.get("text")})
        reason = choice.get("finish_reason")
        if reason in _ENDED_BY_FAULT:
            raise RequestError(
                ErrorCode.WORKER_LOST,
                f"the server at {self._server} gave up the request ({reason})",
                retryable=True,
            )
        if reason:
            self.reason = _REASONS.get(reason, FinishReason.STOP)
            by = choice.get("stop_reason", choice.get("matched_stop"))
            self._ended_by = by if isinstance(by, str | int) else None
            pieces += self._closed()
        logprobs = choice.get("logprobs") if self._params.logprobs is not None else None
        if self._params.logprobs is not None:
            return self._with_logprobs(pieces, _logprobs(logprobs, self._params.logprobs))
        if not pieces:
            return []
        tokens = self._count()
        fresh = self._new(pieces)
        return self._told(text_ids.encoded(fresh, tokens), self._passed(fresh)) if fresh else []

    def _count(self) -> int:
        """Number of tokens since the last text if the server reports usage as it goes, else 1."""
        if not self._chunks:
            self._first_s = time.monotonic()
        self._chunks += 1
        counted = _count(self._usage.get("completion_tokens"))
        fresh = max(1, counted - self._counted)
        self._counted = max(counted, self._counted + 1)
        return fresh

    def _with_logprobs(
        self, pieces: list[Piece], logprobs: list[TokenLogprob]
    ) -> list[EngineEvent]:
        ids = [text_ids.hashed(logprob.token) for logprob in logprobs]
        if ids:
            self._count()
        again = min(len(ids), len(self._hashes))
        if ids[:again] != self._hashes[:again]:
            raise self._differs(self._chunks)
        del self._hashes[:again]
        passed = self._passed(pieces)
        return self._told(ids[again:], passed, logprobs[again:]) if ids[again:] or passed else []

    def _new(self, pieces: list[Piece]) -> list[Piece]:
        """The part of these that the client does not have; the rest is compared with what it has.
        Raises RequestError if that differs."""
        fresh: list[Piece] = []
        for piece in pieces:
            text = piece.text
            if self._expected:
                first = self._expected[0]
                common = min(len(first.text), len(text))
                if first.kind != piece.kind or first.text[:common] != text[:common]:
                    raise self._differs(sum(len(p.text) for p in self._prior))
                if common == len(first.text):
                    self._expected.pop(0)
                else:
                    self._expected[0] = Piece(first.kind, first.text[common:])
                text = text[common:]
            if text:
                fresh.append(Piece(piece.kind, text))
        return fresh

    def _differs(self, characters: int) -> RequestError:
        return RequestError(
            ErrorCode.WORKER_LOST,
            f"the answer cannot be continued: the server at {self._server} was asked again, and "
            f"its new answer differs from the part already received ({characters} characters or "
            "tokens), which stands; ask again for a whole answer",
        )

    def _pieces_of(self, delta: Mapping[str, Any]) -> list[Piece]:
        """A delta as pieces, in the order in which models write them."""
        pieces: list[Piece] = []
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(thought, str) and thought:
            pieces.append(Piece(_REASONING, _clean(thought)))
        content = delta.get("content")
        if isinstance(content, str) and content:
            pieces.append(Piece(_CONTENT, _clean(content)))
        for position, call in enumerate(delta.get("tool_calls") or ()):
            function = call.get("function") or {}
            index = call.get("index")
            index = position if index is None else index
            if function.get("name") and index != self._calls_seen:
                self._calls_seen = index
                pieces.append(Piece(_CALL, _clean(function["name"])))
            arguments = function.get("arguments")
            if isinstance(arguments, Mapping):  # some servers parse them
                import json

                arguments = json.dumps(arguments)
            if arguments:
                pieces.append(Piece(_ARGUMENTS, _clean(arguments)))
        return self._marked(pieces)

    def _marked(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces, with thoughts and calls turned into marked text if the client wants one
        text."""
        marked: list[Piece] = []
        for piece in pieces:
            if piece.kind == _REASONING and not self._wants_thoughts:
                opening = "" if self._open_thought else "<think>\n"
                self._open_thought = True
                marked.append(Piece(_CONTENT, opening + piece.text))
                continue
            if self._open_thought:
                self._open_thought = False
                marked.append(Piece(_CONTENT, "\n</think>\n\n"))
            if piece.kind == _CALL and not self._wants_calls:
                closing = self._close_call()
                name = piece.text.replace("\\", "\\\\").replace('"', '\\"')
                opening = f'<tool_call>\n{{"name": "{name}", "arguments": '
                self._open_call = True
                marked.append(Piece(_CONTENT, closing + opening))
            elif piece.kind == _ARGUMENTS and not self._wants_calls:
                marked.append(Piece(_CONTENT, piece.text))
            else:
                marked.append(piece)
        return merged_text(marked)

    def _close_call(self) -> str:
        closing = "}\n</tool_call>\n" if self._open_call else ""
        self._open_call = False
        return closing

    def _closed(self) -> list[Piece]:
        """The marks that close what is open at the end of a text that is not split."""
        text = "\n</think>\n\n" if self._open_thought else ""
        self._open_thought = False
        text += self._close_call()
        return [Piece(_CONTENT, text)] if text else []

    # --- what goes out ----------------------------------------------------------------------------

    def _passed(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces after stop strings, calls and what the client has already are dealt with."""
        self._given.put(pieces)
        return self._text.add("", may_stop=True)

    def _told(
        self, ids: list[int], pieces: list[Piece], logprobs: list[TokenLogprob] | None = None
    ) -> list[EngineEvent]:
        if not ids and not pieces:
            return []
        text, split = self._event(pieces)
        return [Tokens(self.request_id, ids, text, logprobs, split)]

    def _event(self, pieces: list[Piece]) -> tuple[str, list[Piece] | None]:
        if self._splits:
            return self._text.event(pieces)
        return "".join(piece.text for piece in pieces), None

    def end(self) -> list[EngineEvent]:
        """The events that end the answer. Raises RequestError if it is not complete."""
        reason = FinishReason.STOP if self.over else self.reason
        if reason is None:
            raise RequestError(
                ErrorCode.WORKER_LOST,
                f"the server at {self._server} ended the answer without a finish reason",
                retryable=True,
            )
        if (self._expected or self._hashes) and not self.over:
            raise self._differs(sum(len(piece.text) for piece in self._prior))
        rest = [] if self.over else self._text.finish(may_stop=True)
        text, split = self._event(rest)
        stopped_by = self._text.stopped_by or self._ended_by
        return [
            *(self._prompt_facts(None) if self._owes_usage else []),
            Ended(
                self.request_id,
                reason,
                text,
                self.usage(),
                self.timings(),
                None,
                stopped_by,
                split,
            ),
        ]

    def cancelled(self) -> list[EngineEvent]:
        """The events of a cancelled request."""
        return [Ended(self.request_id, FinishReason.CANCELLED, usage=self.usage())]

    def failed(self, error: ErrorInfo) -> list[EngineEvent]:
        """The events of a failed request."""
        return [Failed(self.request_id, error, self.usage())]

    def usage(self) -> Usage:
        """The usage as the server counts it. If the server continued a text, it counts that text as
        part of the prompt."""
        usage = self._usage
        details = usage.get("prompt_tokens_details") or {}
        thoughts = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
        completion = usage.get("completion_tokens")
        return Usage(
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=self._chunks if completion is None else _count(completion),
            reasoning_tokens=_count(thoughts),
            cached_tokens=_count(details.get("cached_tokens")),
        )

    def timings(self) -> Timings:
        """The timings as seen from here; time in the server's queue counts as prefill."""
        now_s = time.monotonic()
        first_s = self._first_s if self._chunks else now_s
        return Timings(
            prefill_ms=(first_s - self._added_s) * 1000, decode_ms=(now_s - first_s) * 1000
        )


# --- helpers --------------------------------------------------------------------------------------


def _prior(ids: list[int]) -> list[Piece]:
    if not ids or text_ids.is_hashed(ids):
        return []
    try:
        return text_ids.decoded(ids)
    except ValueError as error:
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"the tokens to resume from are not those of a server that returns text: {error}",
        ) from None


def merged_text(pieces: list[Piece]) -> list[Piece]:
    """The pieces with neighbours of the same kind merged, unless there are calls among them."""
    if any(piece.kind == _CALL for piece in pieces):
        return pieces
    return merged(pieces)


def _clean(text: str) -> str:
    """The text without lone surrogates, which UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _prompt_usage(data: Mapping[str, Any]) -> Usage | None:
    """The prompt's tokens, if a chunk reports them: in its usage, or in llama.cpp's timings."""
    usage = data.get("usage")
    if isinstance(usage, Mapping) and _count(usage.get("prompt_tokens")):
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Usage(prompt_tokens=usage["prompt_tokens"], cached_tokens=_count(cached))
    timings = data.get("timings")
    if not isinstance(timings, Mapping) or "cache_n" not in timings:
        return None  # older servers leave out tokens that were in their cache
    cached = _count(timings["cache_n"])
    return Usage(prompt_tokens=_count(timings.get("prompt_n")) + cached, cached_tokens=cached)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _logprobs(told: Any, most: int) -> list[TokenLogprob]:
    """The logprobs of a chunk, in either form of OpenAI's API."""
    if not isinstance(told, Mapping):
        return []
    if isinstance(told.get("content"), list):
        return [
            TokenLogprob(
                entry.get("logprob"),
                _bytes(entry),
                [
                    TopLogprob(_UNKNOWN_ID, top["logprob"], _bytes(top))
                    for top in (entry.get("top_logprobs") or ())[:most]
                ],
            )
            for entry in told["content"]
        ]
    tokens = told.get("tokens") or []
    values = told.get("token_logprobs") or [None] * len(tokens)
    tops = told.get("top_logprobs") or [None] * len(tokens)
    return [
        TokenLogprob(
            value,
            token.encode("utf-8", "replace"),
            [
                TopLogprob(_UNKNOWN_ID, logprob, text.encode("utf-8", "replace"))
                for text, logprob in sorted((top or {}).items(), key=lambda pair: -pair[1])[:most]
            ],
        )
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]


def _bytes(entry: Mapping[str, Any]) -> bytes:
    data = entry.get("bytes")
    if isinstance(data, list):
        return bytes(data)
    return str(entry.get("token", "")).encode("utf-8", "replace")
