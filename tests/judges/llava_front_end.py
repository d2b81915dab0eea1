"""Drives LLaVA's web front end as its page does: `http_bot` with an image and a question.

Runs in LLaVA's environment (`llava.py`), never in the project's. One line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import types

from llava.serve import gradio_web_server as front
from PIL import Image


def main() -> None:
    """`llava_front_end.py CONTROLLER MODEL QUESTION`."""
    controller, model, question = sys.argv[1:]
    front.args = argparse.Namespace(controller_url=controller, moderate=False)
    visitor = types.SimpleNamespace(client=types.SimpleNamespace(host="127.0.0.1"))
    models = front.get_model_list()
    state = front.default_conversation.copy()
    image = Image.new("RGB", (64, 48), "red")
    state, *_ = front.add_text(state, question, image, "Crop", visitor)
    shown = []
    for now, *_ in front.http_bot(state, model, 0.2, 0.7, 1024, visitor):
        shown.append(now.messages[-1][-1])
    # LLaVA turned `sys.stdout` into its log.
    found = {"models": models, "steps": len(shown), "last": shown[-1]}
    print(json.dumps(found), file=sys.__stdout__, flush=True)


if __name__ == "__main__":
    main()
