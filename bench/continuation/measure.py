"""The measurement: an undisturbed answer, then streams during which something is killed."""

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
"""How far a stream has come when something is killed, as a fraction of its chunks."""
LOOK_S: Final = 0.005


@dataclass
class Settings:
    """The settings of a run."""

    base_url: str
    model: str
    key: str = ""
    tokens: int = 160
    rounds: int = 3
    streams: int = 4
    seed: int = 1
    timeout_s: float = 120.0
    #: More fields for requests whose length is open.
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """The results of one feature."""

    feature: str
    #: Answers that ran when something was killed.
    struck: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    #: The first few faults that were seen.
    seen: list[str] = field(default_factory=list)
    #: Why the feature was not measured.
    skipped: str = ""

    def as_json(self, deployment: str) -> str:
        """The row as a line of JSON."""
        counts = {outcome.value: self.outcomes[outcome] for outcome in Outcome}
        facts = {"deployment": deployment, "feature": self.feature, "struck": self.struck, **counts}
        return json.dumps(facts | {"seen": self.seen, "skipped": self.skipped})


def first_model(base_url: str, key: str) -> str:
    """The first model that the deployment lists."""
    asked = urllib.request.Request(base_url.rstrip("/") + "/models")
    if key:
        asked.add_header("authorization", f"Bearer {key}")
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return str(json.load(answer)["data"][0]["id"])


def one(settings: Settings, feature: str) -> Answer:
    """Read an undisturbed answer."""
    answer = Answer()
    path, body = _request(settings, feature)
    read(settings.base_url, path, body, settings.key, settings.timeout_s, answer, lambda: None)
    return answer


def _with_stop(settings: Settings) -> Settings:
    """The settings with a stop string that ends the feature's answer before its last token."""
    flows = one(settings, "stop").heard.flows()
    stop = stop_in(flows[0][0][0]) if 0 in flows else ""
    # `extra` comes last, so this replaces the feature's own stop string.
    return replace(settings, extra={**settings.extra, "stop": [stop]} if stop else settings.extra)


def _request(settings: Settings, feature: str) -> Any:
    return request(feature, settings.model, settings.tokens, settings.seed, settings.extra)


def measure(
    settings: Settings, feature: str, kill: Callable[[], None], restore: Callable[[], None]
) -> Row:
    """Measure one feature: `kill` is called mid-stream in each round, and `restore` after it."""
    row = Row(feature)
    if feature == "stop":
        settings = _with_stop(settings)
    right, again = one(settings, feature), one(settings, feature)
    for answer in (right, again):
        if answer.broken:
            row.skipped = f"fails even undisturbed: {answer.broken}"
            return row
    outcome, what = judge(right.heard, again)
    if outcome is not Outcome.WHOLE:
        row.skipped = f"differs from run to run, undisturbed: {what}"
        return row
    if right.chunks < 8:
        row.skipped = f"its answer has only {right.chunks} chunks: too short for a kill"
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
    """Read streams of one request, kill when each has `at` chunks; return those that ran then."""
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
    """Wait until the deployment answers again. Raises `TimeoutError`."""
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
