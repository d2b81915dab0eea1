"""The objects of Ollama's answers, from the bus's events: chunks, whole answers, errors.

A call of a tool is told once it is complete, because its arguments are an object; a call that was
cut is text. Must never talk to the bus.
"""

from __future__ import annotations

import datetime
import time
from typing import Any, Final

import msgspec

from broker.protocol import tool_parser as tools
from broker.protocol.errors import ErrorCode
from broker.protocol.messages import TokenLogprob
from client.core.events import End
from client.gateway.errors import GatewayError
from client.gateway.openai.answers import IMPOSSIBLE, ChatChoice, Thought
from client.gateway.openai.generation import ChoiceEvent, Delta, Finish

__all__ = ["Answer", "error_line", "error_object", "moment"]

_JSON: Final = msgspec.json.Encoder()


def moment(at_s: float) -> str:
    """A time since the epoch as Ollama writes it."""
    at = datetime.datetime.fromtimestamp(at_s, datetime.UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def error_object(error: GatewayError, request_id: str | None) -> dict[str, Any]:
    """An error in Ollama's shape: its text, and beside it what programs can act on."""
    message = error.info.message
    if error.info.code == ErrorCode.MODEL_UNAVAILABLE and "not found" not in message:
        # Programs look for these words.
        message = f"model not found: {message}"
    told: dict[str, Any] = {"error": message, "code": error.info.code}
    if error.param is not None:
        told["param"] = error.param
    if request_id is not None:
        told["request_id"] = request_id
    return told


def error_line(error: GatewayError) -> bytes:
    """The last line of a stream that failed."""
    return _JSON.encode(error_object(error, None)) + b"\n"


class Answer:
    """One answer in progress."""

    def __init__(self, model: str, *, of_chat: bool) -> None:
        """`model`: as the caller named it. `of_chat`: a message, or the text of `generate`."""
        self._model = model
        self._of_chat = of_chat
        self._began_s = time.monotonic()
        self._told_calls = 0
        self._end: End | None = None
        self.choice = ChatChoice(None)
        self.has_begun = False

    def read_with(self, parser: tools.ToolCallParser | None) -> None:
        """Look for calls with this parser; None: the worker does, or there are none."""
        self.choice = ChatChoice(parser)

    def take(self, event: ChoiceEvent) -> list[dict[str, Any]]:
        """Account for an event; returns what is new as fields of a message."""
        news: list[dict[str, Any]] = []
        parts = self.choice.take(event)
        self.has_begun |= isinstance(event, Delta)
        for part in parts:
            if isinstance(part, tools.Text):
                news.append({"content": part.text})
            elif isinstance(part, Thought):
                news.append({"thinking": part.text})
            elif isinstance(part, tools.CallStart):
                news += self._calls(part.index)
        if isinstance(event, Finish):
            self._end = event.end
            news += self._calls(len(self.choice.calls))
        return news

    def _calls(self, until: int) -> list[dict[str, Any]]:
        """The calls before this one that were not told yet."""
        first, self._told_calls = self._told_calls, until
        return [self._call(index) for index in range(first, until)]

    def _call(self, index: int) -> dict[str, Any]:
        call = self.choice.calls[index]
        try:
            arguments = msgspec.json.decode(call.arguments or "{}", type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            return {"content": f'{{"name": "{call.name}", "arguments": {call.arguments}'}
        function = {"index": index, "name": call.name, "arguments": arguments}
        return {"tool_calls": [{"id": call.id, "function": function}]}

    def told(self, event: ChoiceEvent) -> list[bytes]:
        """The lines of a stream for an event."""
        news = self.take(event)
        logprobs: list[TokenLogprob] | None = None
        if isinstance(event, Delta):
            logprobs = event.logprobs
        if logprobs and not news:
            news = [{}]
        lines = []
        for said in news:
            beside = {"logprobs": _logprobs(logprobs)} if logprobs else {}
            logprobs = None
            lines.append(self._line({**self._said(said), "done": False, **beside}))
        if isinstance(event, Finish):
            lines.append(self._line({**self._said({}), **self._figures()}))
        return lines

    def nothing_new(self) -> bytes:
        """A line that adds nothing, for readers and proxies that wait."""
        return self._line({**self._said({}), "done": False})

    def whole(self) -> dict[str, Any]:
        """The answer that is not streamed."""
        said: dict[str, Any] = {"content": self.choice.text}
        if self.choice.reasoning:
            said["thinking"] = self.choice.reasoning
        for one in (self._call(index) for index in range(len(self.choice.calls))):
            if "content" in one:
                said["content"] += one["content"]
            else:
                said.setdefault("tool_calls", []).extend(one["tool_calls"])
        logprobs = self.choice.logprobs
        beside = {"logprobs": _logprobs(logprobs)} if logprobs else {}
        return {**self._head(), **self._said(said), **self._figures(), **beside}

    def _line(self, fields: dict[str, Any]) -> bytes:
        return _JSON.encode({**self._head(), **fields}) + b"\n"

    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": moment(time.time())}

    def _said(self, said: dict[str, Any]) -> dict[str, Any]:
        if self._of_chat:
            return {"message": {"role": "assistant", "content": "", **said}}
        more = {"thinking": said["thinking"]} if "thinking" in said else {}
        return {"response": said.get("content", ""), **more}

    def _figures(self) -> dict[str, Any]:
        end, usage = self._end, self.choice.usage
        assert end is not None and usage is not None
        length = self.choice.openai_finish_reason == "length"
        # Not of Ollama's API.
        how = {"continued": end.continued} if end.continued else {}
        return {
            **how,
            "done": True,
            "done_reason": "length" if length else "stop",
            "total_duration": round((time.monotonic() - self._began_s) * 1e9),
            "load_duration": round(end.timings.queue_ms * 1e6),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round(end.timings.prefill_ms * 1e6),
            "eval_count": usage.completion_tokens,
            "eval_duration": round(end.timings.decode_ms * 1e6),
        }


def _logprobs(tokens: list[TokenLogprob]) -> list[dict[str, Any]]:
    def one(token: bytes, logprob: float | None) -> dict[str, Any]:
        finite = IMPOSSIBLE if logprob is None else max(logprob, IMPOSSIBLE)
        text = token.decode(errors="replace")
        return {"token": text, "logprob": finite, "bytes": list(token)}

    return [
        {
            **one(token.token, token.logprob),
            **({"top_logprobs": [one(t.token, t.logprob) for t in token.top]} if token.top else {}),
        }
        for token in tokens
    ]
