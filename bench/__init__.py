"""Measurements of tokenbus beside its peers (bench/README.md has the figures).

Never imported by broker, worker or client.
"""
