"""Writes down every deprecation of a library that our code calls into, by the place of our call.

It stands alone (standard library only) and is used twice: copied into an environment's
site-packages, where `install` runs in every interpreter of that environment, workers and gateways
too; and as a plugin of pytest, for what a library only logs. Without the variable FOLDER it does
nothing.

A warning names the frame that its author's `stacklevel` points at, which is often inside the
library. So the stack is walked instead: the nearest frame of ours is the call site.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

FOLDER = "RELEASES_WATCH_FOLDER"
ROOT = "RELEASES_WATCH_ROOT"
OURS = ("broker", "worker", "client", "bench", "tests")
CATEGORIES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)

_seen = set[tuple[str, str, str]]()


def library_of(filename: str) -> str:
    """Which installed package a file belongs to; `python` for the standard library."""
    _, found, rest = filename.replace(os.sep, "/").rpartition("/site-packages/")
    return rest.partition("/")[0].removesuffix(".py") if found else "python"


def call_site(frame: FrameType | None, root: str) -> str:
    """`path:line` of the nearest frame that is ours, relative to the root; empty when none is."""
    prefixes = tuple(f"{root}/{package}/" for package in OURS)
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename.startswith(prefixes) and filename != __file__:
            return f"{filename[len(root) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def note(library: str, text: str, frame: FrameType | None) -> None:
    """Append one deprecation to this process's file, once for each call site and text."""
    site = call_site(frame, os.environ[ROOT])
    text = " ".join(text.split())
    if not site or (library, text, site) in _seen:
        return
    _seen.add((library, text, site))
    line = json.dumps({"library": library, "site": site, "text": text})
    # At once: a process of a test may be killed at any time.
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def install() -> None:
    """Have `warnings.warn` note deprecations before it does what it always did."""
    if FOLDER not in os.environ:
        return
    original = warnings.warn

    def warn(
        message: Any,
        category: type[Warning] | None = None,
        stacklevel: int = 1,
        source: Any = None,
        **options: Any,
    ) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, CATEGORIES):
            frame = sys._getframe(1)
            text = f"{kind.__name__}: {message}"
            note(library_of(frame.f_code.co_filename), text, frame)
        original(message, category, stacklevel + 1, source, **options)

    warnings.warn = warn


def pytest_configure() -> None:
    """Note what transformers says of deprecations in its log alone."""
    # Not above: an interpreter that starts shall not load it for this.
    import logging

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if "deprecated" in text:
                note(record.name.partition(".")[0], f"log: {text}", sys._getframe(1))

    if FOLDER in os.environ:
        logging.getLogger("transformers").addHandler(Notes())
