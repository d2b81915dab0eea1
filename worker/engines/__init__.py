"""Engines: what runs a model. `base` is the contract; every other module here is one engine."""
