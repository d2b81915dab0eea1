"""The client's core, sans-IO: events in, instructions out, the time as an argument.

No socket, clock, thread or log here; `client.io` carries the instructions out.
"""
