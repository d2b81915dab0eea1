"""vLLM and llama.cpp for `bench.engine`: an installer, and each engine in one process."""
