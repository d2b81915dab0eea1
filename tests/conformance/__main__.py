"""`python -m tests.conformance client|worker|broker -- COMMAND ...`; --help says the rest."""

import sys

from tests.conformance.cli import main

sys.exit(main())
