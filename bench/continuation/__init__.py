"""Do streams survive a kill unaltered? For any OpenAI-compatible deployment."""
