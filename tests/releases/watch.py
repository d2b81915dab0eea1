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

MESSENGERS = ("typing_extensions",)
"""Packages that give warnings in the name of others, by a decorator."""

_seen = set[tuple[str, str, str]]()
_installed = False


def package_of(filename: str) -> str:
    """The installed package that a file belongs to; empty when it is of none."""
    _, _, rest = filename.replace(os.sep, "/").rpartition("/site-packages/")
    return rest.partition("/")[0].removesuffix(".py") if rest != filename else ""


def origin(frame: FrameType | None, root: str) -> tuple[str, str]:
    """The library that warns, `python` for the standard one, and `path:line` of the nearest frame
    of ours, relative to the root; the latter is empty when no frame is ours."""
    prefixes = tuple(f"{root}/{package}/" for package in OURS)
    library = ""
    while frame is not None:
        filename = frame.f_code.co_filename
        if filename.startswith(prefixes) and filename != __file__:
            return library or "python", f"{filename[len(root) + 1 :]}:{frame.f_lineno}"
        package = package_of(filename)
        library = library or (package if package not in MESSENGERS else "")
        frame = frame.f_back
    return library or "python", ""


def note(text: str, frame: FrameType | None) -> None:
    """Append one deprecation to this process's file, once for each call site and text."""
    library, site = origin(frame, os.environ[ROOT])
    text = " ".join(text.split())
    if not site or (library, text, site) in _seen:
        return
    _seen.add((library, text, site))
    line = json.dumps({"library": library, "site": site, "text": text})
    # At once: a process of a test may be killed at any time.
    with (Path(os.environ[FOLDER]) / f"{os.getpid()}.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def install() -> None:
    """Have `warnings.warn` note deprecations before it does what it always did. Idempotent: an
    interpreter may read its `.pth` files twice."""
    global _installed
    if _installed or FOLDER not in os.environ:
        return
    _installed = True
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
            note(f"{kind.__name__}: {message}", sys._getframe(1))
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
                note(f"log: {text}", sys._getframe(1))

    if FOLDER in os.environ:
        logging.getLogger("transformers").addHandler(Notes())
