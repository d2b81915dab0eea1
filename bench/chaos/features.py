"""Requests that use every feature together, and how a caller assembles the answers.

Schemas, tools, thoughts, logprobs, stop strings, images, several choices and LoRA adapters, at the
gateway's chat, completions and responses endpoints, with the demo model. Every request is greedy or
has a seed, so its answer is the same whenever and wherever it is generated.

`python -m bench.chaos.features FOLDER` writes the adapters (run as its own process, since it
imports torch).
"""

from __future__ import annotations

import base64
import io
import json
import random
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.shapes import paint_tool, shape_schema
from worker.demo.pictures import make_scene, render

MODEL: Final = "demo"
ENDS: Final = ("completed", "incomplete", "failed")
"""Names of a response's last event."""
ADAPTERS: Final = ("tuned", "tuned-too")
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
RESPONSES: Final = "/v1/responses"
CHAT_TEMPLATE: Final = """{{ bos_token }}
{%- if tools %}{{ '<|user|>tools: ' + (tools | tojson) + '<|end|>' }}{% endif %}
{%- for message in messages %}{{ '<|' + message['role'] + '|>' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- elif message['content'] %}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}
{%- endif %}
{%- for call in message['tool_calls'] or () %}
{{- '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}{% endfor %}
{{- '<|end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' + ('<think>' if thinking else '') }}{% endif %}"""
"""The demo model's own template does not mention tools, so tools would be refused. With this one
the model can also think: its thought is whatever it writes before its budget ends."""

_THINKS: Final = {"chat_template_kwargs": {"thinking": True}, "thinking_tokens": 24}

_SCHEMA: Final = shape_schema(colour={"type": "string", "enum": ["red", "blue", "green"]})
_TOOL: Final = paint_tool(12, 16)


# --- requests -------------------------------------------------------------------------------------


def request_of(lane: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """Path and body of a lane's request, with at most `tokens` tokens a choice.

    There are nine kinds, each with the base model and both adapters in turn. A lane always has the
    same request.
    """
    kind, variant = lane % len(_KINDS), lane // len(_KINDS)
    path, body = _KINDS[kind](variant, tokens)
    model = (MODEL, *ADAPTERS)[(lane + variant) % (1 + len(ADAPTERS))]
    common: dict[str, Any] = {"model": model, "seed": 100 + lane, "stream": True}
    if path != RESPONSES and body.get("stream", True):
        common["stream_options"] = {"include_usage": True}
    return path, common | body


def _user(text: str, images: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": _data_url(seed + number)}}
        for number in range(images)
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _data_url(seed: int) -> str:
    rng = random.Random(seed)
    stream = io.BytesIO()
    render(make_scene(rng), rng, rng.choice((144, 192, 224))).save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def _images_with_logprobs(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    return CHAT, {
        "messages": _user("What is in each image?", 1 + variant % 3, variant),
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 3,
    }


def _schema(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    return CHAT, {
        "messages": _user("Describe the image.", 1, variant),
        "max_tokens": 4 * tokens,
        "temperature": 0.9,
        "response_format": {"type": "json_schema", "json_schema": _SCHEMA},
        "logprobs": True,
        "n": 2,
        **(_THINKS if variant % 2 else {}),
    }


def _tools(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    return CHAT, {
        "messages": _user(f"Paint shape {variant}."),
        "max_tokens": 4 * tokens,
        "temperature": 0.8,
        "tools": [_TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "n": 2,
        **({} if variant % 2 else _THINKS),
    }


def _choices_with_stops(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    return CHAT, {
        "messages": _user(f"Count to {20 + 5 * (variant % 3)}."),
        "n": 3,
        "max_tokens": tokens,
        "temperature": 1.1,
        "top_p": 0.95,
        "presence_penalty": 0.2,
        "min_tokens": tokens * 2 // 3,
        "stop": ["zebra!", "23, 24", "xyz"],
        "logprobs": True,
        "top_logprobs": 1,
    }


def _completion(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {
        "prompt": [f"Once upon a time {variant}", "A red circle"],
        "n": 2,
        "max_tokens": tokens,
        "min_tokens": tokens // 2,
        "temperature": 0.7,
        "frequency_penalty": 0.3,
        "stop": ["quagga"],
        "logprobs": 2,
    }


def _tools_and_images(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    named = {"type": "function", "function": {"name": "paint"}}
    return CHAT, {
        "messages": _user("Paint what you see.", 2, variant),
        "max_tokens": 4 * tokens,
        "temperature": 0.8,
        "repetition_penalty": 1.1,
        "tools": [_TOOL],
        "tool_choice": named,
    }


def _written_call(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """A tool call in the text, which a grammar makes the model write after its thought."""
    call = r'<tool_call>\{"name": "paint", "arguments": \{"where": "[a-z ]{40,60}"\}\}</tool_call>'
    return CHAT, {
        "messages": _user(f"Think, then paint shape {variant}."),
        "max_tokens": 4 * tokens,
        "temperature": 0.9,
        "tools": [_TOOL],
        "structured_outputs": {"regex": f"[A-Z][a-z ]{{8,16}}\\. {call}"},
        "n": 2,
        **_THINKS,
    }


def _response(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    return RESPONSES, {
        "input": f"Think, then paint shape {variant}.",
        "max_output_tokens": 4 * tokens,
        "temperature": 0.9,
        "tools": [{"type": "function", **_TOOL["function"]}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        **_THINKS,
    }


def _unstreamed(variant: int, tokens: int) -> tuple[str, dict[str, Any]]:
    path, body = (_schema, _tools)[variant % 2](variant, tokens)
    return path, body | {"stream": False}


_KINDS: Final = (
    _images_with_logprobs,
    _schema,
    _tools,
    _choices_with_stops,
    _completion,
    _tools_and_images,
    _written_call,
    _response,
    _unstreamed,
)


# --- answers --------------------------------------------------------------------------------------


@dataclass
class _Choice:
    reasoning: str = ""
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    calls: dict[int, list[str]] = field(default_factory=dict)
    roles: int = 0
    finish_reasons: list[str] = field(default_factory=list)


class Heard:
    """An answer assembled from the chunks of a stream."""

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}
        self._usage: list[Any] = []
        #: The number of the next event of `/v1/responses`.
        self._next = 0
        self.chunks = 0

    def add(self, chunk: dict[str, Any]) -> None:
        """Add one decoded chunk or event, or an answer that was not streamed.

        Raises `ValueError` for an error within the stream, and for an event that is lost or
        doubled.
        """
        if chunk.get("error"):
            raise ValueError(json.dumps(chunk["error"]))
        self.chunks += 1
        if "type" in chunk:
            self._add_event(chunk)
            return
        if usage := chunk.get("usage"):
            usage.get("prompt_tokens_details", {}).pop("cached_tokens", None)
            self._usage.append(usage)
        for part in chunk["choices"]:
            choice = self._choices.setdefault(part["index"], _Choice())
            delta = part.get("delta") or part.get("message") or part
            choice.text += delta.get("content") or delta.get("text") or ""
            choice.reasoning += delta.get("reasoning_content") or ""
            choice.roles += "role" in delta
            if part.get("finish_reason"):
                choice.finish_reasons.append(part["finish_reason"])
            for place, call in enumerate(delta.get("tool_calls") or ()):
                entry = choice.calls.setdefault(call.get("index", place), ["", ""])
                entry[0] += call["function"].get("name") or ""
                entry[1] += call["function"].get("arguments") or ""
            _add_logprobs(choice, part.get("logprobs"))

    def _add_event(self, event: dict[str, Any]) -> None:
        """One event of `/v1/responses`; each output item counts as a choice."""
        number, self._next = self._next, event["sequence_number"] + 1
        if event["sequence_number"] != number:
            raise ValueError(f"event {event['sequence_number']} came instead of {number}")
        kind = event["type"].removeprefix("response.")
        if kind in ENDS:
            if kind == "failed":
                raise ValueError(json.dumps(event["response"]["error"]))
            usage = event["response"]["usage"]
            usage.get("input_tokens_details", {}).pop("cached_tokens", None)
            self._usage.append(usage)
        if "output_index" not in event:
            return
        choice = self._choices.setdefault(event["output_index"], _Choice())
        if kind == "output_text.delta":
            choice.text += event["delta"]
        elif kind == "reasoning_text.delta":
            choice.reasoning += event["delta"]
        elif kind == "function_call_arguments.delta":
            choice.calls.setdefault(0, ["", ""])[1] += event["delta"]
        elif kind == "output_item.added":
            choice.roles += 1
            if event["item"]["type"] == "function_call":
                choice.calls[0] = [event["item"]["name"], ""]
        elif kind == "output_item.done":
            choice.finish_reasons.append(event["item"]["status"])

    @property
    def token_ids(self) -> list[int]:
        """A number for each token that came with a logprob, choice by choice."""
        return [
            zlib.crc32(token.encode())
            for _, choice in sorted(self._choices.items())
            for token in choice.tokens
        ]

    def flows(self) -> dict[int, tuple[list[str], list[str]]]:
        """By choice: its texts (content, thought, name and arguments of each call), finish
        reasons."""
        return {
            index: (
                [choice.text, choice.reasoning]
                + [part for _, call in sorted(choice.calls.items()) for part in call],
                choice.finish_reasons,
            )
            for index, choice in sorted(self._choices.items())
        }

    @property
    def usage(self) -> list[Any]:
        """The token counts that were reported, without cached ones."""
        return self._usage

    def text(self) -> str:
        """Everything else in one text: content, calls, roles, finish reasons, usage.

        Equal answers give equal texts, however they were cut into chunks and whatever was cached.
        """
        choices = [
            [
                index,
                choice.reasoning,
                choice.text,
                sorted(choice.calls.items()),
                choice.roles,
                choice.finish_reasons,
            ]
            for index, choice in sorted(self._choices.items())
        ]
        return json.dumps({"choices": choices, "usage": self._usage}, sort_keys=True)

    @property
    def logprobs(self) -> list[float]:
        """The logprobs, in the order of `token_ids`."""
        return [value for _, choice in sorted(self._choices.items()) for value in choice.logprobs]


def _add_logprobs(choice: _Choice, logprobs: Any) -> None:
    if not logprobs:
        return
    if "content" in logprobs:
        for entry in logprobs["content"] or ():
            choice.tokens.append(entry["token"])
            choice.logprobs.append(entry["logprob"])
    else:
        choice.tokens += logprobs["tokens"]
        choice.logprobs += logprobs["token_logprobs"]


def same_logprobs(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether these can be of the same answer; neighbours in the batch change the last digits."""
    return len(one) == len(other) and all(
        abs(a - b) < 0.02 for a, b in zip(one, other, strict=True)
    )


# --- adapters -------------------------------------------------------------------------------------


def write_adapters(folder: Path) -> str:
    """Write two LoRA adapters of the demo model, with weights drawn from a seed.

    Returns the value of `--engine-arg adapters=`.
    """
    import peft
    import torch
    from transformers import LlavaForConditionalGeneration

    from worker.demo import model_path

    named = []
    for number, name in enumerate(ADAPTERS):
        model = LlavaForConditionalGeneration.from_pretrained(model_path(), dtype=torch.float32)
        torch.manual_seed(number)
        modules = ["q_proj", "v_proj"] if number == 0 else ["o_proj", "down_proj"]
        target = rf".*language_model.*\.({'|'.join(modules)})"
        tuned = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=target)
        )
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        tuned.save_pretrained(folder / name)
        named.append(f"{name}={folder / name}")
    return ",".join(named)


if __name__ == "__main__":
    print(write_adapters(Path(sys.argv[1])))
