"""`python -m tests.conformance client|worker|broker -- COMMAND ...`; see --help."""

import signal
import sys

from tests.conformance.cli import main

if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # unwinds, so that the subject is stopped
    sys.exit(main())
