"""Do streams survive a kill, and are they the same? For any OpenAI-compatible deployment."""
