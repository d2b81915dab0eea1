"""Fair shares between the users of one model, counted in tokens: of prompts and of answers.

Each user has a count of the tokens that it was served, and the user with the smallest count is next
(`queue`). A request is charged when it is assigned, with what it is expected to take, and settled
when it has ended, with what the worker measured: once, however often it moved in between. Who comes
back after a pause begins where the latest turn began, so nobody saves up turns (start-time fair
queueing: Goyal, Vin, Cheng, 1997; for tokens: Sheng et al., "Fairness in serving large language
models", OSDI 2024). What is expected follows what the user's answers had so far.

Each priority counts for itself: what a user's batch took of idle slots is not held against its
other requests. State and arithmetic; no clock, and no rule but this one.
"""

from __future__ import annotations

import math
from typing import Final

from broker.core import pace
from broker.core.phases import Phase
from broker.core.records import RequestState
from broker.core.speed import LEARNT, smooth
from broker.core.state import BusState
from broker.protocol.messages import Finished

PROMPT_BYTES: Final = 4
"""Bytes of a request's body for each token of its prompt, roughly; settled by what was measured."""
ATTACHMENT_TOKENS: Final = 500
"""What an image is taken to have until that was measured."""
ANSWER_TOKENS: Final = 256
"""What an answer is taken to have at most before any has ended."""


def expect(bus: BusState, request: RequestState) -> None:
    """Note what the request should still take, before it is queued."""
    shares = bus.shares_of(request.model)
    body = len(request.frames[0]) - 5 * request.offset  # a RESUME brings the tokens so far
    images = len(request.frames) - 1
    request.prompt_guess = max(1.0, body / PROMPT_BYTES + ATTACHMENT_TOKENS * images)
    prompt = request.prompt_guess * (1.0 if shares.prompt is None else shares.prompt)
    answer = 0.0
    if request.kind in pace.STREAMED:
        most = math.inf if request.most_tokens is None else request.most_tokens
        length = shares.of(request.priority, request.user_key).length
        model = bus.speeds.get(request.model)
        if length is None and model is not None and model.answers >= LEARNT:
            length = model.length(request.most_tokens, 0.0)
        answer = min(most, ANSWER_TOKENS if length is None else length)
        answer = max(answer, request.offset + 1)
    request.expected_tokens = answer
    request.cost = max(1.0, prompt + answer - request.charged)


def charge(bus: BusState, request: RequestState) -> None:
    """A worker begins it."""
    request.charged += request.cost
    request.unsettled = request.cost
    shares = bus.shares_of(request.model)
    share = shares.of(request.priority, request.user_key)
    shares.served(request.priority, share, request.cost)
    _reorder(bus, request)


def measured(bus: BusState, request: RequestState, finished: Finished) -> None:
    """It has ended, and its worker says what it took."""
    if not request.user_key:
        return  # a worker brought it along, and nobody asked for it here
    shares = bus.shares_of(request.model)
    if finished.prompt_tokens and request.prompt_guess:
        ratio = finished.prompt_tokens / request.prompt_guess
        shares.prompt = smooth(shares.prompt, ratio)
    if request.kind in pace.STREAMED and finished.completion_tokens:
        share = shares.of(request.priority, request.user_key)
        share.length = smooth(share.length, finished.completion_tokens)
    _settle(bus, request, finished.prompt_tokens + finished.completion_tokens)


def interrupted(bus: BusState, request: RequestState) -> None:
    """It leaves its worker before its end: what was not done is not paid for."""
    if request.phase is not Phase.RUNNING or not request.user_key:
        return
    undone = request.cost
    if request.started_s is not None:
        undone = max(0.0, request.expected_tokens - pace.done_tokens(bus, request))
    _settle(bus, request, max(0.0, request.charged - undone))


def _settle(bus: BusState, request: RequestState, tokens: float) -> None:
    share = bus.shares_of(request.model).of(request.priority, request.user_key)
    share.tokens += tokens - request.charged
    share.running -= request.unsettled
    request.charged, request.unsettled = tokens, 0.0
    _reorder(bus, request)


def _reorder(bus: BusState, request: RequestState) -> None:
    queue = bus.queues.get(request.model)
    if queue is not None:
        queue.reorder(request.priority, request.user_key)
