"""The bundled demo model: a tiny vision-language model that needs no download.

This package says where the model is; `pictures` makes the images and questions it was trained on,
`train` trains it again and `evaluate` measures it. Importing this module must stay cheap: it must
never import torch, transformers or Pillow.
"""

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder of the bundled model, in the layout of `save_pretrained`."""
    return Path(__file__).parent / "model"
