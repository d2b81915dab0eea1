"""Benchmarks of tokenbus beside its peers (the figures are in bench/FIGURES.md).

Never imported by broker, worker or client.
"""
