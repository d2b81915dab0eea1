"""`python -m tests.releases lock`: refresh the tested set."""

from __future__ import annotations

import argparse
import sys

from tests.releases import lock


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tests.releases", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("lock", help="refresh requirements.lock and say what moved")
    parser.parse_args()
    return lock.refresh()


if __name__ == "__main__":
    sys.exit(main())
