"""How a model marks its thoughts, and the parser that follows from this for one answer.

The format is, in this order, the one that the worker was given (`--reasoning-parser`), the one that
the model ships (its tokenizer's response template), or that of the family that its chat template or
vocabulary shows. Otherwise answers are not split. Must never import torch; imports transformers
only for a response template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from broker.protocol.messages import Message, TextPart
from worker.engines.base import EngineLoadError
from worker.engines.common.answer_parser import (
    REASONING,
    AnswerParser,
    ChannelSplitter,
    Marks,
    MarkSplitter,
)
from worker.engines.common.typed_arguments import Tools

__all__ = [
    "FAMILIES",
    "AddedTokens",
    "AnswerFormat",
    "Begun",
    "MarkedThoughts",
    "added_tokens",
    "find_format",
    "parser_names",
]

NONE: Final = "none"
"""The value of `--reasoning-parser` for answers that are not split."""


@dataclass(frozen=True, slots=True)
class Begun:
    """The part of an answer that stands in the prompt, and what else its parser must know."""

    #: The end of the prompt's text, including what the template writes to begin an answer.
    tail: str
    #: The last message, if the answer continues it.
    message: Message | None = None
    #: The whole prompt, if it is the caller's own text.
    token_ids: Sequence[int] = ()
    #: The tools whose calls are looked for in the content.
    tools: Tools = field(default_factory=dict)
    #: Calls are found after this parser, in its content.
    calls_known: bool = False


class AnswerFormat(Protocol):
    """How a model writes an answer."""

    @property
    def name(self) -> str:
        """Its name, for people."""

    @property
    def special(self) -> tuple[str, ...]:
        """Special tokens that the parser must see."""

    @property
    def opening_ids(self) -> frozenset[int]:
        """Ids of the tokens that begin a thought."""

    @property
    def shown(self) -> bool:
        """Whether the model is known to think: its chat template or response template says so, or
        the worker was told. Marks in the vocabulary alone may be meant for other models of the
        family."""

    @property
    def closing(self) -> str | None:
        """What ends a thought and begins the answer; None: unknown."""

    @property
    def closing_before_call(self) -> str | None:
        """What ends a thought if a call must follow."""

    @property
    def calls_open(self) -> str:
        """What begins calls, if this parser reads them itself; empty: it does not."""

    def parser(self, begun: Begun) -> AnswerParser:
        """The parser for an answer that begins like this."""


@dataclass(frozen=True, slots=True)
class Family:
    """Models that mark their thoughts in the same way."""

    marks: Marks
    #: What they write between a mark and the thought.
    behind: str = "\n"
    #: The marks are plain words: only a chat template shows them.
    words: bool = False


def _pair(name: str, **more: Any) -> Family:
    """The common form: `<name>` and `</name>`."""
    return Family(Marks((f"<{name}>",), (f"</{name}>",)), **more)


FAMILIES: Final[dict[str, Family]] = {
    # Cohere Command A Reasoning
    "cohere": Family(Marks(("<|START_THINKING|>",), ("<|END_THINKING|>",)), behind=""),
    # Gemma 4
    "gemma4": Family(Marks(("<|channel>thought\n",), ("<channel|>",)), behind=""),
    # Magistral, Ministral and later Mistral models
    "mistral": Family(Marks(("[THINK]",), ("[/THINK]",)), behind=""),
    # Seed-OSS
    "seed": _pair("seed:think"),
    # Kimi-VL-Thinking
    "kimi-vl": Family(Marks(("◁think▷",), ("◁/think▷",)), behind=""),
    # Apertus
    "apertus": Family(Marks(("<|inner_prefix|>",), ("<|inner_suffix|>",)), behind=""),
    "longcat": _pair("longcat_think"),
    # OpenThinker, Sky-T1
    "open-thoughts": Family(
        Marks(
            ("<|begin_of_thought|>",),
            ("<|end_of_thought|>",),
            ("<|begin_of_solution|>", "<|end_of_solution|>"),
        )
    ),
    # DeepSeek-R1 and V3.1, Qwen3, GLM-4.5, Kimi-K2-Thinking, MiniMax-M1 and M2, Nemotron,
    # Phi-4-reasoning, EXAONE 4, Hunyuan, ERNIE 4.5, Granite 3.3, SmolLM3, Olmo 3, InternS1, ...
    "think": _pair("think"),
    # EXAONE Deep
    "thought": _pair("thought", words=True),
    "thinking": _pair("thinking", words=True),
    "reasoning": _pair("reasoning", words=True),
    # Granite 3.2
    "granite": Family(
        Marks(
            ("Here is my thought process:", "Here's my thought process:"),
            ("Here is my response:", "Here's my response:"),
        ),
        words=True,
    ),
}
"""By name, in the order in which they are tried."""

HARMONY: Final = "harmony"

_WRAPS: Final = (("<answer>", "</answer>"), ("<response>", "</response>"))
"""What models that mark thoughts with `<think>` may write around the answer that follows: GLM-4.1V
and Hunyuan; ERNIE 4.5 and Granite 3.3."""


def parser_names() -> list[str]:
    """The values that `--reasoning-parser` accepts."""
    return [*FAMILIES, HARMONY, NONE]


def find_format(tokenizer: Any, template: str, name: str = "") -> AnswerFormat | None:
    """How a model writes its answers; None: as one text. `template`: the source of its chat
    template; `name`: the worker's `--reasoning-parser`. Raises `EngineLoadError` for an unknown
    name."""
    if name and name not in parser_names():
        raise EngineLoadError(
            f"--reasoning-parser {name}: there is no such parser; choose one of "
            + ", ".join(parser_names())
        )
    if name == NONE:
        return None
    added = added_tokens(tokenizer)
    shipped = getattr(tokenizer, "response_template", None)
    if shipped is not None and not name:
        from worker.engines.common.response_template import TemplateFormat

        return TemplateFormat(shipped, added)
    if name == HARMONY or (not name and {"<|channel|>", "<|message|>", "<|start|>"} <= set(added)):
        return _Channels(added)
    found = name or next(
        (known for known, family in FAMILIES.items() if _shows(family, template, added)), ""
    )
    if not found:
        return None
    marks = FAMILIES[found].marks
    if found == "think":
        wraps = next((wrap for wrap in _WRAPS if wrap[0] in template), None)
        marks = Marks(marks.opens, marks.closes, wraps)
    shown = bool(name) or any(mark in template for mark in (*marks.opens, *marks.closes))
    return MarkedThoughts(found, marks, FAMILIES[found].behind, added, shown=shown)


AddedTokens = dict[str, tuple[int, bool]]
"""Added tokens by their text: id, and whether it is special."""


def added_tokens(tokenizer: Any) -> AddedTokens:
    """The added tokens of a tokenizer."""
    tokens = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return {str(token.content): (int(i), bool(token.special)) for i, token in tokens.items()}


def _shows(family: Family, template: str, added: AddedTokens) -> bool:
    marks = (*family.marks.opens, *family.marks.closes)
    tokens = () if family.words else added
    return any(mark in template or mark.strip() in tokens for mark in marks)


def _special(marks: Sequence[str], added: AddedTokens) -> tuple[str, ...]:
    """The special tokens of which the marks consist."""
    return tuple(
        text for text, (_, special) in added.items() if special and any(text in m for m in marks)
    )


# --- formats --------------------------------------------------------------------------------------


class MarkedThoughts:
    """Thoughts between marks."""

    calls_open = ""

    def __init__(
        self, name: str, marks: Marks, behind: str, added: AddedTokens, *, shown: bool = True
    ) -> None:
        self.name = name
        self.shown = shown
        self.marks = marks
        #: What begins a thought, as the model writes it.
        self.opening = marks.opens[0] + behind
        self.special = _special((*marks.opens, *marks.closes, *(marks.wraps or ())), added)
        self.opening_ids = frozenset(added[mark][0] for mark in marks.opens if mark in added)
        self.closing: str | None = f"{behind}{marks.closes[0]}{behind * 2}"
        self.closing_before_call = self.closing
        self._close_ids = {added[mark][0] for mark in marks.closes if mark in added}

    def parser(self, begun: Begun) -> AnswerParser:
        tail = begun.tail.rstrip()
        if tail.endswith(tuple(mark.rstrip() for mark in self.marks.opens)):
            return AnswerParser(MarkSplitter(self.marks, opened=True))
        if begun.message is not None:
            opened = _ends_in_thought(begun.message, self.marks)
        elif begun.token_ids:
            opened = self._is_open(begun.token_ids)
        else:
            settled = tail.endswith(tuple(mark.rstrip() for mark in self.marks.closes))
            return AnswerParser(MarkSplitter(self.marks), settled=settled)
        return AnswerParser(MarkSplitter(self.marks, opened=opened, continues=True), continues=True)

    def _is_open(self, token_ids: Sequence[int]) -> bool:
        """Whether the last mark in a caller's own prompt opens a thought."""
        for token_id in reversed(token_ids):
            if token_id in self._close_ids:
                return False
            if token_id in self.opening_ids:
                return True
        return False


def _ends_in_thought(message: Message, marks: Marks) -> bool:
    """Whether an answer that continues this message continues its thought."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "".join(part.text for part in content if isinstance(part, TextPart))
    splitter = MarkSplitter(marks, opened=bool(message.reasoning_content) and not content)
    splitter.feed(content)
    return splitter.kind == REASONING


class _Channels:
    """Channels, as gpt-oss writes them."""

    name = HARMONY
    shown = True
    calls_open = ""

    def __init__(self, added: AddedTokens) -> None:
        self.special = _special(ChannelSplitter.MARKS, added)
        self.opening_ids = frozenset(i for text, (i, _) in added.items() if text == "<|channel|>")
        self.closing: str | None = "<|end|><|start|>assistant<|channel|>final<|message|>"
        self.closing_before_call: str | None = "<|end|><|start|>assistant"

    def parser(self, begun: Begun) -> AnswerParser:
        _, start, turn = begun.tail.rpartition("<|start|>")
        splitter = ChannelSplitter(start + turn if start else "", shows_calls=bool(begun.tools))
        continues = "<|message|>" in turn and not turn.endswith("<|message|>")
        return AnswerParser(splitter, continues=continues)
