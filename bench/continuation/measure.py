"""The measure itself: an undisturbed answer, then streams during which something is killed."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from bench.continuation.answers import Answer, Outcome, judge, read
from bench.continuation.features import request, stop_in

EARLIEST, LATEST = 0.15, 0.6
"""Where in its answer a stream is when something is killed, as a part of the chunks that it has."""
LOOK_S: Final = 0.005


@dataclass
class Settings:
    """Of a run."""

    base_url: str
    model: str
    key: str = ""
    tokens: int = 160
    rounds: int = 3
    streams: int = 4
    seed: int = 1
    timeout_s: float = 120.0
    #: Further fields of requests whose length is open.
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """What came of one feature."""

    feature: str
    #: Answers that ran when something was killed.
    struck: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    #: What was wrong, at first sight of each.
    seen: list[str] = field(default_factory=list)
    #: Why the feature was not measured.
    skipped: str = ""

    def as_json(self, deployment: str) -> str:
        """One line."""
        counts = {outcome.value: self.outcomes[outcome] for outcome in Outcome}
        facts = {"deployment": deployment, "feature": self.feature, "struck": self.struck, **counts}
        return json.dumps(facts | {"seen": self.seen, "skipped": self.skipped})


def first_model(base_url: str, key: str) -> str:
    """The first that the deployment lists."""
    asked = urllib.request.Request(base_url.rstrip("/") + "/models")
    if key:
        asked.add_header("authorization", f"Bearer {key}")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def one(settings: Settings, feature: str) -> Answer:
    """An answer that nothing disturbs."""
    answer = Answer()
    path, body = _request(settings, feature)
    read(settings.base_url, path, body, settings.key, settings.timeout_s, answer, lambda: None)
    return answer


def _with_stop(settings: Settings) -> Settings:
    """The same, with a stop string that ends the feature's answer before its last token."""
    flows = one(settings, "stop").heard.flows()
    stop = stop_in(flows[0][0][0]) if 0 in flows else ""
    # The last field counts, so that it takes the place of the feature's own.
    return replace(settings, extra={**settings.extra, "stop": [stop]} if stop else settings.extra)


def _request(settings: Settings, feature: str) -> Any:
    return request(feature, settings.model, settings.tokens, settings.seed, settings.extra)


def measure(
    settings: Settings, feature: str, kill: Callable[[], None], restore: Callable[[], None]
) -> Row:
    """`kill` is called in mid-stream, once in each round; `restore` after the round."""
    row = Row(feature)
    if feature == "stop":
        settings = _with_stop(settings)
    right, again = one(settings, feature), one(settings, feature)
    for answer in (right, again):
        if answer.broken:
            row.skipped = f"not served undisturbed: {answer.broken}"
            return row
    outcome, what = judge(right.heard, again)
    if outcome is not Outcome.WHOLE:
        row.skipped = f"not the same twice, undisturbed: {what}"
        return row
    if right.chunks < 8:
        row.skipped = f"its answer has {right.chunks} chunks: nothing to strike in"
        return row
    draw = random.Random(f"{settings.seed} {feature}")
    for _ in range(settings.rounds):
        at = max(2, int(right.chunks * draw.uniform(EARLIEST, LATEST)))
        for answer in _round(settings, feature, at, kill):
            row.struck += 1
            outcome, what = judge(right.heard, answer)
            row.outcomes[outcome] += 1
            if what and len(row.seen) < 3:
                row.seen.append(f"{outcome.value}: {what}")
        restore()
    return row


def _round(settings: Settings, feature: str, at: int, kill: Callable[[], None]) -> list[Answer]:
    """Streams of one request; the kill comes when each has so many chunks. Returns those that ran
    then."""
    path, body = _request(settings, feature)
    answers = [Answer() for _ in range(settings.streams)]

    def run(answer: Answer) -> None:
        read(settings.base_url, path, body, settings.key, settings.timeout_s, answer, lambda: None)

    threads = [threading.Thread(target=run, args=(answer,), daemon=True) for answer in answers]
    for thread in threads:
        thread.start()
    until_s = time.monotonic() + settings.timeout_s
    while any(
        answer.chunks < at and thread.is_alive()
        for answer, thread in zip(answers, threads, strict=True)
    ):
        if time.monotonic() > until_s:
            break
        time.sleep(LOOK_S)
    struck = [answer for answer, thread in zip(answers, threads, strict=True) if thread.is_alive()]
    kill()
    for thread in threads:
        thread.join()
    return struck


def wait_served(settings: Settings, seconds: float) -> None:
    """Until the deployment answers again. Raises `TimeoutError`."""
    until_s = time.monotonic() + seconds
    while True:
        try:
            first_model(settings.base_url, settings.key)
            if not one(settings, "greedy").broken:
                return
        except (urllib.error.URLError, OSError, LookupError, ValueError):
            pass
        if time.monotonic() > until_s:
            raise TimeoutError(f"{settings.base_url} did not serve within {seconds:g} s")
        time.sleep(0.5)
