"""`python to_gguf.py FOLDER FILE` writes a Llama of transformers as a float32 GGUF file.

Runs in llamacpp/.venv.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engines.tiny_gguf import write_gguf


def main() -> None:
    """Read the folder and write the file."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    write_gguf(model, AutoTokenizer.from_pretrained(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
