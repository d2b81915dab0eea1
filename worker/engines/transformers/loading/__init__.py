"""Reads checkpoints: model classes, formats of quantised weights, adapter files.

Must never serve a request or run a model. `transformers.loader` is the entry point.
"""
