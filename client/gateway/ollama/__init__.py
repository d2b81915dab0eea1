"""Ollama's API under `/api`: chat, generate, embed and models, for programs made for its server."""
