"""One request that the echo engine answers: its next tokens, and how its answer ends.

Must depend on nothing but the request and the tokens so far, except in its timings. Must never
import torch.
"""

from __future__ import annotations

import time
import zlib
from typing import Final

import msgspec

from broker.protocol.messages import FinishReason, Piece, PieceKind, Timings, Usage
from broker.protocol.tool_parser import ToolCallParser
from worker.engines.base import Job, check_received
from worker.engines.common.answer_parser import unsplit
from worker.engines.common.calls import DetectedCalls
from worker.engines.common.pieces import PieceText
from worker.engines.common.reasoning import AnswerFormat, Begun
from worker.engines.common.typed_arguments import forces_calls, said_before, tools_asked_for
from worker.engines.echo.tokens import (
    Text,
    sampled_token,
    sampled_tokens,
    thought,
    tokenize,
    within_budget,
)

__all__ = ["FAULTS", "Options", "Run", "end_of"]


class Options(msgspec.Struct, frozen=True):
    """Options of one request; `worker.engines.echo.engine` describes them."""

    mode: str = "echo"
    answer_tokens: int = 64
    think_tokens: int = 0
    tokens_per_step: int = 1
    step_delay_ms: float = 0.0
    prefill_ms: float = 0.0
    error_at: int = -1
    oom_at: int = -1
    raise_at: int = -1
    hang_at: int = -1
    exit_at: int = -1
    kill_at: int = -1
    fault_resumed: int = 0


FAULTS: Final = ("error_at", "oom_at", "raise_at", "hang_at", "exit_at", "kill_at")


class Run:
    """A request that is being answered."""

    __slots__ = (
        "added_s",
        "answer",
        "drawn",
        "drawn_from",
        "end_at",
        "fault_at",
        "image_tokens",
        "limit",
        "options",
        "params",
        "pieces",
        "plain",
        "position",
        "prefill_until_s",
        "prompt_hash",
        "prompt_ids",
        "reasoning_tokens",
        "request_id",
        "said",
        "said_pieces",
        "skip",
        "started_s",
        "text",
        "thought",
    )

    def __init__(
        self,
        job: Job,
        options: Options,
        prompt: str,
        prompt_ids: list[int],
        prefix: str,
        format_: AnswerFormat | None,
    ) -> None:
        request, params = job.request, job.request.params
        self.request_id = job.request_id
        self.options = options
        self.params = params
        self.prompt_ids = prompt_ids
        self.prompt_hash = zlib.crc32(prompt.encode("utf-8", "surrogatepass"))
        #: The tokens of the echo; None if tokens are sampled.
        self.answer: list[int] | None = None
        #: Tokens of the thought before a sampled answer, including its marks; -1 for each word.
        self.thought: list[int] = []
        if options.mode == "echo":
            said = within_budget(prefix + prompt, params.thinking_tokens)
            self.answer = [*params.forced_token_ids, *tokenize(said)]
            length = len(self.answer)
        else:
            self.thought = thought(options.think_tokens, params.thinking_tokens)
            length = len(self.thought) + options.answer_tokens
        #: The answer's natural end, and the last token in any case.
        self.end_at = max(length, params.min_tokens)
        self.limit = params.max_tokens if params.max_tokens is not None else 1 << 30
        if params.ignore_eos:
            self.end_at = 1 << 30
        prior = request.resume.token_ids if request.resume else []
        tools = tools_asked_for(request)
        #: Splits the answer into pieces; None if it is one text.
        self.pieces: PieceText | None = None
        splits = format_ is not None and PieceKind.REASONING in params.pieces
        if splits or tools:
            received = request.resume.text_characters if request.resume else 0
            calls = None
            if tools:
                forced, said = forces_calls(request), said_before(request)
                detector = ToolCallParser(tools, forced=forced, said=said)
                calls = DetectedCalls(detector)
            self.pieces = PieceText(
                format_.parser(Begun("")) if splits and format_ is not None else unsplit(),
                params,
                received,
                calls=calls,
                single=not request.parallel_tool_calls,
            )
        self.text = Text([] if self.pieces else params.stop, params.include_stop)
        #: Text and pieces that are in no event yet.
        self.said = ""
        self.said_pieces: list[Piece] = []
        self.reasoning_tokens = 0
        #: How many characters of the text to come the client has already.
        self.skip = request.resume.text_characters if request.resume else 0
        if self.skip:
            check_received(self.skip, len(Text([], include_stop=False).push(prior)))
        self.position = 0
        faults = not prior or options.fault_resumed
        self.fault_at = {
            at: name for name in FAULTS if faults and (at := getattr(options, name)) >= 0
        }
        #: Only words are drawn, so many can be drawn at once, up to the end of the answer.
        self.plain = (
            self.answer is None
            and not (params.forced_token_ids or params.stop_token_ids or self.fault_at)
            and params.logprobs is None
            and (self.pieces is None or self.pieces.plain)
            and not self.thought
        )
        #: Tokens drawn ahead, and the position of the first.
        self.drawn: list[int] = []
        self.drawn_from = 0
        self.image_tokens = 0
        self.added_s = self.started_s = time.monotonic()
        self.prefill_until_s = self.added_s + options.prefill_ms / 1000

    def token_at(self, position: int) -> int:
        """The answer's token at a position."""
        if self.answer is None:
            forced = self.params.forced_token_ids
            if position < len(forced):
                return forced[position]
            if position < len(self.thought) and self.thought[position] >= 0:
                return self.thought[position]
            return sampled_token(self.params.seed, self.prompt_hash, position)
        return self.answer[position % len(self.answer)] if self.answer else ord(".")

    def draw(self, count: int) -> list[int]:
        """Draw the next tokens of a sampled answer and advance by them."""
        at = self.position - self.drawn_from
        ids = self.drawn[at : at + count]
        while len(ids) < count:
            self.drawn_from = self.position + len(ids)
            self.drawn = sampled_tokens(self.params.seed, self.prompt_hash, self.drawn_from)
            ids += self.drawn[: count - len(ids)]
        self.position += count
        return ids

    def visible(self, text: str) -> str:
        """The text without what the client has already."""
        if self.skip:
            hidden = min(self.skip, len(text))
            self.skip -= hidden
            return text[hidden:]
        return text

    @property
    def over(self) -> bool:
        """Whether a stop string or the only call allowed has ended the answer."""
        return self.stopped_by is not None or (self.pieces is not None and self.pieces.called)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer."""
        return self.text.stopped_by if self.pieces is None else self.pieces.stopped_by

    def say(self, token: int) -> None:
        """Append the answer's next token."""
        self.position += 1
        text = self.text.push([token])
        if self.pieces is None:
            self.said += self.visible(text)
            return
        thinks = self.pieces.in_thought
        self.said_pieces += self.pieces.add(text, may_stop=True)
        self.reasoning_tokens += thinks or self.pieces.in_thought

    def end(self) -> None:
        """End the answer, with the text that was held back."""
        if self.over:
            return
        text = self.text.finish()
        if self.pieces is None:
            self.said += self.visible(text)
        else:
            self.said_pieces += self.pieces.add(text, may_stop=True)
            self.said_pieces += self.pieces.finish(may_stop=True)

    def taken(self) -> tuple[str, list[Piece] | None]:
        """Take what has come since the last event: its content, and all of it by kind."""
        text, pieces = self.said, self.said_pieces
        self.said, self.said_pieces = "", []
        return (text, None) if self.pieces is None else self.pieces.event(pieces)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=self.position,
            reasoning_tokens=self.reasoning_tokens,
            image_tokens=self.image_tokens,
        )

    def timings(self) -> Timings:
        now_s = time.monotonic()
        return Timings(
            queue_ms=(self.started_s - self.added_s) * 1000,
            prefill_ms=self.options.prefill_ms,
            decode_ms=max(0.0, now_s - max(self.started_s, self.prefill_until_s)) * 1000,
        )


def end_of(run: Run, token: int) -> tuple[FinishReason, str | int | None] | None:
    """How the answer ends with this token, and by which stop; None: it continues."""
    if run.over:
        return FinishReason.STOP, run.stopped_by
    if token in run.params.stop_token_ids and run.position >= run.params.min_tokens:
        return FinishReason.STOP, token
    if run.position >= run.end_at:
        return FinishReason.STOP, None
    return (FinishReason.LENGTH, None) if run.position >= run.limit else None
