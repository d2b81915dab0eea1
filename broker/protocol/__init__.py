"""The bus protocol, version 1: the contract that broker, workers and clients share (SPEC.md).

Holds no sockets, clocks or threads and imports nothing else of this project, so that every party,
and every test, can use it alone. Import the submodule that is needed; nothing is re-exported here.
"""
