"""Keeps control tokens in a client's text from being read as tokens.

Tokenizers recognise control tokens and image placeholders anywhere in a text, so a document, a name
or a tool's description could open a turn or claim an image. A token is broken by a space after its
first character: the text still reads the same. Must never be used on a raw prompt, whose control
tokens are intended.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

__all__ = ["Breaker", "ControlTokens", "mark_text", "rewritten"]

Breaker = Callable[[str], str]
"""Rewrites one string from a client."""


def mark_text(holder: Any, name: str) -> str | None:
    """The text of a token that is an attribute of a tokenizer or processor."""
    token = getattr(holder, name, None)
    text = getattr(token, "content", token)
    return text if isinstance(text, str) and text else None


class ControlTokens:
    """The control tokens of one model and the placeholders of its processor.

    `template` is the source of its chat template: added tokens that it writes (`<tool_call>`) are
    control tokens too, even if the tokenizer does not declare them special. Those that surround the
    words of a plain conversation, rendered in `turns`, open and close turns and count as special
    whatever the tokenizer says (DeepSeek's are not declared). `more`: further control tokens.
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        template: str,
        more: Iterable[str] = (),
        turns: str = "",
    ) -> None:
        added = (getattr(tokenizer, "added_tokens_decoder", None) or {}).values()
        special = set(getattr(tokenizer, "all_special_tokens", None) or ())
        special |= {str(token.content) for token in added if token.special}
        special |= set(more)
        texts = {str(token.content) for token in added}
        special |= {text for text in texts if text in turns and not _has_pair(text, texts)}
        if processor is not None:
            names = {name for name in vars(processor) if name.endswith("_token")}
            names |= {"image_token", "video_token", "audio_token", "boi_token"}
            special |= {text for name in names if (text := mark_text(processor, name))}
        written = {str(token.content) for token in added if str(token.content) in template}
        # A single character cannot be broken by a space, and is not a control token of any model;
        # neither are the runs of spaces that some tokenizers list with them.
        self._special = _pattern(special)
        self._written = _pattern(special | written)
        tokens = [token for token in special | written if _breakable(token)]
        self._heads = {token[:size] for token in tokens for size in range(1, len(token))}
        self._tails = {token[-size:] for token in tokens for size in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)
        self._joined = "\0".join(tokens)

    def found(self, text: str) -> list[str]:
        """The control tokens in a text, in order."""
        return self._written.findall(text)

    def broken(self, text: str) -> str:
        """A turn's text with every special token broken. Control tokens that are not special stay:
        a model's own answers contain them, and so do prompts that explain a format."""
        return self._special.sub(_split, text)

    def all_broken(self, text: str) -> str:
        """A text that the author of the turns did not write, with every control token broken."""
        return self._written.sub(_split, text)

    def edges_broken(self, text: str) -> str:
        """The text, changed so that it cannot form a control token together with its neighbours:
        where it begins or ends with a piece of one, or is such a piece, the piece is broken. A word
        inside a token (`user`) is left alone: only a template could write what surrounds it."""
        places = set()
        for size in range(1, min(self._longest, len(text) + 1)):
            if text[-size:] in self._heads:
                places.add(len(text) - size + 1)
            if text[:size] in self._tails:
                places.add(size - 1)
        if len(text) < self._longest and _NO_WORD.search(text) and text in self._joined:
            places.add((len(text) + 1) // 2)
        for place in sorted(places, reverse=True):
            text = f"{text[:place]} {text[place:]}"
        return text


_NO_WORD = re.compile(r"[^\w\0]")


def rewritten(value: Any, breaker: Breaker) -> Any:
    """A JSON value with every string in it rewritten, including names of properties."""
    if isinstance(value, str):
        return breaker(value)
    if isinstance(value, dict):
        return {
            breaker(name) if isinstance(name, str) else name: rewritten(item, breaker)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [rewritten(item, breaker) for item in value]
    return value


def _has_pair(token: str, tokens: set[str]) -> bool:
    """Whether a token is one of a pair like `<think>` and `</think>`: such pairs occur within a
    turn, and models write them."""
    return token.startswith("</") or f"</{token[1:]}" in tokens


def _breakable(token: str) -> bool:
    return len(token.strip()) > 1


def _pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    words = sorted(filter(_breakable, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, words)) or "(?!)")  # (?!) never matches


def _split(match: re.Match[str]) -> str:
    token = match[0]
    first = len(token) - len(token.lstrip()) + 1
    return f"{token[:first]} {token[first:]}"
