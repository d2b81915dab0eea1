"""OpenAI's API: request bodies, their conversion to bus requests, and answers in its format.

Types are those of the `openai` package. Must never open a socket: it translates.
"""
