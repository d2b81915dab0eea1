"""Ollama's Python and JavaScript packages: chat, tools, thoughts, images, vectors, models."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.judges.stage import ENVIRONMENTS, Stage, environment, here, run

PYTHON = ("ollama==0.6.3",)
NODE = ("ollama@0.6.4",)


def judge(stage: Stage) -> None:
    """Raises AssertionError where one of the packages is not content."""
    python = environment("ollama", PYTHON)
    said = run(stage, python, "-P", here("ollama_python.py"), stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said
    modules = node_packages("ollama", *NODE)
    said = run(stage, "node", here("ollama_node.mjs"), modules, stage.url)
    assert json.loads(said.splitlines()[-1]) == {"content": True}, said


def node_packages(name: str, *packages: str) -> Path:
    """The folder of these npm packages, installed on the first call."""
    place = ENVIRONMENTS / f"{name}-node"
    done, wanted = place / "installed", "\n".join(packages)
    if not (done.exists() and done.read_text() == wanted):
        place.mkdir(parents=True, exist_ok=True)
        print(f"installing {', '.join(packages)}", flush=True)
        subprocess.run(
            ["npm", "install", "--silent", "--prefix", str(place), *packages], check=True
        )
        done.write_text(wanted)
    return place / "node_modules"
