"""Where the reader of a streamed answer is: the event's id, which comes back as `Last-Event-ID`.

The answer's id holds the seed, from which, with the request, the answer follows: any gateway makes
it again and goes on behind what was read. `Reader` counts what goes out. Knows neither chat nor
completions.

What a choice sends is counted in two rows, each of which is the same however the answer was cut
into events: its *atoms* (in chat its role, then characters of text and of arguments and beginnings
of calls, then its finish reason) and the *tokens* whose log-probabilities it sends.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from client.gateway.errors import invalid

__all__ = ["Position", "Reader"]

_CHOICE = r"\d{1,9}(\.\d{1,9})?"
_POSITION = re.compile(
    r"(?P<answer>(?P<prefix>[a-z]+-)(?P<seed>[0-9a-f]{16})[0-9a-f]{16}):(?P<events>\d{1,9})"
    rf":(?P<choices>{_CHOICE}(-{_CHOICE}){{0,127}})(?P<usage>:usage)?"
)
#: Beyond, an id would be longer than its event.
_MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Position:
    """What was read of one answer."""

    #: Its id: the endpoint's prefix, the seed as 16 hex digits, 16 random ones.
    answer: str
    #: Events read.
    events: int = 0
    #: For each choice: atoms read.
    read_atoms: tuple[int, ...] = ()
    #: For each choice: tokens whose log-probabilities were read.
    read_tokens: tuple[int, ...] = ()
    #: The usage that follows all choices was read.
    read_usage: bool = False
    #: The id of the last event read, as it came.
    event_id: str = ""

    @classmethod
    def first(cls, prefix: str, seed: int) -> Position:
        """Of a new answer."""
        return cls(f"{prefix}{seed:016x}{secrets.token_hex(8)}")

    @classmethod
    def read(cls, prefix: str, text: str | None) -> Position | None:
        """From `Last-Event-ID`; raises GatewayError for an id that this endpoint did not give."""
        if text is None:
            return None
        found = _POSITION.fullmatch(text)
        if found is None or found["prefix"] != prefix:
            raise invalid(
                "last-event-id", "`Last-Event-ID` is not the id of an event of this endpoint."
            )
        choices = [choice.partition(".") for choice in found["choices"].split("-")]
        return cls(
            found["answer"],
            int(found["events"]),
            tuple(int(atoms) for atoms, _, _ in choices),
            tuple(int(tokens or 0) for _, _, tokens in choices),
            found["usage"] is not None,
            text,
        )

    @property
    def seed(self) -> int:
        """What the answer follows from, beside the request."""
        return int(self.answer.partition("-")[2][:16], 16)


class Reader:
    """What the reader of a running answer has: nothing of it is sent again."""

    def __init__(self, position: Position, choices: int, *, tokens: bool) -> None:
        """`tokens`: log-probabilities are sent."""
        self._events = position.events
        self._rows = 2 if tokens else 1
        atoms, read_tokens = position.read_atoms, position.read_tokens
        #: For each choice, in `_rows` places: what the reader has or gets with the event in hand.
        self._sent = [
            row[choice] if choice < len(row) else 0
            for choice in range(choices)
            for row in (atoms, read_tokens)[: self._rows]
        ]
        #: What of that has not come again yet.
        self._skip = list(self._sent)
        self.read_usage = position.read_usage
        #: To be filled with `next_id`; empty where too many choices run to say where each is.
        self.id_line = b""
        if choices <= _MAX_CHOICES:
            places = b"-".join([b".".join([b"%d"] * self._rows)] * choices)
            self.id_line = b"id: %b:%%d:%b%%b\n" % (position.answer.encode(), places)

    def skipped(self, choice: int, atoms: int) -> int:
        """How many of the next atoms of a choice the reader has; the others count as sent."""
        return self._take(choice * self._rows, atoms)

    def skipped_tokens(self, choice: int, tokens: int) -> int:
        """The same of tokens whose log-probabilities are sent."""
        return self._take(choice * self._rows + 1, tokens)

    def _take(self, place: int, count: int) -> int:
        left = self._skip[place]
        if not left:
            self._sent[place] += count
            return 0
        skipped = min(count, left)
        self._skip[place] -= skipped
        self._sent[place] += count - skipped
        return skipped

    def next_id(self, *, usage: bool = False) -> tuple[object, ...]:
        """Of the event in hand. `usage`: it is the one that follows all choices."""
        self._events += 1
        return (self._events, *self._sent, b":usage" if usage else b"") if self.id_line else ()
