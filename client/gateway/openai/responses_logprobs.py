"""Which tokens wrote the text of a response: its log-probabilities are of them, and not of the
tokens that mark a thought or a call, or are one.

What is told does not depend on how tokens and text arrive together: a response that is read on at
another gateway has each of them once. Must never tell a token twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from broker.protocol.messages import TokenLogprob

__all__ = ["TextTokens"]


class TextTokens:
    """Tokens that arrived, until their text shows whose they are."""

    def __init__(self) -> None:
        self._waiting: list[TokenLogprob] = []
        #: Text to come of tokens that are told already, bytes: the rest of a token may be held back
        #: until it is known not to begin a stop string.
        self._owed = 0

    def add(self, tokens: Iterable[TokenLogprob]) -> None:
        """Tokens of an event."""
        self._waiting += tokens

    def of(self, text: str, *, begins: bool, late: bool) -> list[TokenLogprob]:
        """The tokens of a text. `begins`: it is the first of its message, so that tokens before it
        are none of it. `late`: other parts came before it in this event."""
        data = text.encode()
        paid = min(self._owed, len(data))
        self._owed -= paid
        data = data[paid:]
        if not data:
            return []
        starts = range(len(self._waiting))
        for start in reversed(starts) if late else starts:
            end = self._end(start, data)
            if end is not None:
                break
        else:
            # A tokenizer that does not write its tokens as they are: by size alone.
            start, end = self._last(len(data)) if begins or late else 0, len(self._waiting)
        told = self._waiting[start if begins else 0 : end]
        del self._waiting[:end]
        return told

    def rest(self) -> list[TokenLogprob]:
        """The tokens without a text at the end of a message, as that of its end."""
        told, self._waiting = self._waiting, []
        return told

    def drop(self) -> None:
        """No text is written now: what waits were marks."""
        self._waiting, self._owed = [], 0

    def _end(self, start: int, data: bytes) -> int | None:
        """Behind the last token of this text if its first one is at `start`; None if it is not."""
        at = 0
        for index in range(start, len(self._waiting)):
            token, left = self._waiting[index].token, data[at:]
            if index == start and not data.startswith(b" "):
                # Some tokenizers' texts begin without the space of their first token.
                token = token.lstrip(b" ")
            if token and left.startswith(token):
                at += len(token)
            elif token.startswith(left):
                self._owed = len(token) - len(left)
                at = len(data)
            if at == len(data):
                return index + 1
            if at == 0:
                return None
        return None

    def _last(self, size_bytes: int) -> int:
        """Where the last tokens begin that have so many bytes."""
        at = len(self._waiting)
        while at and size_bytes > 0:
            at -= 1
            size_bytes -= len(self._waiting[at].token)
        return at
