"""vLLM and llama.cpp for `bench.engine`: their installer, and each of them in one process."""
