"""Carries out the core's instructions: sockets, the background thread of `Client`, the event loop
of `AsyncClient`. Makes no decisions of its own.
"""
