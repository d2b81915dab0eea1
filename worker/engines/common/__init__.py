"""What engines share, whatever computes the tokens: prompts, images, text, sampling, sequences.

Jobs, preprocessing, templates, texts, stop strings, limits, usage and sampling mean the same on
every engine because they are here once. An engine that lends a library's own batching to the bus is
a `Generator` (`generator`), a way to load a model, and the list of what it cannot honour
(`library_model`). Must never import an engine's package.
"""
