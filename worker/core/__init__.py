"""The worker's core, sans-IO: events in, instructions out, the time as an argument.

Must never touch a socket, a clock, a thread or a log; `worker.loop` carries out the instructions.
"""
