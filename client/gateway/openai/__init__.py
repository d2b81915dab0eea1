"""OpenAI's API: bodies as they come, the requests made of them, and answers in its shapes.

Types are those of the `openai` package. Must never open a socket: it translates.
"""
