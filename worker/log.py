"""Log lines of the worker: time, level, what happened, then key=value (or one JSON map a line).

Never a prompt and never a token (SPEC.md section 6: an id is the right to a request, so only its
first octets are shown). Must never be imported by a sans-IO core.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any


def _plain(value: Any) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return json.dumps(text) if not text or any(c in text for c in ' "=\n') else text


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields: dict[str, Any] = getattr(record, "fields", {})
        pairs = "".join(f" {key}={_plain(value)}" for key, value in fields.items())
        line = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} "
        return f"{line}{record.getMessage()}{pairs}"


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        line = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **fields,
        }
        return json.dumps(line, default=str)


def configure(level: str, style: str, file: Path | None) -> None:
    """Set up logging for the process: to standard error, or to a file.

    `style`: text, json, or auto: text for a terminal, JSON for what a program will read.
    """
    handler: logging.Handler = (
        logging.FileHandler(file, encoding="utf-8") if file else logging.StreamHandler(sys.stderr)
    )
    text = style == "text" or (style == "auto" and file is None and sys.stderr.isatty())
    handler.setFormatter(_TextFormatter() if text else _JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # A full disk must not stop a worker, nor fill its terminal with tracebacks.
    logging.raiseExceptions = False
