"""Carries out the core's instructions: sockets, the thread of `Client`, the event loop of
`AsyncClient`. Must never decide anything.
"""
