"""The worker's core, sans-IO: events in, instructions out, the time as an argument.

No socket, clock, thread or log in here; `worker.loop` carries the instructions out.
"""
