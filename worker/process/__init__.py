"""The engine process and how the link starts, watches and talks to it. Must never import zmq."""
