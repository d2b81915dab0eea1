"""Faults, kills and an hour's soak on real processes: `python -m bench.chaos`."""
