"""Code shared by all engines: prompts, images, text, sampling, sequences.

Jobs, preprocessing, templates, texts, stop strings, limits, usage and sampling mean the same on
every engine because they are here once. An engine that uses a library's own batching consists of a
`Generator` (`generator`), a way to load a model, and a list of the parameters that it cannot honour
(`library_model`). Must never import an engine's package.
"""
