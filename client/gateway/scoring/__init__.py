"""Rerank, score and classify, in the shapes of Jina, Cohere, vLLM and Text Embeddings Inference."""
