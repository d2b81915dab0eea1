"""What the engines beside transformers share: each lends one library's own batching to the bus.

Jobs, preprocessing, chat templates, texts, stop strings, limits, usage and sampling are those of
the transformers engine; the library computes. A new engine of this kind is a `Generator`
(`generator`), a way to load a model, and the list of what it cannot honour (`model`). Needs torch
(for sampling) and transformers (for tokenizers and templates), as the extra `worker` brings them.
"""
