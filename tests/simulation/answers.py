"""The model's correct answer to a prompt, and what an application's call saw of it."""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

from broker.protocol.messages import Kind, Params, Piece, PieceKind, Question, Request
from client.errors import BusError
from worker.engines.common.answer_parser import AnswerParser, MarkSplitter, merged
from worker.engines.common.call_families import CallFormat
from worker.engines.common.pieces import PieceText
from worker.engines.common.reasoning import FAMILIES

EMBEDDING = {"embeddings": [[0.5, 0.25]]}
PIECES = [PieceKind.REASONING.value, PieceKind.CALL.value]

NAME_BEGUN = 5003
#: Tokens of a split answer that are marks: of its thought, of a call and the call's name, which is
#: cut in two, and of the arguments' end.
_MARKS = {
    5001: "<think>",
    5002: "</think>",
    NAME_BEGUN: '<tool_call>{"name": "wea',
    5004: 'ther", "arguments": {"x": "',
    5006: '"}}</tool_call>',
}
_CALLS = CallFormat("<tool_call>", {})

DECISIONS = {"answers": {"right": {"type": "noul", "noul": 0.75}}}


def result_of(prompt: str) -> tuple[Kind, dict[str, Any]]:
    """The kind of a request that is answered as a whole, and its answer; every other one is a
    decision."""
    if hashlib.blake2b(prompt.encode()).digest()[0] % 2:
        return Kind.DECIDE, DECISIONS
    return Kind.EMBED, EMBEDDING


def whole_request(prompt: str) -> dict[str, Any]:
    """The fields of the `Request` for that answer."""
    kind, _ = result_of(prompt)
    if kind is Kind.DECIDE:
        return {"kind": kind, "state": prompt, "questions": {"right": Question(type="noul")}}
    return {"kind": kind, "inputs": [prompt]}


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to a prompt, which depends only on prompt, seed and position."""

    prompt: str
    seed: int
    length: int
    #: The token at which the engine fails, and whether that happens only once.
    fails_at: int | None = None
    fails_once: bool = False
    #: What dies at that token: the engine process ("engine") or the whole worker ("worker").
    kills: str = ""

    @classmethod
    def of(cls, request: Request) -> Answer:
        """The answer to a request as it arrived over the wire."""
        if request.kind is Kind.EMBED:
            assert request.inputs is not None
            return cls(str(request.inputs[0]), 0, 0)
        if request.kind is Kind.DECIDE:
            return cls(str(request.state), 0, 0)
        assert request.prompt is not None and request.params.max_tokens is not None
        _, fails_at, how = request.prompt.split("|")
        return cls(
            request.prompt,
            request.params.seed,
            request.params.max_tokens,
            int(fails_at) if fails_at else None,
            how == "once",
            how if how in ("engine", "worker") else "",
        )

    def token(self, position: int) -> int:
        return _tokens(self.prompt, self.seed, self.length)[position]

    def sure_until(self, count: int) -> int:
        """How many of the first `count` tokens have certain text: every fifth id is half a
        character."""
        while count and self.token(count - 1) % 5 == 0:
            count -= 1
        return count

    @property
    def split(self) -> bool:
        """It has a thought and, if it is long enough, a call: every other answer does."""
        return _split(self.prompt, self.length)

    def text(self, count: int) -> str:
        """The text of the first `count` tokens, as the model writes it."""
        return _texts(self.prompt, self.seed, self.length)[count]

    def said(self, count: int) -> list[Piece]:
        """What the first `count` tokens say, as far as it is certain; of all of them, everything.
        Of an answer that is not split, its text."""
        return _said(self.prompt, self.seed, self.length)[count]

    @property
    def whole(self) -> list[Piece]:
        """All that it says."""
        return _said(self.prompt, self.seed, self.length)[self.length + 1]


def splitter(prior_characters: int) -> PieceText:
    """What splits an answer, as an engine does, behind so many characters that were received."""
    parser = AnswerParser(MarkSplitter(FAMILIES["think"].marks))
    calls = _CALLS.parser({"weather": {}}, forced=False)
    return PieceText(parser, Params(), prior_characters, calls=calls)


def _split(prompt: str, length: int) -> bool:
    return length > 2 and hashlib.blake2b(prompt.encode()).digest()[1] % 2 == 0


@functools.lru_cache(maxsize=256)
def _tokens(prompt: str, seed: int, length: int) -> list[int]:
    data = hashlib.shake_128(f"{prompt}/{seed}".encode()).digest(2 * length)
    tokens = [int.from_bytes(data[2 * i : 2 * i + 2]) % 5000 for i in range(length)]
    if _split(prompt, length):
        thought = max(2, length * 3 // 10)
        tokens[0], tokens[thought] = 5001, 5002
        if length >= 8:
            call = thought + 1 + max(1, length // 5)
            tokens[call : call + 2] = NAME_BEGUN, 5004
            tokens[length - 1 - length // 8] = 5006
    return tokens


@functools.lru_cache(maxsize=256)
def _texts(prompt: str, seed: int, length: int) -> list[str]:
    texts = [""]
    for token in _tokens(prompt, seed, length):
        texts.append(texts[-1] + _MARKS.get(token, f"{token} "))
    return texts


@functools.lru_cache(maxsize=256)
def _said(prompt: str, seed: int, length: int) -> list[list[Piece]]:
    answer = Answer(prompt, seed, length)
    if not answer.split:
        texts = [answer.text(answer.sure_until(count)) for count in range(length + 1)]
        return [[Piece("content", text)] if text else [] for text in [*texts, answer.text(length)]]
    text, before = splitter(0), 0
    said: list[list[Piece]] = [[]]
    so_far: list[Piece] = []
    for count in range(1, length + 1):
        sure = answer.text(answer.sure_until(count))
        so_far = merged([*so_far, *text.add(sure[before:], may_stop=True)])
        before = len(sure)
        said.append(so_far)
    rest = text.add(answer.text(length)[before:], may_stop=True)
    return [*said, merged([*so_far, *rest, *text.finish(may_stop=True)])]


@dataclass(slots=True)
class Call:
    """One request of an application, and everything that it saw."""

    request_id: bytes
    answer: Answer
    #: Whether it is answered as a whole, without tokens.
    whole: bool
    priority: int
    #: Seconds that the application needs to read a token; 0 reads at once.
    read_s: float
    #: The application's time limits, seconds.
    total_s: float | None = None
    queue_s: float | None = None
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    said: list[Piece] = field(default_factory=list)
    made_s: float = 0.0
    ended_s: float = 0.0
    #: When it was last queued; its longest time in the queue.
    queued_s: float = math.inf
    waited_s: float = 0.0
    #: When it was last interrupted; its longest time from there to a worker or the end.
    lost_s: float = math.inf
    away_s: float = 0.0
    #: It runs at a worker that has sent nothing yet; how often it was interrupted like this.
    begun: bool = False
    unheard: int = 0
    #: Workers that its client counts as lost while they ran it.
    blamed: set[str] = field(default_factory=set)
    dropped: bool = False
    #: Its client was killed.
    gone: bool = False
    #: "end", or the code of the error.
    outcome: str = ""
    error: BusError | None = None
    result: Any = None
    resumed: int = 0
    #: How often it was preempted by a request of higher priority, or by the turn of another model.
    gave_way: int = 0
    model: str = "model"
    #: How often it was told that its model could not be loaded.
    asked_again: int = 0

    @property
    def name(self) -> str:
        return self.request_id.hex()[:8]
