"""One request on the client's side: what was asked, what has arrived, and when each limit passes.

This state is enough to resume the stream anywhere (SPEC.md section 6.4). Knows nothing of sessions
or sockets; `requests` decides what happens.
"""

from __future__ import annotations

import math
import random
from enum import Enum
from typing import Final

import msgspec

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.messages import BusLimits, EndEvent, Request, Resume, TokensEvent
from client import errors
from client.core.events import RequestMade
from client.errors import DeadlineExceeded

WIRE_GRACE_S: Final = 1.0
"""Added to the client's own limits when they are sent to broker and worker: the caller gets the
client's more precise exception, and they still clean up after a client that is gone."""

EPOCH_STEP_BITS: Final = 36
"""Size of the random part of the step from one epoch to the next. The step is at least 2**36, which
leaves a relay room for its own epochs in between; after a thousand steps the epoch still fits in 47
bits."""


class Phase(Enum):
    """Where a request is."""

    #: In the client, until there is a session with room for it.
    HELD = "held"
    #: In the client, until the back-off of a recovery is over.
    BACKING_OFF = "backing off"
    #: At the broker.
    QUEUED = "queued"
    #: At a worker.
    RUNNING = "running"


class Acceptance(Enum):
    """How a TOKENS event fits what has already arrived."""

    NEXT = "next"
    REPEATED = "repeated"
    #: Something before it is missing, or it overlaps in part: a RESUME is needed.
    GAP = "gap"
    #: The answer came in pieces so far, and this worker does not send pieces.
    UNSPLIT = "unsplit"


NEXT: Final = Acceptance.NEXT
"""Looked up once: an attribute look-up on an enum is too slow to do for every token."""


class Exchange:
    """One open request."""

    __slots__ = (
        "attachments",
        "continued",
        "epoch",
        "epochs",
        "failures",
        "first_token_s",
        "heard_s",
        "held_s",
        "holder",
        "id",
        "lost_alone",
        "lost_workers",
        "made_s",
        "phase",
        "phase_since_s",
        "position",
        "prompt_seen",
        "request",
        "resumed",
        "retry",
        "retry_at_s",
        "route",
        "scheduled_s",
        "sent_before",
        "split",
        "split_known",
        "taken",
        "text_characters",
        "timeout",
        "token_ids",
        "window_limit",
        "window_tokens",
        "worker",
    )

    def __init__(self, made: RequestMade, now_s: float) -> None:
        self.id = made.request_id
        self.request = made.request
        self.attachments = made.attachments
        self.timeout = made.timeout
        self.retry = made.retry
        self.window_tokens = made.window_tokens

        self.phase = Phase.HELD
        self.made_s = now_s
        #: Since when it has been waiting for a session.
        self.held_s = now_s
        self.phase_since_s = now_s
        self.retry_at_s = math.inf
        #: When its entry in the session's timer heap is due.
        self.scheduled_s = math.inf

        #: Whether a REQUEST has been sent; from then on only RESUME is correct.
        self.sent_before = False
        self.epoch = 0
        #: All its epochs so far; an event of any other epoch was never asked for.
        self.epochs = {0}
        #: Recoveries since the last token.
        self.failures = 0
        self.resumed = 0
        #: The least exact way in which a worker went on; empty: exactly.
        self.continued = ""
        self.lost_workers: list[str] = []
        #: Those of `lost_workers` that ran nothing else at the time.
        self.lost_alone: list[str] = []
        self.worker = ""
        #: The worker that ran it last; empty once that worker is known not to have it.
        self.holder = ""
        self.position = 0
        #: Header id of OUTPUT from `worker`; None if unknown.
        self.route: bytes | None = None

        self.token_ids: list[int] = []
        self.text_characters = 0
        self.prompt_seen = False
        #: The text so far came in pieces; it is known whether the present worker sends pieces.
        self.split = False
        self.split_known = False
        self.first_token_s: float | None = None
        #: When this worker sent its last event of this run; None before the first.
        self.heard_s: float | None = None
        #: Tokens that the application has read, and the last window sent.
        self.taken = 0
        self.window_limit = 0
        if made.resume is not None:
            self.sent_before = True
            self.epoch = made.resume.epoch - 1
            self.token_ids = list(made.resume.token_ids)
            self.text_characters = made.resume.text_characters
            self.prompt_seen = made.resume.prompt_seen
            self.split = bool(self.text_characters and self.request.params.pieces)

    # --- sending ---

    def body(self, window_tokens: int, now_s: float, generator: random.Random) -> Request:
        """The body of the REQUEST, or of a RESUME if it was sent before. Each RESUME starts a new
        epoch, which a worker that lost the request cannot guess."""
        if self.sent_before:
            self.epoch += (1 << EPOCH_STEP_BITS) + generator.getrandbits(EPOCH_STEP_BITS)
            self.epochs.add(self.epoch)
        self.sent_before = True
        self.route = None
        self.split_known = False
        self.window_limit = max(self.taken, len(self.token_ids)) + window_tokens
        resume = None
        if self.epoch:
            resume = Resume(
                epoch=self.epoch,
                token_ids=self.token_ids,
                text_characters=self.text_characters,
                prompt_seen=self.prompt_seen,
                lost_workers=self.lost_workers,
                lost_alone=self.lost_alone,
                holder=self.holder,
            )
        request = self.request
        if self.text_characters and not self.split and request.params.pieces:
            # It began as plain text, so every later worker continues it as plain text.
            whole = msgspec.structs.replace(request.params, pieces=[])
            request = msgspec.structs.replace(request, params=whole)
        return msgspec.structs.replace(
            request,
            window=self.window_limit,
            resume=resume,
            queue_ms=_wire_ms(self.timeout.queue),
            ttl_ms=_wire_ms(self._total_due_s() - now_s),
        )

    def beyond(self, bounds: BusLimits, body_bytes: int) -> ErrorInfo | None:
        """The error if the request exceeds a limit of the broker; found here, because ZeroMQ would
        cut the connection."""
        sizes = [len(data) for data in self.attachments]
        for what, size, limit in (
            ("the request without its images", body_bytes, bounds.request_bytes),
            ("the largest image", max(sizes, default=0), bounds.attachment_bytes),
            ("all images together", sum(sizes), bounds.attachments_bytes),
        ):
            if size > limit:
                return ErrorInfo(
                    code=ErrorCode.TOO_LARGE.value,
                    message=f"{what}: {size} bytes; this broker takes {limit}. Send less",
                    details={"size_bytes": size, "limit_bytes": limit},
                )
        if len(sizes) > bounds.attachments:
            return ErrorInfo(
                code=ErrorCode.TOO_LARGE.value,
                message=f"{len(sizes)} images; this broker takes {bounds.attachments} at a time",
                details={"count": len(sizes), "limit": bounds.attachments},
            )
        return None

    @property
    def backoff_ceiling_s(self) -> float:
        """Upper bound of the random wait before the next recovery."""
        doubled_s = self.retry.backoff_first * 2.0 ** min(self.failures - 1, 32)
        return min(doubled_s, self.retry.backoff_longest)

    def enter(self, phase: Phase, now_s: float) -> None:
        """Go to another phase."""
        self.phase = phase
        self.phase_since_s = now_s
        self.heard_s = None
        if phase is Phase.HELD:
            self.held_s = now_s

    # --- receiving ---

    def accept(self, event: TokensEvent, now_s: float) -> Acceptance:
        """Accept a TOKENS event of the current epoch if it continues the answer."""
        have = len(self.token_ids)
        if event.offset != have:
            repeated = event.offset + len(event.token_ids) <= have and event.offset < have
            return Acceptance.REPEATED if repeated else Acceptance.GAP
        if not (self.split_known or self.splits_like_before(event)):
            return Acceptance.UNSPLIT
        self.token_ids += event.token_ids
        if event.pieces is None:
            self.text_characters += len(event.text)
        else:
            self.text_characters += sum([len(piece.text) for piece in event.pieces])
        self.failures = 0
        self.heard_s = now_s
        if self.first_token_s is None:
            self.first_token_s = now_s - self.made_s
        return NEXT

    def splits_like_before(self, event: TokensEvent | EndEvent) -> bool:
        """Whether the worker sends pieces if the ones before it did. The first event with text from
        each worker decides (SPEC.md section 4.3)."""
        if self.split_known or not (event.text or event.pieces):
            return True
        if self.text_characters and self.split and event.pieces is None:
            return False
        self.split = self.split or event.pieces is not None
        self.split_known = True
        return True

    # --- time ---

    def due_s(self, ready: bool) -> float:
        """When the next limit passes; `ready` says whether there is a session."""
        return min(self._total_due_s(), self.phase_due_s(ready))

    def phase_due_s(self, ready: bool) -> float:
        """When the limit of the current phase passes."""
        limits = self.timeout
        match self.phase:
            case Phase.HELD:
                if self.sent_before and not ready:
                    return self.held_s + self.retry.reconnect
                if not ready or not self.request.model:
                    return _after(self.held_s, limits.connect)
                return _after(self.held_s, limits.queue)
            case Phase.BACKING_OFF:
                return self.retry_at_s
            case Phase.QUEUED:
                return _after(self.phase_since_s, limits.queue)
            case Phase.RUNNING:
                if len(self.token_ids) >= self.window_limit:
                    return math.inf  # the worker may not send until the application reads
                if self.heard_s is None:
                    return _after(self.phase_since_s, limits.first_token)
                return _after(self.heard_s, limits.between_tokens)

    def _total_due_s(self) -> float:
        return _after(self.made_s, self.timeout.total)

    def overdue(self, now_s: float) -> tuple[type[DeadlineExceeded], str]:
        """The exception and message for the limit that has passed while there is a session."""
        limits = self.timeout
        if now_s >= self._total_due_s():
            advice = "Ask for fewer tokens or more time"
            if self.phase is not Phase.RUNNING:
                advice = "No worker took it: `python -m client workers` shows whether one is free"
            return (
                errors.TotalTimeout,
                f"no complete answer within {limits.total:g} s (Timeout.total); "
                f"{len(self.token_ids)} tokens had arrived. {advice}",
            )
        if self.phase is Phase.RUNNING and self.heard_s is None:
            return (
                errors.FirstTokenTimeout,
                f"worker {self.worker!r} took the request but sent nothing within "
                f"{limits.first_token:g} s (Timeout.first_token); is its prompt very long, "
                "or the worker stalled? `python -m client workers` shows it",
            )
        if self.phase is Phase.RUNNING:
            return (
                errors.TokenTimeout,
                f"worker {self.worker!r} sent no token for {limits.between_tokens:g} s "
                f"(Timeout.between_tokens) after {len(self.token_ids)} tokens",
            )
        return (
            errors.QueueTimeout,
            f"no worker took the request within {limits.queue:g} s (Timeout.queue); it was number "
            f"{self.position} in the queue. Wait longer, or start another worker",
        )


def _after(start_s: float, limit_s: float | None) -> float:
    return math.inf if limit_s is None else start_s + limit_s


def _wire_ms(limit_s: float | None) -> int | None:
    if limit_s is None or math.isinf(limit_s):
        return None
    return max(0, math.ceil((limit_s + WIRE_GRACE_S) * 1000))
