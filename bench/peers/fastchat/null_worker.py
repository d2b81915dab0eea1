"""A FastChat worker without a model: FastChat's own worker server around a source of words.

Runs in FastChat's environment (install.sh beside this file), never in the project's. HTTP server,
routes, semaphore and heartbeats are FastChat's; only the token source is ours, and does as little
as possible. Answers are sent as FastChat's workers send them: each time all text so far.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import uvicorn
from fastchat.conversation import Conversation, get_conv_template
from fastchat.serve import base_model_worker
from fastchat.serve.base_model_worker import BaseModelWorker

MODEL = "null"


class NullWorker(BaseModelWorker):
    """Streams ` word` `max_new_tokens` times."""

    def __init__(self, controller: str, address: str, concurrency: int) -> None:
        super().__init__(
            controller,
            address,
            "null-worker",
            MODEL,
            [MODEL],
            concurrency,
        )
        self.context_len = 1 << 20
        self.init_heart_beat()

    def make_conv_template(
        self, conv_template: str | None = None, model_path: str | None = None
    ) -> Conversation:
        """A plain template, since FastChat's own look-up would import torch."""
        return get_conv_template("zero_shot")

    def count_token(self, params: dict) -> dict:
        """Count the words of the prompt."""
        return {"count": len(params["prompt"].split()), "error_code": 0}

    def generate_stream_gate(self, params: dict) -> Iterator[bytes]:
        """The cumulative answer, as `model_worker.py` sends it."""
        total = int(params.get("max_new_tokens", 256))
        text = ""
        for number in range(1, total + 1):
            text += " word"
            answer = {
                "text": text,
                "error_code": 0,
                "usage": {
                    "prompt_tokens": 1,
                    "completion_tokens": number,
                    "total_tokens": number + 1,
                },
                "finish_reason": "length" if number == total else None,
            }
            yield json.dumps(answer).encode() + b"\0"


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--controller", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--concurrency", type=int, default=1024)
    arguments = parser.parse_args()
    address = f"http://127.0.0.1:{arguments.port}"
    base_model_worker.worker = NullWorker(arguments.controller, address, arguments.concurrency)
    uvicorn.run(base_model_worker.app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
