"""The second bundled model: tiny and text-only, it thinks before it answers and calls tools.

`tasks` makes the conversations that it was trained on, `train` trains it again, `evaluate` measures
it. Importing this module must stay cheap: it must never import torch or transformers.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder of the bundled model, in the layout of `save_pretrained`."""
    return Path(__file__).parent / "model"
