"""`python -m tests.judges.suites NAME ...`: run public suites and print their figures.

Each runs against a bus of its own, or against the gateway that --base-url names. Ends with 0 if
every failure has a reason in the suite's file and none is a fault of ours.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from tests.judges.stage import ENVIRONMENTS, Absent
from tests.judges.suites import llamacpp, lmdeploy, openai_node, openai_python, smg, vllm
from tests.judges.suites.suite import Part, Place, Suite, Test, Verdict, reasons, served, tally

SUITES: dict[str, Suite] = {
    suite.name: suite
    for suite in (
        llamacpp.SUITE,
        lmdeploy.SUITE,
        openai_node.SUITE,
        openai_python.SUITE,
        smg.SUITE,
        vllm.SUITE,
    )
}
HEAD = "run | pass | our fault | we lack it | does not apply | skipped"


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.judges.suites", description=__doc__)
    known = f"of {', '.join(SUITES)} [all]"
    parser.add_argument("name", nargs="*", metavar="NAME", help=known)
    parser.add_argument("--base-url", metavar="URL", help="a running gateway [a bus of its own]")
    parser.add_argument(
        "--only", metavar="TEST", action="append", help="what the suite's runner is told to run"
    )
    parser.add_argument(
        "--checkout", metavar="FOLDER", type=Path, help="a clone, for a suite in no registry"
    )
    parser.add_argument(
        "--folder",
        metavar="FOLDER",
        type=Path,
        default=ENVIRONMENTS / "suites",
        help="where suites are kept [%(default)s]",
    )
    parser.add_argument("--words", metavar="FILE", type=Path, help="write what failures say")
    options = parser.parse_args()
    names = options.name or list(SUITES)
    if unknown := set(names) - set(SUITES):
        parser.error(f"no suite is called {', '.join(sorted(unknown))}")
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in names:
        suite = SUITES[name]
        try:
            tests = _run(suite, options.base_url, folder, options.checkout, options.only)
        except Absent as absent:
            print(f"{name}: skipped: {absent}", flush=True)
            continue
        if options.words:
            with options.words.open("a", encoding="utf-8") as file:
                for test in tests:
                    file.write(f"=== {test.outcome}: {test.id}\n{test.words}\n")
        told = tally(tests, reasons(name))
        for test in told.unknown:
            print(f"  {Verdict.UNKNOWN}: {test.id}")
        if not options.only:
            for pattern in told.stale:
                print(f"  a reason without a failure: {pattern}")
        print(f"{name} ({suite.release}): {HEAD}\n{name}: {told.row}", flush=True)
        failed |= bool(told.unknown or told.counts[Verdict.FAULT])
    return 1 if failed else 0


def _run(
    suite: Suite, url: str | None, folder: Path, checkout: Path | None, only: list[str] | None
) -> list[Test]:
    tests: list[Test] = []
    for part in suite.parts:
        chosen = part
        if only:
            mine = tuple(test for test in only if not part.tests or test.startswith(part.tests))
            if not mine:
                continue
            chosen = Part(mine, part.models, part.options, part.key)
        with contextlib.nullcontext(url.rstrip("/")) if url else served(part) as base:
            tests += suite.run(Place(base, folder, checkout), chosen)
    return tests


if __name__ == "__main__":
    sys.exit(main())
