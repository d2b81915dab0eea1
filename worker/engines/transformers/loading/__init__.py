"""Checkpoints read: model classes, the formats of quantised weights, adapters' files.

Must never serve a request nor run a model. `transformers.loader` is the way in.
"""
