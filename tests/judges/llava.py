"""LLaVA's `test_message` and its web front end, with the gateway as their controller."""

from __future__ import annotations

import json
import urllib.request

from PIL import Image

from tests.judges.stage import Stage, environment, here, run, server

PACKAGES = (
    "torch<2.14",
    "transformers==4.37.2",
    "numpy<2",
    "pillow",
    "requests",
    "sentencepiece",
    "accelerate",
    "gradio==4.16.0",
    "gradio_client==0.8.1",
    "httpx==0.24.0",
    "pydantic<2.11",
    "huggingface_hub<0.26",
    "starlette<0.36",
    "fastapi<0.110",
)
#: Without what it pins for its own workers: an old torch among it.
LLAVA = ("--no-deps", "llava-torch==1.2.2.post1")


def judge(stage: Stage) -> None:
    """Raises AssertionError where LLaVA is not content."""
    python = environment("llava", PACKAGES, LLAVA)
    said = run(
        stage,
        *(python, "-m", "llava.serve.test_message", "--controller-address", stage.url),
        *("--model-name", "echo", "--message", "Greetings.", "--max-new-tokens", "4000"),
    )
    assert "Models: ['demo', 'echo']" in said, said
    # It stops at the first blank and shows the last word: the echo's first, "A chat between ...".
    assert "Greetings." in said and said.split()[-1] == "A", said
    # What a visitor of the web front end sees: an image, a question, the answer as it grows.
    said = run(
        stage,
        # Not our folder: there `llava` is this module.
        *(python, "-P", here("llava_front_end.py"), stage.url, "echo", "What is this?"),
    )
    shown = json.loads(next(line for line in said.splitlines() if line.startswith('{"models"')))
    assert shown["models"] == ["demo", "echo"], shown
    assert shown["last"].startswith("1 image: 64x48."), shown
    assert "What is this?" in shown["last"] and shown["steps"] > 5, shown
    # Its wheel lacks the two images of its examples, without which the page does not start.
    [folder] = python.parent.parent.glob("lib/*/site-packages/llava/serve")
    (folder / "examples").mkdir(exist_ok=True)
    for name in ("extreme_ironing.jpg", "waterview.jpg"):
        Image.new("RGB", (8, 8)).save(folder / "examples" / name)
    # And it starts as it is, asking the gateway for its models.
    command = (python, "-m", "llava.serve.gradio_web_server", "--controller-url", stage.url)
    # The other mode of its list of models is for an older gradio than the one it pins.
    with server(stage, "/", *command, "--model-list-mode", "reload") as url:
        page = urllib.request.urlopen(url, timeout=10).read().decode()
        assert '"echo"' in page and '"demo"' in page
