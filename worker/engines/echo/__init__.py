"""The engine without a model: it answers with the prompt or made-up words, for tests and demos.

Must never import a machine-learning library.
"""
