"""Requests to the engine in front of a server, and what its events say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("httpx2")

from broker.protocol.messages import (
    Message,
    Params,
    Piece,
    Request,
    Resume,
    new_id,
)
from tests.harness import wait_until
from worker.engines.base import (
    Ended,
    EngineEvent,
    Failed,
    Job,
    Tokens,
)
from worker.engines.openai.engine import OpenAIEngine

GREEDY = Params(temperature=0, max_tokens=12)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def ask(text: str, params: Params = GREEDY, **fields: Any) -> Request:
    fields.setdefault("messages", [Message(role="user", content=text)])
    return Request(model="stand-in", params=params, window=1 << 20, **fields)


def run(
    engine: OpenAIEngine, request: Request, *attachments: bytes, most: int | None = None
) -> list[EngineEvent]:
    """All events of a request; cancelled after `most` events with tokens."""
    id_ = new_id()
    engine.add(Job(id_, request, attachments))
    events: list[EngineEvent] = []

    def over() -> bool:
        events.extend(engine.step())
        if most is not None and sum(isinstance(e, Tokens) for e in events) >= most:
            engine.cancel(id_)
        return bool(events) and isinstance(events[-1], Ended | Failed)

    wait_until(over, "the end of the request")
    assert not engine.busy
    return events


def text_of(events: list[EngineEvent]) -> str:
    return "".join(e.text for e in events if isinstance(e, Tokens | Ended))


def ids_of(events: list[EngineEvent]) -> list[int]:
    return [id_ for e in events if isinstance(e, Tokens) for id_ in e.token_ids]


def pieces_of(events: list[EngineEvent]) -> list[tuple[str, str]]:
    pieces: list[Piece] = []
    for event in events:
        if isinstance(event, Tokens | Ended):
            given = event.pieces or ([Piece("content", event.text)] if event.text else [])
            for piece in given:
                if pieces and pieces[-1].kind == piece.kind:
                    pieces[-1] = Piece(piece.kind, pieces[-1].text + piece.text)
                else:
                    pieces.append(piece)
    return [(piece.kind, piece.text) for piece in pieces]


def end_of(events: list[EngineEvent]) -> Ended:
    assert isinstance(events[-1], Ended), events[-1]
    return events[-1]


def failure_of(events: list[EngineEvent]) -> Any:
    assert isinstance(events[-1], Failed), events[-1]
    return events[-1].error


def resumed(request: Request, ids: list[int], characters: int) -> Request:
    fields = {name: getattr(request, name) for name in request.__struct_fields__}
    fields["resume"] = Resume(epoch=1, token_ids=ids, text_characters=characters)
    return Request(**fields)


Build = Callable[..., OpenAIEngine]
