"""Cases of a client (sections 5 and 6): the kit is its broker, and writes its script."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgpack

from broker.protocol.header import MessageType as T
from tests.conformance.client_stage import Answer, ClientStage
from tests.conformance.verdicts import Broken, Skipped, case
from tests.conformance.wire import Got, Session, new_id


def resumed(stage: ClientStage, session: Session, answer: Answer) -> Got:
    """The RESUME of this answer, checked against what was sent."""
    got = stage.asked(session, T.RESUME, "M1")
    first, resume = answer.got.body, got.body.resume
    if got.id != answer.id:
        raise Broken("M5", "RESUME with another id")
    step = resume.epoch - answer.epoch
    if not 1 << 36 <= step < 1 << 37:
        raise Broken("M3", f"the epoch rose by {step}; expected 2^36 and 36 random bits")
    if resume.token_ids != answer.ids:
        raise Broken("M5", f"RESUME of {len(resume.token_ids)} tokens; {len(answer.ids)} were sent")
    if resume.text_characters != len(answer.text):
        raise Broken(
            "M5",
            f"text_characters {resume.text_characters}; {len(answer.text)} code points were sent",
        )
    if got.body.window <= len(answer.ids):
        raise Broken("W5", f"window {got.body.window} with {len(answer.ids)} tokens held")
    for field in ("model", "kind", "prompt", "messages", "params"):
        if getattr(got.body, field) != getattr(first, field):
            raise Broken("M5", f"RESUME with another {field}")
    if got.frames[2:] != answer.got.frames[2:]:
        raise Broken("M5", "RESUME with other attachments")
    return got


def goes_on(
    stage: ClientStage, session: Session, answer: Answer, got: Got, worker: str = "w2"
) -> None:
    """Continue the answer after a RESUME to its end, and check what the client shows of it."""
    after = answer.goes_on(session, got, worker)
    after.tokens(2)
    after.end()
    stage.ended("length", "M1")
    stage.shown(after.text, "R10")


# --- the course -----------------------------------------------------------------------------------


@case("client", "S1", "R4", "O2", "S14", "R13")
def client_course(stage: ClientStage) -> None:
    """One answer: HELLO, REQUEST as the script says, tokens, the rest of the text in END; after the
    script, GOODBYE and exit status 0."""
    stage.ask(tokens=7)
    session = stage.session(first=True)
    got = stage.asked(session)
    if (got.body.model, got.body.kind.value, got.body.params.max_tokens) != ("demo", "complete", 7):
        raise Broken("kit", f"REQUEST {str(got.plain)[:200]}: not what the script says")
    session.send(T.ACCEPTED, got.id, {"position": 4})
    answer = stage.run(session, got)
    answer.tokens(2)
    session.events(answer.route, [0, answer.id, 0, 2, [5], ""])
    answer.ids.append(5)
    answer.tokens(1)
    answer.end("stop", "é, the end")
    stage.ended("stop", "R13")
    stage.shown(answer.text, "O2")
    stage.subject.end_script()
    got = session.expect(T.GOODBYE, T.WINDOW, rule="S14")
    if got.body.reason != "closed":
        raise Broken("S14", f"GOODBYE {got.body.reason}; expected closed")
    status = stage.subject.wait(stage.patience_s)
    if status != 0:
        raise Broken("kit", f"exit status {status} after the script's end")


@case("client", "S7")
def client_beats_while_it_reads(stage: ClientStage) -> None:
    """Tokens keep coming, for three times as long as the broker tolerates silence: the client sends
    HEARTBEATs all the same, timed by what it *sent* last."""
    stage.ask(tokens=500)
    session = stage.session(first=True, interval_s=0.15, liveness=8, window=1 << 20)
    answer = stage.run(session, stage.asked(session))
    until_s = time.monotonic() + 3 * session.silence_s
    while time.monotonic() < until_s:
        answer.tokens(1)
        stage.broker.wait(0.03, session)
        if session.over:
            raise Broken("S7", "the client ended the session")
    answer.end()
    stage.ended("length", "R13")
    stage.shown(answer.text, "R10")


@case("client", "S7")
def client_beats_while_it_waits(stage: ClientStage) -> None:
    """Only heartbeats come: the client sends its own."""
    stage.ask()
    session = stage.session(first=True, interval_s=0.15, liveness=8)
    answer = stage.run(session, stage.asked(session))
    stage.broker.wait(2.5 * session.silence_s, session)
    answer.end()
    stage.ended("length", "R13")


@case("client", "W6", "W1")
def client_window(stage: ClientStage) -> None:
    """The window is 64, and the answer has 400 tokens: the client raises the limit, each time
    higher than before, so that the answer never stops for good."""
    stage.ask(tokens=400)
    session = stage.session(first=True, window=64)
    got = stage.asked(session)
    answer, limit = stage.run(session, got), got.body.window
    until_s = time.monotonic() + stage.patience_s
    while len(answer.ids) < 400:
        if len(answer.ids) < min(limit, 400):
            answer.tokens(min(8, limit - len(answer.ids)))
            until_s = time.monotonic() + stage.patience_s
        elif time.monotonic() > until_s:
            raise Broken("W6", f"{len(answer.ids)} tokens, limit {limit}: the limit is not raised")
        stage.listen(0.0)
        stage.broker.pump(0.005)
        window = session.next(T.QUERY, seconds=0.0)
        if window is not None:
            if window.type is not T.WINDOW or window.body.limit <= limit:
                raise Broken("W6", f"{window.type.name} {window.plain} after limit {limit}")
            limit = window.body.limit
    answer.end()
    stage.ended("length", "R13")
    stage.shown(answer.text, "R10")


@case("client", "R12", "R13", "R4")
def client_two_at_once(stage: ClientStage) -> None:
    """Events of two requests come in one OUTPUT: each request gets its own."""
    stage.ask("a")
    session = stage.session(first=True)
    first = stage.run(session, stage.asked(session))
    stage.ask("b")
    second = stage.run(session, stage.asked(session))
    if first.id == second.id:
        raise Broken("R4", "two requests with the same id")
    second.route = first.route
    session.send(T.ACCEPTED, second.id, {"worker": "w1", "route": first.route})
    events: list[list[Any]] = []
    for offset in range(6):
        for answer in (first, second):
            text = f" {stage.random.randrange(1000)}"
            events.append([0, answer.id, 0, offset, [offset + 1], text])
            answer.ids.append(offset + 1)
            answer.text += text
    session.events(first.route, *events)
    first.end()
    second.end("stop")
    for name, answer, reason in (("a", first, "length"), ("b", second, "stop")):
        stage.ended(reason, "R13", name)
        stage.shown(answer.text, "R12", name)


@case("client", "C3")
def client_cancel(stage: ClientStage) -> None:
    """The script cancels: the client sends CANCEL, and END `cancelled` ends the answer."""
    session, answer = stage.begun()
    stage.subject.tell(do="cancel", name="a")
    got = session.expect(T.CANCEL, T.WINDOW, rule="C3")
    if got.id != answer.id:
        raise Broken("C3", "CANCEL of another request")
    answer.tokens(1)
    answer.end("cancelled")
    stage.ended("cancelled", "C3")


@case("client", "X1", "R14")
def client_fails(stage: ClientStage) -> None:
    """FAIL with an unknown code, not retryable: the answer has failed, and nothing is sent
    again."""
    session, answer = stage.begun()
    answer.fail("x-strange")
    stage.failed("x-strange", "X1")
    got = session.next(T.WINDOW, T.GOODBYE, seconds=0.4)
    if got is not None:
        raise Broken("R14", f"{got.type.name} after a FAIL that is not retryable")


@case("client", "R14", "K3")
def client_fails_for_now(stage: ClientStage) -> None:
    """The broker itself sends FAIL `overloaded`, `retryable`, with `retry_after_ms` 400: the client
    asks again after that time, by RESUME or with a new id, or reports the failure."""
    stage.ask()
    session = stage.session(first=True)
    got = stage.asked(session)
    Answer(stage, session, got, session.id).fail("overloaded", retryable=True, retry_after_ms=400)
    begun_s = time.monotonic()
    again = session.next(T.WINDOW, seconds=3.0)
    if again is None:
        stage.failed("overloaded", "R14")
        return
    waited_s = time.monotonic() - begun_s
    if waited_s < 0.38:
        raise Broken("R14", f"{again.type.name} after {waited_s:.2f} s; retry_after_ms is 400")
    if (again.type is T.REQUEST) == (again.id == got.id):
        raise Broken("R14", f"{again.type.name}: RESUME has the old id, REQUEST a new one")
    answer = stage.run(session, again)
    answer.tokens(2)
    answer.end()
    stage.ended("length", "R14")
    stage.shown(answer.text, "R10")


@case("client", "R2", "M5")
def client_image(stage: ClientStage) -> None:
    """A request with an image: its bytes are the one attachment; RESUME sends it again."""
    image = stage.random.randbytes(300)
    stage.ask(image=base64.b64encode(image).decode())
    session = stage.session(first=True)
    got = session.next()
    while got is None and stage.listen(0.0):
        pass
    if got is None:
        if stage.fails.get("a") == "unsupported":
            raise Skipped("this client sends no images")
        raise Broken("R2", "REQUEST did not come")
    if got.frames[2:] != [image]:
        raise Broken("R2", f"{len(got.frames) - 2} attachments; expected the image's bytes")
    answer = stage.run(session, got)
    answer.tokens(3)
    answer.interrupt()
    goes_on(stage, session, answer, resumed(stage, session, answer))


# --- interruptions --------------------------------------------------------------------------------


@case("client", "M1", "M3", "M5", "M6", "W5")
def client_interrupted(stage: ClientStage) -> None:
    """INTERRUPTED `draining`: RESUME at once, at a later epoch, with all tokens that came; no
    holder and no lost worker."""
    session, answer = stage.begun(tokens=5)
    answer.interrupt()
    begun_s = time.monotonic()
    got = resumed(stage, session, answer)
    if time.monotonic() - begun_s > 2.0:
        raise Broken("M6", f"the first RESUME came after {time.monotonic() - begun_s:.1f} s")
    resume = got.body.resume
    if resume.holder or resume.lost_workers or resume.lost_alone:
        raise Broken(
            "M5", f"holder {resume.holder!r}, lost {resume.lost_workers}: w1 lives, but gave it up"
        )
    goes_on(stage, session, answer, got)


@case("client", "M6")
def client_interrupted_for_a_while(stage: ClientStage) -> None:
    """INTERRUPTED with `retry_after_ms` 500: RESUME no sooner."""
    session, answer = stage.begun()
    answer.interrupt(retry_after_ms=500)
    begun_s = time.monotonic()
    got = resumed(stage, session, answer)
    if time.monotonic() - begun_s < 0.48:
        raise Broken(
            "M6", f"RESUME after {time.monotonic() - begun_s:.2f} s; retry_after_ms is 500"
        )
    goes_on(stage, session, answer, got)


@case("client", "M6")
def client_pace(stage: ClientStage) -> None:
    """Five INTERRUPTEDs without a token in between: the RESUMEs come more and more slowly."""
    session, answer = stage.begun()
    begun_s = time.monotonic()
    for _ in range(5):
        answer.interrupt()
        got = resumed(stage, session, answer)
        answer = answer.goes_on(session, got)
    # The delays are random parts of 0.25, 0.5, 1 and 2 s: the odds of a sum below 0.15 s are 1 in
    # 12,000.
    if time.monotonic() - begun_s < 0.15:
        raise Broken("M6", f"five RESUMEs in {time.monotonic() - begun_s:.2f} s")
    answer.tokens(1)
    answer.end()
    stage.ended("length", "M6")


@case("client", "M5", "M10")
def client_lost_workers(stage: ClientStage) -> None:
    """Workers die: `lost_workers` has their names, and `lost_alone` those that ran only this
    request; a name in ACCEPTED's `returned` is removed from both."""
    session, answer = stage.begun()
    answer.interrupt(lost=True, worker="w1")
    got = resumed(stage, session, answer)
    if (got.body.resume.lost_workers, got.body.resume.lost_alone) != (["w1"], []):
        raise Broken("M5", f"lost {got.body.resume.lost_workers}; expected ['w1']")
    answer = answer.goes_on(session, got, "w2")
    answer.tokens(1)
    answer.interrupt(lost=True, alone=True, worker="w2")
    got = resumed(stage, session, answer)
    resume = got.body.resume
    if (sorted(resume.lost_workers), resume.lost_alone) != (["w1", "w2"], ["w2"]):
        raise Broken("M5", f"lost {resume.lost_workers}, alone {resume.lost_alone}")
    answer = answer.goes_on(session, got, "w3")
    session.send(T.ACCEPTED, answer.id, {"worker": "w3", "route": answer.route, "returned": ["w2"]})
    answer.tokens(1)
    answer.interrupt(worker="w3")
    got = resumed(stage, session, answer)
    resume = got.body.resume
    if (resume.lost_workers, resume.lost_alone) != (["w1"], []):
        raise Broken(
            "M10", f"lost {resume.lost_workers}, alone {resume.lost_alone} after w2 returned"
        )
    goes_on(stage, session, answer, got)


@case("client", "K2", "M2")
def client_late_events(stage: ClientStage) -> None:
    """Events and INTERRUPTED of the previous epoch, after RESUME: dropped."""
    session, answer = stage.begun()
    answer.interrupt()
    got = resumed(stage, session, answer)
    late = [0, answer.id, answer.epoch, len(answer.ids), [666], " WRONG"]
    session.events(answer.route, late)
    answer.interrupt()
    after = answer.goes_on(session, got)
    session.events(after.route, late)
    after.tokens(2)
    after.end()
    stage.ended("length", "K2")
    stage.shown(after.text, "K2")


@case("client", "K4")
def client_reports(stage: ClientStage) -> None:
    """An OUTPUT that is not an array: a client SHOULD report it, by its sequence number."""
    session, answer = stage.begun()
    sequence = session.sequence
    session.send(T.OUTPUT, answer.route, {"no": "array"})
    got = session.next(T.WINDOW, seconds=1.0)
    if got is None:
        raise Skipped("this client does not report it (a SHOULD)")
    if got.type is not T.QUERY or got.body.verb != "bus.report":
        raise Broken("K4", f"{got.type.name} {got.plain}; expected QUERY bus.report")
    if got.body.args.get("sequence") != sequence or got.id[0] == 0:
        raise Broken(
            "K4", f"bus.report of sequence {got.body.args.get('sequence')}; it was {sequence}"
        )
    session.send(T.ANSWER, got.id, {"result": {"worker": "w1"}})
    answer.interrupt()
    goes_on(stage, session, answer, resumed(stage, session, answer))


# --- sessions -------------------------------------------------------------------------------------


def back(stage: ClientStage, before: Session, answer: Answer) -> None:
    """A new session, and RESUME there; its holder is the worker that may still run the request."""
    session = stage.session()
    if session.routing_id == before.routing_id:
        raise Broken("T1", "the routing id of the previous session")
    got = resumed(stage, session, answer)
    if got.body.resume.holder != "w1":
        raise Broken("M5", f"holder {got.body.resume.holder!r}; expected 'w1'")
    goes_on(stage, session, answer, got, "w1")


@case("client", "S9", "S10", "T1", "M5")
def client_connection_lost(stage: ClientStage) -> None:
    """The connection breaks mid-stream: the client comes back and resumes."""
    session, answer = stage.begun(tokens=4)
    stage.broker.close()
    time.sleep(0.2)
    stage.broker.open()
    back(stage, session, answer)


@case("client", "S8", "S10")
def client_silence(stage: ClientStage) -> None:
    """The broker falls silent mid-stream: the client leaves it, comes back and resumes."""
    stage.ask()
    session = stage.session(first=True, interval_s=0.15, liveness=8)
    answer = stage.run(session, stage.asked(session))
    answer.tokens(2)
    stage.shown(answer.text, "R10")
    session.beats = False
    begun_s = time.monotonic()
    back(stage, session, answer)
    if time.monotonic() - begun_s < 0.7:
        raise Broken(
            "S8", f"it left after {time.monotonic() - begun_s:.1f} s; 1.2 s of silence are allowed"
        )


@case("client", "S14", "S10")
def client_sent_away(stage: ClientStage) -> None:
    """GOODBYE `silent` mid-stream: the client comes back and resumes."""
    session, answer = stage.begun()
    session.send(T.GOODBYE, session.id, {"reason": "silent"})
    session.over = True
    back(stage, session, answer)


@case("client", "S1", "F4")
def client_unknown_session(stage: ClientStage) -> None:
    """REFUSE `unknown_session` with sequence 0 mid-stream: the client says HELLO again."""
    session, answer = stage.begun()
    session.sequence = 0
    error = {"code": "unknown_session", "message": "the kit knows no session", "retryable": True}
    session.send(T.REFUSE, bytes(16), {"error": error})
    session.over = True
    back(stage, session, answer)


@case("client", "S6")
def client_refused_for_now(stage: ClientStage) -> None:
    """HELLO is refused with `retry_after_ms` 400: the client comes back after 400 to 600 ms."""
    stage.ask()
    session = stage.broker.hello(first=True)
    error = {"code": "draining", "message": "later", "retryable": True, "retry_after_ms": 400}
    session.send(T.REFUSE, bytes(16), {"error": error})
    session.over = True
    begun_s = time.monotonic()
    session = stage.session()
    waited_s = time.monotonic() - begun_s
    if not 0.38 < waited_s < 0.6 + 2.0:
        raise Broken("S6", f"it came back after {waited_s:.2f} s; expected 0.4 to 0.6 s")
    answer = stage.run(session, stage.asked(session))
    answer.end()
    stage.ended("length", "S6")


@case("client", "S5")
def client_refused_for_good(stage: ClientStage) -> None:
    """HELLO is refused with `fatal`: the client fails or exits, and does not come back."""
    stage.ask()
    session = stage.broker.hello(first=True)
    error = {"code": "protocol_error", "message": "the kit refuses for good"}
    session.send(T.REFUSE, bytes(16), {"error": error, "fatal": True})
    session.over = True
    if stage.broker.dialled(2.0) is not None:
        raise Broken("S5", "it came back")
    while stage.listen(0.0):
        pass
    if "a" not in stage.fails and stage.subject.running:
        raise Broken("S5", "it neither failed nor exited")


@case("client", "M1", "R5")
def client_lost_while_queued(stage: ClientStage) -> None:
    """The connection breaks before any answer: the broker may have the request, so the client sends
    RESUME, not REQUEST, with the same id."""
    stage.ask()
    session = stage.session(first=True)
    got = stage.asked(session)
    answer = Answer(stage, session, got, b"")
    stage.broker.close()
    time.sleep(0.1)
    stage.broker.open()
    session = stage.session()
    again = resumed(stage, session, answer)
    if again.body.resume.holder:
        raise Broken("M5", f"holder {again.body.resume.holder!r}; nobody accepted it")
    goes_on(stage, session, answer, again)


@case("client", "S12")
def client_drain(stage: ClientStage) -> None:
    """The broker drains: running answers go on, and no new request is sent there."""
    session, answer = stage.begun()
    session.send(T.DRAIN, session.id, {"reason": "the kit stops", "deadline_ms": 5000})
    stage.broker.wait(0.1, session)
    stage.ask("b")
    got = session.next(T.WINDOW, seconds=0.6)
    if got is not None:
        raise Broken("S12", f"{got.type.name} while the broker drains")
    answer.tokens(1)
    answer.end()
    stage.ended("length", "S12")
    stage.shown(answer.text, "S12")


@case("client", "E2", "E5")
def client_lenient(stage: ClientStage) -> None:
    """Keys of later versions, nil for absent keys, and unknown flag bits are all accepted."""
    stage.ask()
    session = stage.session(first=True, invented={"x": 1}, operator=None, software=None)
    got = stage.asked(session)
    route = new_id(stage.random)
    session.send(T.ACCEPTED, got.id, {"position": None, "worker": "w1", "route": route, "new": 1})
    answer = Answer(stage, session, got, route)
    body = [[0, got.id, 0, 0, [1], " x", None, None, "later"]]
    session.send(T.OUTPUT, route, msgpack.packb(body), flags=0x8000)
    answer.ids, answer.text = [1], " x"
    answer.end()
    stage.ended("length", "E5")
    stage.shown(answer.text, "E5")
