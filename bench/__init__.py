"""Measurements of tokenbus beside its peers (bench/FIGURES.md has the figures).

Never imported by broker, worker or client.
"""
