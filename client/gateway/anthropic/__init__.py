"""Anthropic's Messages API: its bodies, answers, events and errors.

Must never talk to the bus but through the request's context.
"""
