"""The commands of `python -m client`, a module for each family. The library never imports this."""
