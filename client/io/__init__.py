"""What carries the core's instructions out: sockets, the thread of `Client`, the loop of
`AsyncClient`. Must never decide anything.
"""
