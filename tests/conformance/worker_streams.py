"""Cases of a worker: streams that survive, and ways to stop (sections 5.6 and 6.4)."""

from __future__ import annotations

import signal
import time

from broker.protocol.header import MessageType as T
from tests.conformance.verdicts import Broken, Skipped, case
from tests.conformance.wire import next_epoch
from tests.conformance.worker_cases import LONG, cancel, first_part, is_end, is_fail, run
from tests.conformance.worker_stage import Stream, WorkerStage


@case("worker", "M15", "M12")
def worker_continues(stage: WorkerStage) -> None:
    """An answer of 16 tokens; then, under other ids, the same request with its first tokens, as if
    from another worker: the other tokens and the rest of the text are the same."""
    body = stage.body(16)
    whole = run(stage, body)
    whole.whole()
    for most in (1, 7, 15):
        ids, text = first_part(whole, most)
        epoch = next_epoch(0, stage.random)
        facts = {"epoch": epoch, "token_ids": ids, "text_characters": len(text)}
        rest = run(stage, body | {"resume": facts}, epoch=epoch)
        is_end(rest.whole("M12"), "length", "M12")
        if ids + rest.tokens != whole.tokens:
            raise Broken(
                "M15",
                f"after {len(ids)} tokens: {rest.tokens}; expected {whole.tokens[len(ids) :]}",
            )
        if text + rest.text != whole.text:
            raise Broken("M12", f"after {len(text)} characters: {rest.text!r} of {whole.text!r}")


@case("worker", "M12")
def worker_continues_what_is_complete(stage: WorkerStage) -> None:
    """RESUME with all tokens of an answer: END at once, without another token."""
    body = stage.body(6)
    whole = run(stage, body)
    whole.whole()
    epoch = next_epoch(0, stage.random)
    facts = {"epoch": epoch, "token_ids": whole.tokens, "text_characters": len(whole.text)}
    rest = run(stage, body | {"resume": facts}, epoch=epoch)
    is_end(rest.whole("M12"), "length", "M12")
    if rest.tokens or rest.text:
        raise Broken("M12", f"{rest.tokens} {rest.text!r} came; the answer is complete")


@case("worker", "M13")
def worker_too_many_characters(stage: WorkerStage) -> None:
    """RESUME that claims more characters than its tokens can have: FAIL `invalid_request`."""
    body = stage.body(6)
    whole = run(stage, body)
    whole.whole()
    ids, text = first_part(whole, 3)
    epoch = next_epoch(0, stage.random)
    facts = {"epoch": epoch, "token_ids": ids, "text_characters": len(text) + 1000}
    rest = run(stage, body | {"resume": facts}, epoch=epoch)
    is_fail(rest.whole("M13"), "invalid_request", "M13")


@case("worker", "M11", "M14")
def worker_attach(stage: WorkerStage) -> None:
    """ASSIGN with `attach` of a running request, from token 3, at a new epoch and on a new route:
    all tokens from there, and none at the old epoch. Then the same once it has ended, from the
    start: all of it, END included. The slot is granted once."""
    body = stage.body(120)
    stream = run(stage, body)
    stream.until(6)
    granted = stage.granted
    ids, text = first_part(stream, 3)
    epoch, again = 0, stream
    for ids_, text_ in ((ids, text), ([], "")):
        epoch = next_epoch(epoch, stage.random)
        facts = {"epoch": epoch, "token_ids": ids_, "text_characters": len(text_)}
        body_ = body | {"resume": facts}
        route = stage.assign(stream.id, body_, epoch=epoch, attach=True)
        again = stage.stream(stream.id, route, epoch, len(ids_))
        _skip_old(stage, again)
        is_end(again.whole("M11"), "length", "M11")
        if (
            len(ids_) + len(again.tokens) != 120
            or again.tokens[: 6 - len(ids_)] != (stream.tokens[len(ids_) : 6])
        ):
            raise Broken("M11", f"{len(again.tokens)} tokens from {len(ids_)} on, or wrong ones")
    stage.ready(slots=2)
    if stage.granted != granted + 1:
        raise Broken("M11", f"granted rose by {stage.granted - granted}; expected 1")


def _skip_old(stage: WorkerStage, stream: Stream) -> None:
    """Drop events of the previous epoch that were sent before ASSIGN arrived."""
    session = stage.live()
    until_s = time.monotonic() + stage.patience_s
    while time.monotonic() < until_s:
        stage.broker.pump(0.02)
        for got in list(session.inbox):
            if got.type is T.OUTPUT:
                if any(event.epoch == stream.epoch for event in got.body):
                    return
                session.inbox.remove(got)
        session.check()


@case("worker", "G4")
def worker_attach_unknown(stage: WorkerStage) -> None:
    """ASSIGN with `attach` of an unknown request: REJECT `worker_lost`, retryable, which grants no
    slot."""
    granted = stage.granted
    id_, epoch = stage.new_id(), next_epoch(0, stage.random)
    body = stage.body(5, resume={"epoch": epoch, "token_ids": [1]})
    stage.assign(id_, body, epoch=epoch, attach=True)
    got = stage.expect(T.REJECT, "G4")
    if got.id != id_ or got.body.error.code != "worker_lost" or not got.body.error.retryable:
        raise Broken("G4", f"REJECT {got.plain}; expected worker_lost, retryable")
    if got.body.granted != granted:
        raise Broken("G4", f"granted went from {granted} to {got.body.granted}")


@case("worker", "M14", "M11", "G1")
def worker_holds(stage: WorkerStage) -> None:
    """The connection breaks while one request runs and another has just ended: HELLO names both in
    `holds`, and once attached, the running one goes on where the client was."""
    ended = run(stage, stage.body(3))
    ended.whole()
    body = stage.body(LONG)
    running = run(stage, body)
    running.until(5)
    stage.broker.close()
    time.sleep(0.2)
    stage.broker.open()
    session = stage.begin()
    assert session.hello is not None
    holds = {held.request_id: held for held in session.hello.holds}
    held = holds.get(running.id)
    if held is None or held.epoch != 0 or held.offset < 5:
        raise Broken("M14", f"holds names {len(holds)} requests; the running one as {held}")
    if ended.id not in holds or holds[ended.id].running:
        raise Broken("M14", f"the ended request is held as {holds.get(ended.id)}")
    epoch = next_epoch(0, stage.random)
    ids, text = first_part(running, 4)
    facts = {"epoch": epoch, "token_ids": ids, "text_characters": len(text)}
    route = stage.assign(running.id, body | {"resume": facts}, epoch=epoch, attach=True)
    again = stage.stream(running.id, route, epoch, len(ids))
    again.until(len(running.tokens) - len(ids) + 3, "M11")
    both = running.tokens[len(ids) :]
    if again.tokens[: len(both)] != both:
        raise Broken("M11", f"{again.tokens[: len(both)]} after the break, {both} before")
    if again.end is None:
        cancel(stage, again)


@case("worker", "G7")
def worker_held_ends_unread(stage: WorkerStage) -> None:
    """A held request ends before anybody resumes it: the ledger of an OUTPUT with id zero and no
    events names it."""
    stream = run(stage, stage.body(300))
    stream.until(2)
    stage.broker.close()
    stage.broker.open()
    session = stage.begin()
    assert session.hello is not None
    held = {entry.request_id: entry for entry in session.hello.holds}.get(stream.id)
    if held is None:
        raise Broken("M14", "holds does not name the running request")
    if not held.running:
        raise Skipped("the request had ended when the worker came back")
    got = stage.expect(T.OUTPUT, "G7")
    finished = got.ledger.finished if got.ledger is not None else []
    if got.id != bytes(16) or got.body != [] or [e.request_id for e in finished] != [stream.id]:
        raise Broken("G7", f"OUTPUT {got.id.hex()[:8]} {got.body} {finished}")


# --- ways to stop ---------------------------------------------------------------------------------


def _leaves(stage: WorkerStage, stream: Stream, rule: str) -> None:
    """Check for DRAIN, no more credit, the whole answer, and GOODBYE `drained`."""
    stage.drain = True
    stage.past(stream, T.DRAIN, rule)
    free = stage.granted - stage.assigned
    id_ = stage.new_id()
    stage.assign(id_, stage.body(3))
    got = stage.past(stream, T.REJECT, "G4")
    if got.id != id_ or not got.body.error.retryable:
        raise Broken("G4", f"REJECT {got.plain}; expected retryable")
    is_end(stream.whole(rule), "length", rule)
    got = stage.expect(T.GOODBYE, rule)
    if got.body.reason != "drained":
        raise Broken(rule, f"GOODBYE {got.body.reason}; expected drained")
    if stage.granted - stage.assigned > free:
        raise Broken("G3", "it granted credit while it drained")


@case("worker", "S12", "S18", "G3", "G4", alone=True)
def worker_told_to_stop(stage: WorkerStage) -> None:
    """The broker sends DRAIN while a request runs: DRAIN in return, REJECT of later ASSIGNs, the
    whole answer, GOODBYE `drained`."""
    stream = run(stage, stage.body(150))
    stream.until(2)
    session = stage.live()
    session.send(T.DRAIN, session.id, {"reason": "the kit says so", "deadline_ms": 20_000})
    _leaves(stage, stream, "S18")


@case("worker", "S18", "G3", "G4", alone=True)
def worker_stopped(stage: WorkerStage) -> None:
    """SIGTERM while a request runs: DRAIN, REJECT of later ASSIGNs, the whole answer, GOODBYE
    `drained`."""
    stream = run(stage, stage.body(150))
    stream.until(2)
    stage.subject.signal(signal.SIGTERM)
    _leaves(stage, stream, "S18")


@case("worker", "S18", "S12", alone=True)
def worker_stopped_late(stage: WorkerStage) -> None:
    """The broker sends DRAIN with a deadline of 300 ms while a long request runs: GOODBYE
    `drained`."""
    stream = run(stage, stage.body(20_000))
    stream.until(2)
    session = stage.live()
    session.send(T.DRAIN, session.id, {"deadline_ms": 300})
    stage.drain = True
    got = stage.past(stream, T.GOODBYE, "S18", passing=T.DRAIN)
    if got.body.reason != "drained":
        raise Broken("S18", f"GOODBYE {got.body.reason}; expected drained")
