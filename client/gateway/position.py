"""Where the reader of a streamed answer is: the event's id, which comes back as `Last-Event-ID`.

The answer's id holds the seed, from which, with the request, the answer follows: any gateway makes
it again and goes on behind what was read. `Reader` counts what goes out. Knows neither chat nor
completions.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from client.gateway.errors import invalid

__all__ = ["Position", "Reader"]

_POSITION = re.compile(
    r"(?P<answer>(?P<prefix>[a-z]+-)(?P<seed>[0-9a-f]{16})[0-9a-f]{16}):(?P<events>\d{1,9})"
    r":(?P<atoms>\d{1,9}(-\d{1,9}){0,127})"
)
#: Beyond, an id would be longer than its event.
_MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Position:
    """What was read of one answer."""

    #: Its id: the endpoint's prefix, the seed as 16 hex digits, 16 random ones.
    answer: str
    #: Events read.
    events: int
    #: For each choice: characters of text and arguments read, and one for each call begun.
    read_atoms: tuple[int, ...]

    @classmethod
    def first(cls, prefix: str, seed: int, choices: int) -> Position:
        """Of a new answer."""
        return cls(f"{prefix}{seed:016x}{secrets.token_hex(8)}", 0, (0,) * choices)

    @classmethod
    def read(cls, prefix: str, text: str | None) -> Position | None:
        """From `Last-Event-ID`; raises GatewayError for what is no id of this endpoint's."""
        if text is None:
            return None
        found = _POSITION.fullmatch(text)
        if found is None or found["prefix"] != prefix:
            raise invalid("last-event-id", "`Last-Event-ID` is no id of an event of this endpoint.")
        atoms = tuple(map(int, found["atoms"].split("-")))
        return cls(found["answer"], int(found["events"]), atoms)

    @property
    def seed(self) -> int:
        """What the answer follows from, beside the request."""
        return int(self.answer.partition("-")[2][:16], 16)

    def atoms_of(self, choices: int) -> list[int]:
        """`read_atoms` for so many choices."""
        return [*self.read_atoms, *[0] * choices][:choices]


class Reader:
    """What the reader of a running answer has: nothing of it is sent again."""

    def __init__(self, position: Position, choices: int) -> None:
        self._events = position.events
        self._skip = position.atoms_of(choices)
        #: For each choice: atoms that the reader has or gets with the event in hand.
        self.sent = list(self._skip)
        #: To be filled with `next_id`; empty where too many choices run to say where each is.
        self.id_line = b""
        if choices <= _MAX_CHOICES:
            atoms = b"-".join([b"%d"] * choices)
            self.id_line = b"id: %b:%%d:%b\n" % (position.answer.encode(), atoms)

    def skipped(self, choice: int, atoms: int) -> int:
        """How many of the next atoms of a choice the reader has; the others count as sent."""
        left = self._skip[choice]
        if not left:
            self.sent[choice] += atoms
            return 0
        skipped = min(atoms, left)
        self._skip[choice] -= skipped
        self.sent[choice] += atoms - skipped
        return skipped

    def is_behind(self, choice: int) -> bool:
        """The choice is past everything that the reader had."""
        return not self._skip[choice]

    def next_id(self) -> tuple[int, ...]:
        """Of the event in hand."""
        self._events += 1
        return (self._events, *self.sent) if self.id_line else ()
