"""Reads streamed answers as an ordinary client does, and compares them with the right answer.

A client here never reconnects and never asks again: it is up to the deployment to survive a
failure.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from bench.chaos.features import Heard, same_logprobs


class Outcome(StrEnum):
    """The outcome of an answer that was running when something was killed."""

    WHOLE = "whole"
    #: It broke off, or ended with an error.
    LOST = "lost"
    #: A part of it came twice.
    DOUBLED = "doubled"
    #: It ended as if nothing had happened, but is another answer or a part of one.
    ALTERED = "altered"


@dataclass
class Answer:
    """One answer as it was read."""

    heard: Heard = field(default_factory=Heard)
    #: Why it is not complete; empty if `[DONE]` came.
    broken: str = ""
    #: HTTP status if the request was refused.
    status: int = 0

    @property
    def chunks(self) -> int:
        """How many chunks have come so far."""
        return self.heard.chunks


def read(
    url: str,
    path: str,
    body: dict[str, Any],
    key: str,
    timeout_s: float,
    answer: Answer,
    on_chunk: Callable[[], None],
) -> None:
    """Read one answer until it ends or breaks off."""
    place = urlsplit(url)
    make = http.client.HTTPSConnection if place.scheme == "https" else http.client.HTTPConnection
    connection = make(place.netloc, timeout=timeout_s)
    headers = {"content-type": "application/json", "accept": "text/event-stream"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    try:
        connection.request("POST", place.path.rstrip("/") + path, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            answer.status = response.status
            message = response.read(2000).decode("utf-8", "replace")
            answer.broken = f"HTTP {response.status}: {message[:200]}"
            return
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].decode("utf-8", "replace").strip()
            if data == "[DONE]":
                return
            answer.heard.add(json.loads(data))
            on_chunk()
        answer.broken = "the stream ended without [DONE]"
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        answer.broken = f"{type(error).__name__}: {error}"[:200]
    finally:
        connection.close()


def judge(right: Heard, answer: Answer) -> tuple[Outcome, str]:
    """Compare an answer with the undisturbed one; the second value says what is wrong."""
    if answer.broken:
        return Outcome.LOST, answer.broken
    wanted, got = right.flows(), answer.heard.flows()
    if wanted == got:
        return _details(right, answer.heard)
    for index, (texts, reasons) in wanted.items():
        theirs, their_reasons = got.get(index, ([], []))
        if texts == theirs:
            if len(their_reasons) > len(reasons):
                return Outcome.DOUBLED, f"choice {index} ended {len(their_reasons)} times"
            if reasons != their_reasons:
                what = f"choice {index} ended with {their_reasons}, not {reasons}"
                return (Outcome.ALTERED if their_reasons else Outcome.LOST), what
            continue
        for one, other in zip(texts, theirs, strict=False):
            if one != other:
                return _difference(index, one, other)
        return Outcome.ALTERED, f"choice {index} has {len(theirs)} texts, not {len(texts)}"
    return Outcome.ALTERED, f"choices {sorted(got)}, not {sorted(wanted)}"


def _difference(index: int, right: str, got: str) -> tuple[Outcome, str]:
    same = next((i for i, (a, b) in enumerate(zip(right, got, strict=False)) if a != b), None)
    at = min(len(right), len(got)) if same is None else same
    rest = got[at:]
    where = f"choice {index} at character {at} of {len(right)}"
    if not rest:
        return Outcome.ALTERED, f"{where}: it ends there"
    # Doubled: what follows repeats an earlier part.
    for begin in range(at):
        if right.startswith(rest[: min(len(rest), 24)], begin) and len(rest) >= 8:
            return Outcome.DOUBLED, f"{where}: it goes on from character {begin} again"
    return Outcome.ALTERED, f"{where}: {rest[:30]!r} instead of {right[at : at + 30]!r}"


def _details(right: Heard, got: Heard) -> tuple[Outcome, str]:
    """Compare everything else, given that texts and finish reasons are equal."""
    if len(got.token_ids) > len(right.token_ids):
        return (
            Outcome.DOUBLED,
            f"{len(got.token_ids)} logprobs, not {len(right.token_ids)}",
        )
    if got.token_ids != right.token_ids or not same_logprobs(right.logprobs, got.logprobs):
        return Outcome.ALTERED, "different logprobs"
    if got.usage != right.usage:
        return Outcome.ALTERED, f"usage {got.usage}, not {right.usage}"
    return Outcome.WHOLE, ""
