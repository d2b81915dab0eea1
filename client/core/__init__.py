"""The client's core, sans-IO: events in, instructions out, the time as an argument.

No sockets, clocks, threads or logs; `client.io` carries out the instructions.
"""
