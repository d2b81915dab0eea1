"""The wrong messages of wrong.json as cases: each is sent, and the reaction is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from tests.conformance.broker_sessions import refused
from tests.conformance.broker_stage import BrokerScene
from tests.conformance.client_stage import ClientStage
from tests.conformance.verdicts import CASES, Broken, Case
from tests.conformance.wire import Peer, Session
from tests.conformance.worker_stage import WorkerStage
from tests.protocol.make_golden import GOLDEN
from tests.protocol.wrong_base import (
    ANSWERS,
    CANCELLED,
    DROPS,
    ENDS,
    FAILS,
    FOR_GOOD,
    REFUSES,
    REQUEST,
    RESUMES,
    ROUTE,
    SESSION,
    TAKES,
    Wrong,
)
from tests.protocol.wrong_messages import wrong_messages

_GOLDEN: Final[dict[str, list[str]]] = json.loads(GOLDEN.read_text())


def _with_ids(
    frames: tuple[bytes, ...], session: bytes, request: bytes = b"", route: bytes = b""
) -> list[bytes]:
    """The frames with the current ids instead of the golden ones."""
    replaced = []
    for frame in frames:
        for old, new in ((SESSION, session), (REQUEST, request), (ROUTE, route)):
            frame = frame.replace(old, new) if new else frame
        replaced.append(frame)
    return replaced


# --- a broker -------------------------------------------------------------------------------------


def _to_broker(wrong: Wrong) -> Callable[[BrokerScene], None]:
    def play(scene: BrokerScene) -> None:
        role = "worker" if any("worker" in name for name in wrong.after) else "client"
        peer = scene.peer(role)
        peer.connect()
        for name in wrong.after:
            peer.raw([bytes.fromhex(frame) for frame in _GOLDEN[name]])
            got = peer.expect(T.WELCOME, rule="S3")
            peer.id = got.id
        peer.raw(_with_ids(wrong.frames, peer.id))
        _broker_answers(scene, peer, wrong)

    return play


def _broker_answers(scene: BrokerScene, peer: Peer, wrong: Wrong) -> None:
    rule = wrong.rule
    id_ = wrong.frames[0][8:24]
    if wrong.does in (REFUSES, FOR_GOOD):
        # A malformed HELLO may be refused for good even if that is not required.
        fatal = True if wrong.does == FOR_GOOD else False if wrong.after else None
        refused(peer, wrong.code, rule, fatal)
        return
    if wrong.does == FAILS:
        scene.failed(peer, id_, wrong.code, rule)
    elif wrong.does == CANCELLED:
        (event,) = scene.output(peer, rule)
        if not isinstance(event, messages.EndEvent) or event.finish_reason.value != "cancelled":
            raise Broken(rule, f"{event}; expected END cancelled")
        if (event.request_id, event.offset) != (id_, 0):
            raise Broken(rule, f"{event}; expected the id of the CANCEL and offset 0")
    elif wrong.does == ANSWERS:
        got = peer.expect(T.ANSWER, rule=rule)
        if got.id != id_ or got.body.error is None or got.body.error.code != wrong.code:
            raise Broken(rule, f"ANSWER {got.plain}; expected error {wrong.code}")
    else:
        peer.quiet(rule, "nothing is answered", seconds=0.2)
    # The session goes on.
    if peer.role == "client":
        scene.query(peer, "bus.version")
    else:
        peer.send(T.HEARTBEAT, peer.id, {"state": "ready"})
        peer.quiet(rule, "the session goes on", seconds=0.2)


# --- a worker -------------------------------------------------------------------------------------


def _to_worker(wrong: Wrong) -> Callable[[WorkerStage], None]:
    def play(stage: WorkerStage) -> None:
        session = stage.ready()
        if wrong.does == ENDS:
            stage.settled()
        id_, route = stage.new_id(), stage.new_id()
        frames = _with_ids(wrong.frames, session.id, id_, route)
        _renumber(frames, wrong, session)
        session.raw(frames)
        stage.assigned += frames[0][3] == T.ASSIGN and wrong.does == FAILS
        if wrong.does == ENDS:
            _comes_back(stage, session, wrong)
        elif wrong.does == FAILS:
            _fails(stage, id_, route, wrong)
        else:
            got = stage.look(0.3)
            if got is not None or session.over:
                raise Broken(
                    wrong.rule,
                    f"{got and got.plain}; expected that the session goes on, without an answer",
                )
        # It still serves.
        stage.ready()
        id_ = stage.new_id()
        stream = stage.stream(id_, stage.assign(id_, stage.body(3)))
        stream.whole(wrong.rule)

    return play


def _renumber(frames: list[bytes], wrong: Wrong, session: Session) -> None:
    """Set the next sequence number of the real session, unless that number is what is wrong."""
    by = int.from_bytes(frames[0][-8:], "big") - len(wrong.after)
    frames[0] = frames[0][:-8] + (session.sequence + by).to_bytes(8, "big")


def _comes_back(stage: WorkerStage, session: Session, wrong: Wrong) -> None:
    again = stage.broker.hello(rule=wrong.rule)
    if again.routing_id == session.routing_id:
        raise Broken("T1", "the routing id of the previous session")
    session.over = True
    stage.broker.welcome(again)
    stage.entered(again)


def _fails(stage: WorkerStage, id_: bytes, route: bytes, wrong: Wrong) -> None:
    got = stage.look(stage.patience_s)
    if got is None:
        raise Broken(wrong.rule, "neither FAIL nor REJECT came")
    if got.type is T.REJECT and got.id == id_:
        code = got.body.error.code
    elif got.type is T.OUTPUT and got.id == route and isinstance(got.body[-1], messages.FailEvent):
        code = got.body[-1].error.code
        if got.ledger is None or [entry.request_id for entry in got.ledger.finished] != [id_]:
            raise Broken("G6", "FAIL without a ledger that names the request")
    else:
        raise Broken(wrong.rule, f"{got.type.name} {got.plain} came; expected FAIL or REJECT")
    if wrong.code and code != wrong.code:
        raise Broken(wrong.rule, f"code {code}; expected {wrong.code}")


# --- a client -------------------------------------------------------------------------------------


def _to_client(wrong: Wrong) -> Callable[[ClientStage], None]:
    def play(stage: ClientStage) -> None:
        session, answer = stage.begun(tokens=2)
        frames = _with_ids(wrong.frames, session.id, answer.id, answer.route)
        _renumber(frames, wrong, session)
        session.raw(frames)
        if wrong.does == RESUMES:
            session, answer = _resumed(stage, session, answer, wrong)
        elif wrong.name == "tokens_of_a_later_version":
            answer.ids.append(3)
            answer.text += " ok"
        answer.tokens(1)
        answer.end()
        stage.ended("length", wrong.rule)
        stage.shown(answer.text, wrong.rule)

    return play


def _resumed(
    stage: ClientStage, session: Session, answer: Any, wrong: Wrong
) -> tuple[Session, Any]:
    """Wait for RESUME on this session, or on another after its HELLO."""
    until = stage.patience_s
    while until > 0:
        again = stage.broker.dialled(0.0) if stage.broker.greeting else None
        if again is not None:
            stage.broker.welcome(again)
            session = again
        got = session.next(T.QUERY, T.WINDOW, T.GOODBYE, seconds=0.05)
        until -= 0.05
        if got is None:
            continue
        if got.type is not T.RESUME or got.id != answer.id:
            raise Broken(wrong.rule, f"{got.type.name} came; expected RESUME")
        resume = got.body.resume
        if resume.token_ids != answer.ids or resume.text_characters != len(answer.text):
            raise Broken(
                "M5",
                f"RESUME of {len(resume.token_ids)} tokens, {resume.text_characters} "
                f"characters; {len(answer.ids)} and {len(answer.text)} were sent",
            )
        return session, answer.goes_on(session, got)
    raise Broken(wrong.rule, "RESUME did not come")


_PLAYS: Final[dict[str, Callable[[Wrong], Callable[[Any], None]]]] = {
    "broker": _to_broker,
    "worker": _to_worker,
    "client": _to_client,
}
CASES.extend(
    Case(
        f"wrong_{wrong.name}",
        wrong.to,
        (wrong.rule,),
        _PLAYS[wrong.to](wrong),
        f"{wrong.shows}: {wrong.does}",
    )
    for wrong in wrong_messages()
)
assert {wrong.does for wrong in wrong_messages()} <= {
    *(ANSWERS, CANCELLED, DROPS, ENDS, FAILS, FOR_GOOD, REFUSES, RESUMES, TAKES)
}
