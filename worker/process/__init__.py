"""The engine process, and how the link starts it, watches it and talks to it. Must never import
zmq."""
