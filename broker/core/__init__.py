"""The controller of the broker, sans-IO: events in, instructions out (open `controller.py` first).

Holds no sockets, clocks, threads, logging or environment and imports nothing but `broker.protocol`.
"""
