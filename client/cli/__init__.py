"""The commands of `python -m client`, one module per family. The library never imports this."""
