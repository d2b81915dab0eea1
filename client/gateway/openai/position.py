"""The position of a reader in a streamed answer: the event's id, which comes back as
`Last-Event-ID`.

The answer's id contains the seed, which together with the request determines the answer: any
gateway can generate it again and continue after what was read. `Reader` counts what is sent. Knows
no API.

The output of a choice is counted in two ways, neither of which depends on how the answer was split
into events: *atoms* (in chat: its role, then characters of text and of arguments and beginnings of
calls, then its finish reason) and *tokens* whose log probabilities are sent. Where events have
numbers and repeat when the answer was begun (`/v1/responses`), its id tells the latter as well.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from client.gateway.errors import invalid

__all__ = ["Position", "Reader"]

_CHOICE = r"\d{1,9}(\.\d{1,9})?"
_POSITION = re.compile(
    r"(?P<answer>(?P<prefix>[a-z]+[-_])([0-9a-f]{8})?[0-9a-f]{32}):(?P<events>\d{1,9})"
    rf":(?P<choices>{_CHOICE}(-{_CHOICE}){{0,127}})(?P<usage>:usage)?"
)
#: With more choices, an id would be longer than its event.
_MAX_CHOICES = 128


@dataclass(frozen=True, slots=True)
class Position:
    """How much of one answer was read."""

    #: The answer's id: the endpoint's prefix, 8 hex digits for when it was begun if that is told,
    #: 16 for the seed, 16 random ones.
    answer: str
    #: Number of events read.
    events: int = 0
    #: For each choice: atoms read.
    read_atoms: tuple[int, ...] = ()
    #: For each choice: tokens whose log-probabilities were read.
    read_tokens: tuple[int, ...] = ()
    #: Whether the usage after all choices was read.
    read_usage: bool = False
    #: The id of the last event read, as received.
    event_id: str = ""

    @classmethod
    def first(cls, prefix: str, seed: int, created_s: int | None = None) -> Position:
        """The position at the start of a new answer. `created_s`: Unix time, where events repeat
        it."""
        created = "" if created_s is None else f"{created_s:08x}"
        return cls(f"{prefix}{created}{seed:016x}{secrets.token_hex(8)}")

    @classmethod
    def read(cls, prefix: str, text: str | None) -> Position | None:
        """Parse a `Last-Event-ID`. Raises GatewayError for an id that this endpoint
        did not issue."""
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
        """The seed that, with the request, determines the answer."""
        return int(self.answer[-32:-16], 16)

    @property
    def created_s(self) -> int:
        """When the answer was begun, Unix time; only of an answer whose id tells it."""
        return int(self.answer[-40:-32], 16)


class Reader:
    """What the reader of a running answer already has, so that it is not sent again."""

    def __init__(self, position: Position, choices: int, *, tokens: bool) -> None:
        """`tokens`: whether log probabilities are sent."""
        self._events = position.events
        self._rows = 2 if tokens else 1
        atoms, read_tokens = position.read_atoms, position.read_tokens
        #: Counts for each choice: what the reader has, or gets with the current event.
        self._sent = [
            row[choice] if choice < len(row) else 0
            for choice in range(choices)
            for row in (atoms, read_tokens)[: self._rows]
        ]
        #: The part of that which has not been generated again yet.
        self._skip = list(self._sent)
        self.read_usage = position.read_usage
        #: Format string for `next_id`; empty if there are too many choices to give a
        #: position for each.
        self.id_line = b""
        if choices <= _MAX_CHOICES:
            places = b"-".join([b".".join([b"%d"] * self._rows)] * choices)
            self.id_line = b"id: %b:%%d:%b%%b\n" % (position.answer.encode(), places)

    @property
    def events(self) -> int:
        """Events that the reader has or is sent."""
        return self._events

    def skipped(self, choice: int, atoms: int) -> int:
        """How many of the next atoms of a choice the reader already has; the others
        count as sent."""
        return self._take(choice * self._rows, atoms)

    def skipped_tokens(self, choice: int, tokens: int) -> int:
        """The same for tokens whose log probabilities are sent."""
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
        """The values for the id of the current event. `usage`: it is the one after all choices."""
        self._events += 1
        return (self._events, *self._sent, b":usage" if usage else b"") if self.id_line else ()
