"""Decisions: typed questions about a state and its images, and their typed answers.

Makes the fields of a request and reads the answers; no sockets and no state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from broker.protocol.messages import Usage
from client.core.events import End
from client.errors import BrokenProtocol, InvalidRequest
from client.images import Image

__all__ = ["Answer", "ChoiceAnswer", "Decisions", "NoulAnswer", "ScoreAnswer"]


class _Answer(msgspec.Struct, frozen=True, tag_field="type", kw_only=True):
    pass


class ChoiceAnswer(_Answer, frozen=True, tag="choice", kw_only=True):
    """The answer to a question of type choice."""

    type: ClassVar[str] = "choice"
    #: The likeliest option.
    choice: str
    #: 0 where all options are equally likely, 1 where one is certain.
    confidence: float
    #: Of every option; together 1.
    probabilities: dict[str, float]


class ScoreAnswer(_Answer, frozen=True, tag="score", kw_only=True):
    """The answer to a question of type score."""

    type: ClassVar[str] = "score"
    #: The expected level: 0 is the first, and it may lie between two.
    score: float
    #: 0 where all levels are equally likely, 1 where one is certain.
    confidence: float
    #: Of every level, by its number as text ("0", "1", ...); together 1.
    probabilities: dict[str, float]
    #: What each level means, by the same numbers.
    legend: dict[str, Any]


class NoulAnswer(_Answer, frozen=True, tag="noul", kw_only=True):
    """The answer to a question of type noul, which is true or false."""

    type: ClassVar[str] = "noul"
    #: Probability of true.
    noul: float

    @property
    def probabilities(self) -> dict[str, float]:
        """Of "true" and "false"."""
        return {"true": self.noul, "false": 1.0 - self.noul}


Answer = ChoiceAnswer | ScoreAnswer | NoulAnswer


@dataclass(frozen=True, slots=True)
class Decisions(Mapping[str, Answer]):
    """The answers to the questions of one request, by the names of the questions."""

    answers: dict[str, Answer]
    usage: Usage
    model: str
    worker: str

    def __getitem__(self, name: str) -> Answer:
        return self.answers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.answers)

    def __len__(self) -> int:
        return len(self.answers)


def decisions_from(end: End, questions: Mapping[str, Any]) -> Decisions:
    """The answers that a worker gave to `questions`. Raises `BrokenProtocol` for malformed ones."""
    try:
        answers = msgspec.convert((end.result or {}).get("answers"), dict[str, Answer])
    except msgspec.ValidationError as error:
        raise BrokenProtocol(f"worker {end.worker!r} sent malformed answers: {error}") from None
    if answers.keys() != questions.keys():
        raise BrokenProtocol(f"worker {end.worker!r} answered other questions than were asked")
    return Decisions({name: answers[name] for name in questions}, end.usage, end.model, end.worker)


def named_images(
    state: Any, questions: Any, images: Mapping[str, Image] | Sequence[Image]
) -> tuple[Any, dict[str, Image]]:
    """The state, and the images by the text that each stands for. Those of a list are called
    `<image-1>`, `<image-2>`, ...; what is named nowhere goes before the text of the state."""
    if isinstance(images, Mapping):
        return state, dict(images)
    named = {f"<image-{index}>": image for index, image in enumerate(images, 1)}
    written = repr((state, questions))
    unnamed = [name for name in named if name not in written]
    if not unnamed:
        return state, named
    if not isinstance(state, str):
        raise InvalidRequest(
            f"{unnamed[0]} is named nowhere: write it into the state, which is no text, where the "
            "image belongs; or give images as a dict from such names"
        )
    return "".join(unnamed) + "\n" + state, named
