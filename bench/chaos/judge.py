"""The outcome of a fault: streams compared with the run without faults, and how long they paused.

Pure functions on the readers' reports; nothing here knows how a fault is made.
"""

from __future__ import annotations

import difflib
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from bench.chaos.features import same_logprobs
from bench.common import percentile
from tests.support.reader import Got, arguments_of, chat_of, is_chat, place_in_chat
from worker.engines.echo import tokens as echo_tokens

PACE_MS: Final = 20.0
"""Time between two tokens of a stream."""

Reference = dict[int, Got]


# --- outcomes -------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The outcome of one fault over all its rounds."""

    fault: str
    requests: int = 0
    #: Streams that were resumed at least once.
    resumed: int = 0
    #: Requests that ended with a typed error.
    failed: int = 0
    tokens_lost: int = 0
    tokens_doubled: int = 0
    texts_altered: int = 0
    #: Recovery time of every affected stream, milliseconds.
    recovery_ms: list[float] = field(default_factory=list)
    #: Interruptions of chats, by what the answer was in the middle of.
    broken_in: Counter[str] = field(default_factory=Counter)
    #: Broken promises; empty if all is well.
    wrong: list[str] = field(default_factory=list)
    #: Further figures of this fault.
    figures: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """The outcome as a JSON line."""
        row = asdict(self)
        times = row.pop("recovery_ms")
        row |= row.pop("figures")
        row["broken_in"] = dict(self.broken_in)
        wrong = row.pop("wrong")
        row["affected"] = len(times)
        for percent in (50, 99):
            row[f"recovery_p{percent}_ms"] = round(percentile(times, percent), 1) if times else None
        return row | ({"wrong": wrong} if wrong else {})


def differences(got: Sequence[int], expected: Sequence[int]) -> tuple[int, int]:
    """How many tokens of the expected answer are missing, and how many are doubled or made up."""
    lost = doubled = 0
    matcher = difflib.SequenceMatcher(None, expected, got, autojunk=False)
    for kind, low, high, other_low, other_high in matcher.get_opcodes():
        if kind != "equal":
            lost += high - low
            doubled += other_high - other_low
    return lost, doubled


def judge(outcome: Outcome, streams: Sequence[Got], reference: Reference) -> None:
    """Compare the streams with the run without faults.

    A stream that failed must still be a prefix of its answer.
    """
    for got in streams:
        expected = reference[got.lane]
        outcome.requests += 1
        outcome.resumed += got.resumed > 0
        ids, text = expected.token_ids, expected.text
        if got.error is not None:
            outcome.failed += 1
            ids, text = ids[: len(got.token_ids)], text[: len(got.text)]
        elif not same_logprobs(got.logprobs, expected.logprobs):
            outcome.wrong.append(f"lane {got.lane}: different logprobs")
        if got.token_ids != ids:
            lost, doubled = differences(got.token_ids, ids)
            outcome.tokens_lost += lost
            outcome.tokens_doubled += doubled
        outcome.texts_altered += got.text != text
        for count in set(got.broken_at) if is_chat(got.lane) else ():
            place = place_in_chat(echo_tokens.detokenize(expected.token_ids[:count]))
            outcome.broken_in[place] += 1


def recoveries_ms(streams: Sequence[Got], struck_s: float, workers: Sequence[str]) -> list[float]:
    """The longest pause after the fault of each affected stream, in milliseconds.

    Affected are streams at the given workers, or all if none are given.
    """
    found = []
    for got in streams:
        at = [worker for since_s, worker in got.workers if since_s <= struck_s]
        running = got.arrived_s and got.arrived_s[0] <= struck_s < got.arrived_s[-1]
        if not running or (workers and at[-1:] and at[-1] not in workers):
            continue
        times = [struck_s, *(moment_s for moment_s in got.arrived_s if moment_s > struck_s)]
        pauses = (after - before for before, after in itertools.pairwise(times))
        found.append(max(pauses) * 1000)
    return found


def check_reference(streams: Sequence[Got], tokens: int) -> None:
    """Check the run without faults against the known answers of the echo engine.

    Raises `RuntimeError`.
    """
    for got in streams:
        asked = arguments_of(got.lane, tokens, PACE_MS)
        text = got.text
        if is_chat(got.lane):
            said, text = chat_of(got.lane, tokens)
            expected = echo_tokens.tokenize(said)
        elif got.lane % 2:
            seeds = (asked["seed"], zlib.crc32(asked["prompt"].encode()))
            expected = [echo_tokens.sampled_token(*seeds, at) for at in range(tokens)]
        else:
            expected = echo_tokens.tokenize(asked["prompt"])[:tokens]
        if got.error is not None or got.token_ids != expected or got.text != text:
            raise RuntimeError(f"lane {got.lane} is wrong without any fault: {got}")


def check_featured_reference(streams: Sequence[Got]) -> None:
    """Check that the run without faults used every feature. Raises `RuntimeError`."""
    for got in streams:
        if got.error is not None or got.causes:
            raise RuntimeError(f"lane {got.lane} is wrong without any fault: {got}")
    texts = [got.text for got in streams]
    choices = [choice for text in texts for choice in json.loads(text)["choices"]]
    for what, seen in {
        "image tokens": any('"image_tokens": 9' in text for text in texts),
        "tool calls": any('"tool_calls"' in text and "paint" in text for text in texts),
        "a call after a text": any(said and calls for _, _, said, calls, *_ in choices),
        "thoughts": any(thought for _, thought, *_ in choices),
        "a schema": any("corners" in text for text in texts),
        "logprobs": any(got.logprobs for got in streams),
        "several choices": any(text.count('"stop"') + text.count('"length"') > 1 for text in texts),
    }.items():
        if not seen:
            raise RuntimeError(f"no answer of the run without faults shows {what}")
