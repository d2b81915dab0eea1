"""An answer as content blocks: from the pieces of the bus to blocks that open, grow and close.

One block is open at a time, as the stream helpers of Anthropic's SDKs want it. White space alone
between calls or around thoughts is no block: Anthropic's API refuses such a block where a client
sends it back. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import from_json

from broker.protocol import tool_parser as tools
from client.gateway.anthropic.signature import Signer
from client.gateway.openai.answers import Part, Thought, new_id

__all__ = ["Blocks", "Closed", "Grown", "Opened", "Step"]

Kind = Literal["text", "thinking", "tool_use"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A block begins; as the stream shows it, without what will be in it."""

    block: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Grown:
    """The open block's text, thought or arguments go on."""

    kind: Kind
    text: str


@dataclass(frozen=True, slots=True)
class Closed:
    """The open block is over."""

    #: Of a thought.
    signature: str = ""


Step = Opened | Grown | Closed


class Blocks:
    """Makes the blocks of one answer."""

    def __init__(self, signer: Signer, *, thoughts: Literal["shown", "omitted", "none"]) -> None:
        """`thoughts`: "omitted" has a thought's block without its text, "none" no block at all."""
        self._signer = signer
        self._thoughts = thoughts
        self._open: Kind | None = None
        #: Of the open block.
        self._texts: list[str] = []
        #: White space at the beginning of a text that may be no block.
        self._held = ""
        #: The blocks that are complete.
        self.content: list[dict[str, Any]] = []

    def take(self, parts: Sequence[Part]) -> list[Step]:
        """What new pieces change."""
        steps: list[Step] = []
        for part in parts:
            match part:
                case tools.Text(text=text):
                    self._say(text, steps)
                case Thought(text=text):
                    self._think(text, steps)
                case tools.CallStart(name=name):
                    self._begin({"type": "tool_use", "id": new_id("toolu_"), "name": name}, steps)
                case tools.Arguments(text=text):
                    self._grow("tool_use", text, steps)
        return steps

    def finish(self) -> list[Step]:
        """What the answer's end changes."""
        steps: list[Step] = []
        if self._held and not self.content and self._open is None:
            # All that there is.
            text = self._held
            self._begin({"type": "text"}, steps)
            self._grow("text", text, steps)
        self._close(steps)
        return steps

    def _say(self, text: str, steps: list[Step]) -> None:
        if self._open != "text":
            text = self._held + text
            if not text.strip():
                self._held = text
                return
            self._begin({"type": "text"}, steps)
        self._grow("text", text, steps)

    def _think(self, text: str, steps: list[Step]) -> None:
        if self._thoughts == "none":
            return
        if self._open != "thinking":
            self._begin({"type": "thinking"}, steps)
        self._grow("thinking", text, steps)

    def _begin(self, block: dict[str, Any], steps: list[Step]) -> None:
        self._close(steps)
        self._held = ""
        kind: Kind = block["type"]
        self._open = kind
        self.content.append(block)
        empty: dict[Kind, dict[str, Any]] = {
            "text": {"text": ""},
            "thinking": {"thinking": "", "signature": ""},
            "tool_use": {"input": {}},
        }
        steps.append(Opened({**block, **empty[kind]}))

    def _grow(self, kind: Kind, text: str, steps: list[Step]) -> None:
        self._texts.append(text)
        if text and not (kind == "thinking" and self._thoughts == "omitted"):
            steps.append(Grown(kind, text))

    def _close(self, steps: list[Step]) -> None:
        if self._open is None:
            return
        block, text = self.content[-1], "".join(self._texts)
        signature = ""
        match self._open:
            case "text":
                block["text"] = text
            case "thinking":
                omitted = self._thoughts == "omitted"
                signature = self._signer.sign(text, carry=omitted)
                block |= {"thinking": "" if omitted else text, "signature": signature}
            case "tool_use":
                block["input"] = _arguments(text)
        self._open, self._texts = None, []
        steps.append(Closed(signature))


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. Of one that was cut what is certain, as Anthropic's SDKs read it in
    a stream; the stop reason tells that it was cut."""
    try:
        found = from_json(text or "{}", allow_partial=True)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
