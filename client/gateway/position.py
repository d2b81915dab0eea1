"""Where the reader of a streamed answer is: the event's id, which comes back as `Last-Event-ID`.

The answer's id holds the seed, from which, with the request, the answer follows: any gateway makes
it again and goes on behind what was read. Knows neither chat nor completions.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from client.gateway.errors import invalid

__all__ = ["Position"]

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
    def event_id(self) -> str | None:
        """None where too many choices run at once to say where each is."""
        if len(self.read_atoms) > _MAX_CHOICES:
            return None
        return f"{self.answer}:{self.events}:{'-'.join(map(str, self.read_atoms))}"

    @property
    def seed(self) -> int:
        """What the answer follows from, beside the request."""
        return int(self.answer.partition("-")[2][:16], 16)

    def atoms_of(self, choices: int) -> list[int]:
        """`read_atoms` for so many choices."""
        return [*self.read_atoms, *[0] * choices][:choices]
