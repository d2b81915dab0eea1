"""`python -m tests.conformance client|worker|broker -- COMMAND ...`; --help says the rest."""

import signal
import sys

from tests.conformance.cli import main

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the subject is ended
    sys.exit(main())
