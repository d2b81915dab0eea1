"""Faults, kills and a soak test on real processes: `python -m bench.chaos`."""
