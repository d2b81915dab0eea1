"""The GPU worker: a link process that owns the socket and an engine process that runs the model."""
