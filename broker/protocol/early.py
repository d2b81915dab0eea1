"""Imported first by programs that serve, so that SIGTERM is handled from the first moment.

Until a program installs its own handlers, SIGTERM ends it with status 0: nothing runs yet. Without
this, a SIGTERM that arrives while modules are imported is lost for process 1 of a container (the
kernel drops signals without a handler there), and is a failure for any other process. (SIGINT has
Python's own handler.) A broker's SIGHUP (reload) means nothing before there is something to reload.
Must import only what Python has loaded anyway.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

_MODULES = ("broker", "worker", "worker.relay", "client.gateway")
_SCRIPTS = ("tokenbus-broker", "tokenbus-worker")


def _program() -> str:
    """The name of this program; empty if the code is only imported."""
    # From the interpreter's own command line: `python -m` imports packages before it
    # sets anything else.
    called = sys.orig_argv
    module = called[called.index("-m") + 1 :][:1] if "-m" in called else []
    script = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119  # pathlib is slow to load
    if module and module[0] in _MODULES:
        return module[0]
    return script.removeprefix("tokenbus-") if script in _SCRIPTS else ""


def _leave(_number: int, _frame: Any) -> None:
    raise SystemExit(0)


def _ignore(_number: int, _frame: Any) -> None:
    """A handler rather than SIG_IGN, which children would inherit."""


if _program():
    signal.signal(signal.SIGTERM, _leave)
if _program() == "broker":
    signal.signal(signal.SIGHUP, _ignore)
