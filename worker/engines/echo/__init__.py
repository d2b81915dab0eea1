"""The engine without a model: it answers with words made up from the prompt, for tests and demos.

Must never import a machine-learning library.
"""
