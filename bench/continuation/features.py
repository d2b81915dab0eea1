"""Requests of the benchmark: one feature each, in fields that OpenAI's API has.

Every request is greedy or has a seed, so that a deployment that honours seeds gives the same answer
each time. Schemas and tools ask for long lists, which take a while to answer.
"""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from typing import Any, Final

from bench.shapes import paint_tool, shape_schema

CHAT: Final = "/chat/completions"
COMPLETIONS: Final = "/completions"
_SCHEMA: Final = shape_schema()
_TOOL: Final = paint_tool(16, 20)
_STORY: Final = "Tell me a long story about a red circle and a blue square."


def _chat(text: str = _STORY, **more: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": [{"role": "user", "content": text}], **more}


def _image(seed: int) -> str:
    """An image of coloured squares, as a data URL."""
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    image = Image.new("RGB", (192, 144), (250, 250, 245))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        left, top = rng.randrange(140), rng.randrange(90)
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        draw.rectangle((left, top, left + 40, top + 40), fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _with_image(seed: int) -> tuple[str, dict[str, Any]]:
    parts = [
        {"type": "image_url", "image_url": {"url": _image(seed)}},
        {"type": "text", "text": "Describe this image at length."},
    ]
    return CHAT, {"messages": [{"role": "user", "content": parts}], "temperature": 0}


def _schema(seed: int) -> tuple[str, dict[str, Any]]:
    response_format = {"type": "json_schema", "json_schema": _SCHEMA}
    return _chat("Describe a shape.", temperature=0.9, seed=seed, response_format=response_format)


def _tools(seed: int) -> tuple[str, dict[str, Any]]:
    return _chat(
        "Paint a shape.", temperature=0.8, seed=seed, tools=[_TOOL], tool_choice="required"
    )


def _completion(seed: int) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {
        "prompt": "Once upon a time",
        "temperature": 0.7,
        "seed": seed,
        "logprobs": 2,
    }


FEATURES: Final[dict[str, Callable[[int], tuple[str, dict[str, Any]]]]] = {
    "greedy": lambda _: _chat(temperature=0),
    "seed": lambda seed: _chat(temperature=0.9, top_p=0.95, seed=seed),
    # With a stop string from its own answer: `stop_in`.
    "stop": lambda seed: _chat(temperature=0.9, seed=seed, stop=["zebra!"]),
    "penalties": lambda seed: _chat(
        temperature=0.8, seed=seed, presence_penalty=0.4, frequency_penalty=0.3
    ),
    "schema": _schema,
    "tools": _tools,
    "logprobs": lambda _: _chat(temperature=0, logprobs=True, top_logprobs=3),
    "n": lambda seed: _chat(temperature=1.0, seed=seed, n=3),
    "image": _with_image,
    "completion": _completion,
}
"""By name: makes a request with a seed, as path and body."""
STOP_AT: Final = 0.8
"""Where the feature `stop` cuts its text, as a fraction of the answer without the stop string."""


def stop_in(text: str) -> str:
    """A stop string that first occurs late in this answer; empty if there is none."""
    for begin in range(int(len(text) * STOP_AT), len(text) - 6):
        if text.index(text[begin : begin + 6]) == begin:
            return text[begin : begin + 6]
    return ""


LONG: Final = frozenset(("schema", "tools"))
"""Features whose answers end by themselves, but need more tokens than the others."""


def request(feature: str, model: str, tokens: int, seed: int, extra: dict[str, Any]) -> Any:
    """Path and body of a streamed request; `extra` is added to those whose length is open."""
    path, body = FEATURES[feature](seed)
    common = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if feature in LONG:
        return path, common | body | {"max_tokens": 4 * tokens}
    return path, common | body | {"max_tokens": tokens} | extra
