"""The client's core, sans-IO: events in, instructions out, the time as an argument.

No socket, clock, thread or log in here; `client.io` carries the instructions out.
"""
