"""The releases of other people's libraries that tokenbus runs with.

`lock` refreshes requirements.lock, the tested set, and says what moved. `newest`, `oldest` and
`tested` run the tests in a new environment with the newest releases that pyproject.toml allows,
the oldest, or the lock, and end with a table: library, version, passed, failed, and calls of ours
that the library deprecates. Run from a clone: `python -m tests.releases newest`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.releases import lock, trial

TESTS = ("-n", "4", "--dist", "loadfile")


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.releases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verbs.add_parser("lock", help="refresh requirements.lock and say what moved")
    for which in ("newest", "oldest", "tested"):
        verb = verbs.add_parser(which, help=f"run the tests with the {which} releases")
        verb.add_argument(
            "--with",
            dest="others",
            action="append",
            default=[],
            metavar="NAME==VERSION",
            help="run them with this release in the place of the set's; repeatable, a run for each",
        )
        verb.add_argument(
            "--folder", type=Path, help="make the environment here and keep it [temporary]"
        )
        verb.add_argument(
            "arguments",
            nargs="*",
            metavar="PYTEST",
            help=f"what pytest is given, after -- [{' '.join(TESTS)}]",
        )
    options = parser.parse_args()
    if options.verb == "lock":
        return lock.refresh()
    arguments = options.arguments or TESTS
    return trial.run(options.verb, options.others, arguments, options.folder)


if __name__ == "__main__":
    sys.exit(main())
