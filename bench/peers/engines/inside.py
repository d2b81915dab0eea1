"""An engine in a process of its own, without a server: one line of JSON for each run.

The process first writes the line "ready". The line {"prompts": [[id, ...], ...], "new": tokens} is
answered by {"started": s, "at": [[s, ...], ...]}: when the prompts were handed over, and when each
token of each answer came, in seconds of `time.monotonic`; or by {"error": text}, after which the
engine goes on. Imports nothing of ours, since the peers' own interpreters run it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Answer", "Run", "serve"]

Run = Callable[[list[list[int]], int], list[list[float]]]
"""Prompts and the number of tokens of each answer → arrival times of each answer's tokens."""
Answer = Callable[[Run], None]


def serve() -> Answer:
    """Redirect standard output and return the loop that answers lines, which ends with stdin.

    Call this before anything can print: from then on, what a library writes to standard output goes
    to standard error.
    """
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(run: Run) -> None:
        lines.write("ready\n")
        for line in sys.stdin:
            asked = json.loads(line)
            started = time.monotonic()
            said: dict[str, Any]
            try:
                said = {"started": started, "at": run(asked["prompts"], asked["new"])}
            except RuntimeError as error:
                said = {"error": str(error)}
            lines.write(json.dumps(said) + "\n")

    return answer
