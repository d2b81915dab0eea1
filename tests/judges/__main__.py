"""`python -m tests.judges [NAME ...]`: run judges, say which are content, end with 0 if all are."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable

from tests.judges import (
    agents,
    anthropic,
    batches,
    cohere,
    fastchat,
    guidellm,
    llamaindex,
    llava,
    lm_eval,
    ollama,
    openresponses,
)
from tests.judges.stage import Absent, Stage, stage

JUDGES: dict[str, Callable[[Stage], None]] = {
    "fastchat": fastchat.judge,
    "llava": llava.judge,
    "guidellm": guidellm.judge,
    "ollama": ollama.judge,
    "cohere": cohere.judge,
    "anthropic": anthropic.judge,
    "agents": agents.judge,
    "batches": batches.judge,
    "openresponses": openresponses.judge,
    "llamaindex": llamaindex.judge,
    "lm-eval": lm_eval.judge,
}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.judges", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="NAME", help=f"of {', '.join(JUDGES)} [all]")
    chosen = parser.parse_args().name or list(JUDGES)
    if unknown := set(chosen) - set(JUDGES):
        parser.error(f"no judge is called {', '.join(sorted(unknown))}")
    failed = 0
    with stage() as ready:
        for name in chosen:
            began_s = time.monotonic()
            try:
                JUDGES[name](ready)
            except Absent as absent:
                verdict = f"skipped: {absent}"
            except Exception:
                traceback.print_exc()
                failed += 1
                verdict = "NOT content"
            else:
                verdict = "content"
            print(f"{name}: {verdict} ({time.monotonic() - began_s:.0f} s)", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
