"""What a decide request may ask (SPEC.md section 4.2): checked by the client before it sends, and
by the broker at the edge.

Values only. Which labels a model has for its answers is the worker's to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.limits import MAX_QUESTIONS
from broker.protocol.messages import Question, Request

__all__ = ["QUESTION_TYPES", "check"]

QUESTION_TYPES: Final = ("choice", "score", "noul")

_CRITERIA: Final = {
    "choice": "a map of at least one option to its description or null, as in "
    '{"calm": "A polite message", "angry": null}',
    "score": 'a list of at least one level, the lowest first, as in ["Can wait", "Today"]',
    "noul": 'null, or a map that describes "true", "false" or both',
}


def check(request: Request) -> None:
    """Raises `RequestError` that names the question, or the image, that cannot be answered."""
    questions = request.questions or {}
    if not questions:
        raise _invalid("questions", "no questions; ask at least one")
    if len(questions) > MAX_QUESTIONS:
        raise _invalid(
            "questions",
            f"{len(questions)} questions; a request asks at most {MAX_QUESTIONS}: send several",
        )
    if not _is_content(request.state):
        raise _invalid(
            "state", f"`state` is text, a map or a list, not {_type_name(request.state)}"
        )
    for name, question in questions.items():
        _check_question(name, question)
    _check_assets(request)


def _check_question(name: str, question: Question) -> None:
    kind, instructions = question.type, question.instructions
    where = f"questions.{name}"
    if kind not in QUESTION_TYPES:
        raise _invalid(
            where,
            f"question {name!r} has the unknown type {kind!r}; there are "
            f"{', '.join(QUESTION_TYPES)}",
        )
    if not (instructions is None or _is_content(instructions)):
        raise _invalid(
            where,
            f"`instructions` of question {name!r} are text, a map or a list, not "
            f"{_type_name(instructions)}",
        )
    if not question.criteria and kind != "noul":
        raise _invalid(
            where,
            f"question {name!r} has no allowed answers: its `criteria` are {_CRITERIA[kind]}",
        )
    if not _fits(kind, question.criteria):
        raise _invalid(where, f"`criteria` of question {name!r}, a {kind}, are {_CRITERIA[kind]}")


def _fits(kind: str, criteria: Any) -> bool:
    """Whether criteria have the form that a type of question asks for."""
    if kind == "score":
        return isinstance(criteria, list) and all(map(_is_content, criteria))
    if kind == "noul" and criteria is None:
        return True
    if not isinstance(criteria, dict) or (kind == "noul" and criteria.keys() - {"true", "false"}):
        return False
    return all(value is None or _is_content(value) for value in criteria.values())


def _check_assets(request: Request) -> None:
    """Every image stands somewhere, once or several times."""
    count = len(request.attachments)
    for name, index in request.assets.items():
        if index >= count:
            raise _invalid("assets", f"asset {name!r} is attachment {index}, there are {count}")
        if not any(name in text for text in _texts(request)):
            raise _invalid(
                "assets",
                f"asset {name!r} stands neither in the state nor in a question: write its name "
                "where the image belongs, or leave it out",
            )
    unnamed = set(range(count)).difference(request.assets.values())
    if unnamed:
        raise _invalid("assets", f"`assets` gives attachment {min(unnamed)} no name")


def _texts(request: Request) -> Iterator[str]:
    values: list[Any] = [request.state]
    for question in (request.questions or {}).values():
        values += [question.instructions, question.criteria]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list):
            values += value


def _is_content(value: Any) -> bool:
    return isinstance(value, str | dict | list)


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _invalid(parameter: str, message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message, details={"parameter": parameter})
