"""Our engine and its peers on one real model: `python -m bench.engine`."""
