"""Log lines of broker, worker and gateway in one style: text for a terminal, JSON for programs.

    12:03:44.120 INFO    client joined peer=laptop session=12063503
    {"time": 1795995704.755, "level": "info", "event": "client joined", "peer": "laptop", ...}

Names come from peers: they must not be able to break a line, forge one, or colour a terminal. Never
a prompt, a token or a whole id. Must never be imported by a sans-IO core.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TextIO

__all__ = ["FORMATS", "LEVELS", "Formatter", "configure", "is_json", "line"]

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("auto", "text", "json")


def is_json(form: str, stream: TextIO | None) -> bool:
    """Whether lines are JSON: `auto` means text on a terminal and JSON elsewhere; `stream` is None
    for a file."""
    return form == "json" or (form == "auto" and (stream is None or not stream.isatty()))


def line(
    time_s: float, level: str, event: str, fields: Mapping[str, Any] | None, *, as_json: bool
) -> str:
    """One line, without the newline. `time_s`: seconds since the epoch; `level` in lower case."""
    if as_json:
        record = {"time": round(time_s, 3), "level": level, "event": event, **(fields or {})}
        return json.dumps(record, default=str)
    clock = time.strftime("%H:%M:%S", time.localtime(time_s))
    words = [f"{clock}.{int(time_s * 1000) % 1000:03d}", level.upper().ljust(7), _escaped(event)]
    words += [f"{_escaped(key)}={_value(value)}" for key, value in (fields or {}).items()]
    return " ".join(words)


def _value(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    if text.isprintable() and text and not set(text) & set(" \"'="):
        return text
    return json.dumps(text)


def _escaped(text: str) -> str:
    return text if text.isprintable() else json.dumps(text)[1:-1]


class Formatter(logging.Formatter):
    """For programs that use `logging`; fields are passed as `extra={"fields": {...}}`."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__()
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = dict(getattr(record, "fields", {}))
        traceback = self.formatException(record.exc_info) if record.exc_info else ""
        if traceback and self._as_json:
            fields["traceback"], traceback = traceback, ""
        level, event = record.levelname.lower(), record.getMessage()
        written = line(record.created, level, event, fields, as_json=self._as_json)
        return f"{written}\n{traceback}" if traceback else written


def configure(level: str, form: str, file: Path | None) -> None:
    """Set up `logging` for the process, to standard error or to a file. Raises `OSError`."""
    handler: logging.Handler = (
        logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    )
    as_json = is_json(form, None if file else sys.stderr)
    handler.setFormatter(Formatter(as_json=as_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A full disk must neither stop a worker nor fill its terminal with tracebacks.
    logging.raiseExceptions = False
