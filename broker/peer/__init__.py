"""The side of the bus that dials out, once for workers, clients and relays: handshake, sequence,
liveness and back-off in `connection` and `backoff`, without I/O; the socket in `dealer` and `keys`.
What its loops share with the broker's: `bell` wakes them, `heap` gives their free memory back.
"""
