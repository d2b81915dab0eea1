"""Engines on one real model: `python -m bench.engine`."""
