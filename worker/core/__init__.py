"""The worker's core, sans-IO: events in, instructions out, the time as an argument.

No socket, clock, thread or log here; `worker.loop` carries the instructions out.
"""
