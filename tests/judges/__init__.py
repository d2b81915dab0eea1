"""Tools of others as judges of the gateway: `python -m tests.judges`; see README.md."""
