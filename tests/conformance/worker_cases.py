"""Cases of a worker (sections 4.3, 5, 6 and 7): the kit is its broker."""

from __future__ import annotations

import time
from typing import Any

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from tests.conformance.verdicts import Broken, Skipped, case
from tests.conformance.wire import next_epoch
from tests.conformance.worker_stage import Stream, WorkerStage

LONG = 600
"""Tokens of an answer that must still run when something happens to it."""


def is_end(event: Any, reason: str, rule: str) -> None:
    """Check that the event is END with this reason."""
    if not isinstance(event, messages.EndEvent) or event.finish_reason.value != reason:
        raise Broken(rule, f"{event}; expected END {reason}")


def is_fail(event: Any, code: str, rule: str) -> None:
    """Check that the event is FAIL with this code."""
    if not isinstance(event, messages.FailEvent) or event.error.code != code:
        raise Broken(rule, f"{event}; expected FAIL {code}")


def run(stage: WorkerStage, body: dict[str, Any], **facts: Any) -> Stream:
    """Assign a request to the worker."""
    id_ = stage.new_id()
    route = stage.assign(id_, body, **facts)
    resume = body.get("resume", {})
    return stage.stream(id_, route, resume.get("epoch", 0), len(resume.get("token_ids", ())))


def cancel(stage: WorkerStage, stream: Stream) -> None:
    """Send CANCEL and read to the end of the stream."""
    stage.live().send(T.CANCEL, stream.id)
    stream.whole("C3")


def first_part(stream: Stream, most: int) -> tuple[list[int], str]:
    """The tokens and text of the first whole events: at most `most` tokens, but at least one
    event."""
    ids: list[int] = []
    text = ""
    for event in stream.events:
        if isinstance(event, messages.TokensEvent):
            if len(ids) + len(event.token_ids) > most and ids:
                break
            ids, text = ids + event.token_ids, text + event.text
    return ids, text


# --- sessions -------------------------------------------------------------------------------------


@case("worker", "S16", "S7", "G1", "G2")
def worker_starts(stage: WorkerStage) -> None:
    """HELLO, HEARTBEATs, and credit once it is ready; idle, it goes on to send HEARTBEATs."""
    session = stage.ready(slots=2)
    stage.broker.wait(5 * session.interval_s + 0.5, session)
    beats = sum(got.type is T.HEARTBEAT for got in session.inbox)
    if beats < 3:
        raise Broken("S7", f"{beats} heartbeats in five intervals of {session.interval_s:g} s")
    (*_, last) = [got for got in session.inbox if got.type is T.HEARTBEAT]
    if last.body.state is not messages.WorkerState.READY:
        raise Broken("S16", f"it has granted credit, but its state is {last.body.state}")
    if not stage.models:
        raise Broken("S16", "neither HELLO nor HEARTBEAT named a model")


@case("worker", "S8", "S10", "T1")
def worker_silence(stage: WorkerStage) -> None:
    """The broker falls silent: the worker leaves, and says HELLO on a new connection."""
    before = stage.ready()
    before.beats = False
    again = stage.broker.hello(rule="S8")
    before.over = True
    if again.routing_id == before.routing_id:
        raise Broken("T1", "the routing id of the previous session")
    stage.broker.welcome(again)
    stage.entered(again)


@case("worker", "S9", "S10")
def worker_connection_lost(stage: WorkerStage) -> None:
    """The connection breaks, and nobody listens for a while: the worker comes back."""
    stage.ready()
    stage.broker.close()
    time.sleep(0.3)
    stage.broker.open()
    stage.begin()


@case("worker", "S14", "S1")
def worker_sent_away(stage: WorkerStage) -> None:
    """GOODBYE `shutdown`, and later REFUSE `unknown_session`: the worker comes back each time."""
    session = stage.ready()
    session.send(T.GOODBYE, session.id, {"reason": "shutdown"})
    session.over = True
    session = stage.begin()
    error = {"code": "unknown_session", "message": "the kit knows no session", "retryable": True}
    session.sequence = 0
    session.send(T.REFUSE, bytes(16), {"error": error})
    session.over = True
    stage.begin()


@case("worker", "S6")
def worker_refused_for_now(stage: WorkerStage) -> None:
    """HELLO is refused with `retry_after_ms` 400: the worker comes back after 400 to 600 ms."""
    session = stage.ready()
    session.send(T.GOODBYE, session.id, {"reason": "shutdown"})
    session.over = True
    refused = stage.broker.hello()
    error = {"code": "overloaded", "message": "later", "retryable": True, "retry_after_ms": 400}
    refused.send(T.REFUSE, bytes(16), {"error": error})
    refused.over = True
    begun_s = time.monotonic()
    stage.begin()
    waited_s = time.monotonic() - begun_s
    if waited_s < 0.39:
        raise Broken("S6", f"it came back after {waited_s:.2f} s")
    if waited_s > 0.6 + 2.0:
        raise Broken("S6", f"it came back after {waited_s:.2f} s; expected 0.4 to 0.6 s")


@case("worker", "S5", alone=True)
def worker_refused_for_good(stage: WorkerStage) -> None:
    """HELLO is refused with `fatal`: the worker never comes back."""
    session = stage.ready()
    session.send(T.GOODBYE, session.id, {"reason": "shutdown"})
    session.over = True
    refused = stage.broker.hello()
    error = {"code": "protocol_error", "message": "the kit refuses for good"}
    refused.send(T.REFUSE, bytes(16), {"error": error, "fatal": True})
    refused.over = True
    stage.drain = True
    if stage.broker.dialled(3.0) is not None:
        raise Broken("S5", "it came back")


# --- requests -------------------------------------------------------------------------------------


@case("worker", "O1", "G6", "G7", "R12", "R13")
def worker_course(stage: WorkerStage) -> None:
    """A request for eight tokens: offsets count up, END comes with a ledger, the slot is granted
    again, and nothing more is sent for it."""
    before = stage.granted
    stream = run(stage, stage.body(8))
    is_end(stream.whole(), "length", "R13")
    if len(stream.tokens) != 8:
        raise Broken("P1", f"{len(stream.tokens)} tokens; max_tokens is 8")
    if not stream.started:
        raise Broken("G6", "no ledger named it along with its first token (a SHOULD)")
    stage.ready(slots=2)
    if stage.granted != before + 1:
        raise Broken("G1", f"granted went from {before} to {stage.granted} by one request")
    if (got := stage.look(0.3)) is not None:
        raise Broken("R13", f"{got.type.name} {got.plain} after the end")


@case("worker", "E2", "E5", "E3")
def worker_lenient(stage: WorkerStage) -> None:
    """Keys of later versions, nil for absent keys, and integers for floats are all accepted."""
    params = {"temperature": 1, "top_p": 1, "stop": None, "logprobs": None, "invented": 1}
    more = {"tools": None, "user": None, "invented": {"x": [1]}, "trace": None}
    stream = run(stage, stage.body(3, params=params, **more), ttl_ms=None, invented=1)
    is_end(stream.whole("E5"), "length", "E5")


@case("worker", "R12", "R10")
def worker_two_at_once(stage: WorkerStage) -> None:
    """Two requests of two clients: each is answered on its own route, in order."""
    stage.ready(slots=2)
    ids = [stage.new_id(), stage.new_id()]
    streams = {id_: stage.stream(id_, stage.assign(id_, stage.body(12))) for id_ in ids}
    until_s = time.monotonic() + stage.patience_s
    while not all(stream.end for stream in streams.values()):
        got = stage.look(0.2)
        if got is None:
            if time.monotonic() > until_s:
                raise Broken("R10", "no end of two requests")
            continue
        if got.type is not T.OUTPUT:
            raise Broken("R10", f"{got.type.name} came")
        for entry in got.ledger.finished if got.ledger is not None else ():
            streams[entry.request_id].finished.append(entry)
        for event in got.body:
            if event.request_id not in streams:
                raise Broken("R12", f"an event of {event.request_id.hex()}")
            streams[event.request_id].event(got, event)


@case("worker", "W1", "W2", "W3")
def worker_window(stage: WorkerStage) -> None:
    """An answer of 20 tokens with a window of 5, then 12, then enough: no token at or past it; a
    lower WINDOW changes nothing; END comes once all tokens have come."""
    stream = run(stage, stage.body(20, window=5))
    session = stage.live()
    for limit, lower in ((5, 3), (12, 7)):
        stream.until(limit, "W2")
        session.send(T.WINDOW, stream.id, {"limit": lower})
        if stream.read(0.3) or len(stream.tokens) > limit:
            raise Broken("W1", f"{len(stream.tokens)} tokens with a window of {limit}")
        session.send(T.WINDOW, stream.id, {"limit": 12 if limit == 5 else 1000})
    is_end(stream.whole("W2"), "length", "W2")
    if len(stream.tokens) != 20:
        raise Broken("W2", f"{len(stream.tokens)} of 20 tokens")


@case("worker", "C3")
def worker_cancel(stage: WorkerStage) -> None:
    """CANCEL of a running request, twice: END `cancelled` soon, and no second end."""
    stream = run(stage, stage.body(LONG))
    stream.until(3)
    begun = len(stream.tokens)
    session = stage.live()
    session.send(T.CANCEL, stream.id)
    session.send(T.CANCEL, stream.id, {"reason": "again"})
    is_end(stream.whole("C3"), "cancelled", "C3")
    if len(stream.tokens) - begun > 50:
        raise Broken("C3", f"{len(stream.tokens) - begun} tokens after CANCEL")
    if (got := stage.look(0.3)) is not None and got.body != []:
        raise Broken("C3", f"{got.type.name} {got.plain} after the end")


@case("worker", "C4")
def worker_cancel_unknown(stage: WorkerStage) -> None:
    """CANCEL of an unknown request: a ledger without a route names it `cancelled`."""
    id_ = stage.new_id()
    stage.live().send(T.CANCEL, id_)
    got = stage.expect(T.OUTPUT, "C4")
    finished = got.ledger.finished if got.ledger is not None else []
    ends = [(entry.request_id, entry.outcome) for entry in finished]
    if got.id != bytes(16) or got.body != [] or ends != [(id_, "cancelled")]:
        raise Broken("C4", f"OUTPUT {got.id.hex()[:8]} {got.body} {finished}")


@case("worker", "C5", "M12")
def worker_moved_and_back(stage: WorkerStage) -> None:
    """CANCEL, and at once ASSIGN of the same request at a later epoch without `attach`: a new run,
    which continues the tokens in ASSIGN; the ledgers name both ends."""
    body = stage.body(LONG)
    stream = run(stage, body)
    stream.until(4)
    ids, text = first_part(stream, 4)
    stage.ready()
    epoch = next_epoch(0, stage.random)
    facts = {"epoch": epoch, "token_ids": ids, "text_characters": len(text)}
    session = stage.live()
    session.send(T.CANCEL, stream.id)
    params = {**body["params"], "max_tokens": len(ids) + 6}
    route = stage.assign(stream.id, body | {"params": params, "resume": facts}, epoch=epoch)
    ends, tokens = 0, len(ids)
    until_s = time.monotonic() + stage.patience_s
    ended = False
    while (ends < 2 or not ended) and time.monotonic() < until_s:
        got = stage.look(0.2)
        if got is None:
            continue
        if got.type is not T.OUTPUT:
            raise Broken("C5", f"{got.type.name} {got.plain} came")
        if got.ledger is not None:
            ends += sum(entry.request_id == stream.id for entry in got.ledger.finished)
        for event in got.body:
            if event.epoch != epoch:
                continue  # of the previous run, which crossed with CANCEL
            if got.id != route:
                raise Broken("R12", "the new run answers on the old route")
            if isinstance(event, messages.TokensEvent):
                if event.offset != tokens:
                    raise Broken("O1", f"TOKENS at offset {event.offset}; expected {tokens}")
                tokens += len(event.token_ids)
            else:
                is_end(event, "length", "C5")
                ended = True
    if not ended or ends != 2:
        raise Broken("C5", f"the new run ended: {ended}; the ledgers name {ends} ends; expected 2")


@case("worker", "R8")
def worker_ttl(stage: WorkerStage) -> None:
    """ASSIGN of a long answer with `ttl_ms` 150: FAIL `deadline_exceeded`."""
    stream = run(stage, stage.body(20_000), ttl_ms=150)
    is_fail(stream.whole("R8"), "deadline_exceeded", "R8")


@case("worker", "G4")
def worker_beyond_its_grant(stage: WorkerStage) -> None:
    """One ASSIGN more than it granted: a retryable REJECT; the others run."""
    stage.ready(slots=2)
    streams = []
    while stage.granted > stage.assigned:
        streams.append(run(stage, stage.body(LONG)))
    id_ = stage.new_id()
    stage.assign(id_, stage.body(LONG))
    until_s = time.monotonic() + stage.patience_s
    while (got := stage.look(0.2)) is None or got.type is T.OUTPUT:
        if got is not None and any(event.request_id == id_ for event in got.body):
            raise Broken("G4", f"it runs {len(streams) + 1} requests; {len(streams)} were granted")
        if time.monotonic() > until_s:
            raise Broken("G4", "no REJECT")
    if got.type is not T.REJECT or got.id != id_ or not got.body.error.retryable:
        raise Broken("G4", f"{got.type.name} {got.plain}; expected a retryable REJECT")
    for stream in streams:
        stage.live().send(T.CANCEL, stream.id)
    ends = 0
    while ends < len(streams):
        got = stage.expect(T.OUTPUT, "C3")
        ends += len(got.ledger.finished) if got.ledger is not None else 0
    stage.assigned -= 1  # the rejected one took no slot, and need not be granted again


@case("worker", "P1")
def worker_too_long(stage: WorkerStage) -> None:
    """max_tokens beyond the context: FAIL `context_overflow`."""
    contexts = [info.context_tokens for info in stage.models if info.name == stage.model]
    if not contexts or not contexts[0]:
        raise Skipped("the worker does not say how long its context is")
    stream = run(stage, stage.body(contexts[0] + 1))
    is_fail(stream.whole("P1"), "context_overflow", "P1")


@case("worker", "O3", "O2")
def worker_stop_string(stage: WorkerStage) -> None:
    """A request again, with a stop string from the middle of its answer: the text ends right before
    the first occurrence, and END names the string."""
    body = stage.body(24)
    whole = run(stage, body)
    whole.whole()
    at = len(whole.text) // 2
    stop = whole.text[at : at + 5]
    if len(stop) < 2:
        raise Skipped("the model's text is too short")
    stopped = run(stage, body | {"params": {**body["params"], "stop": ["\x00never", stop]}})
    is_end(stopped.whole("O3"), "stop", "O3")
    if stopped.text != whole.text[: whole.text.index(stop)]:
        raise Broken("O3", f"text {stopped.text!r} of {whole.text!r}, stop {stop!r}")
    if stopped.end.stopped_by != stop:
        raise Broken("O3", f"stopped_by {stopped.end.stopped_by!r}; expected {stop!r}")


@case("worker", "O4")
def worker_echo(stage: WorkerStage) -> None:
    """`echo`: PROMPT once, before the first TOKENS, with the prompt's text."""
    body = stage.body(3, params={"echo": True})
    stream = run(stage, body)
    stream.whole()
    prompts = [event for event in stream.events if isinstance(event, messages.PromptEvent)]
    if stream.events[0] not in prompts or len(prompts) != 1:
        raise Broken("O4", f"{len(prompts)} PROMPTs; expected one, before all other events")
    if body["prompt"].strip() not in prompts[0].text or not prompts[0].token_ids:
        raise Broken(
            "O4", f"PROMPT {prompts[0].text!r} {prompts[0].token_ids} of {body['prompt']!r}"
        )


@case("worker", "P1")
def worker_logprobs(stage: WorkerStage) -> None:
    """`logprobs` 2: an entry with two alternatives for each token."""
    stream = run(stage, stage.body(4, params={"logprobs": 2}))
    end = stream.whole()
    if isinstance(end, messages.FailEvent):
        raise Skipped(f"the worker gives no logprobs: {end.error.message}")
    for event in stream.events:
        if isinstance(event, messages.TokensEvent):
            entries = event.logprobs or []
            if len(entries) != len(event.token_ids) or any(len(e.top) < 2 for e in entries):
                raise Broken("P1", f"{len(entries)} logprobs for {len(event.token_ids)} tokens")


@case("worker", "R1")
def worker_kinds(stage: WorkerStage) -> None:
    """A request of every kind that the model lists in `kinds`: END with a result of its shape."""
    (info,) = [info for info in stage.models if info.name == stage.model][:1]
    kinds = {kind.value for kind in info.kinds}
    talk = [{"role": "user", "content": "Once upon a time"}]
    asked: list[tuple[str, dict[str, Any], str, type]] = [
        ("count", {"prompt": "Once upon"}, "count", int),
        ("tokenize", {"prompt": "Once upon"}, "token_ids", list),
        ("template", {"messages": talk}, "text", str),
        ("embed", {"inputs": ["Once", "upon"]}, "embeddings", list),
    ]
    results: dict[str, Any] = {}
    for kind, given, key, shape in asked:
        if kind in kinds:
            stream = run(stage, {"model": stage.model, "kind": kind, "window": 1, **given})
            end = stream.whole("R1")
            results[kind] = (getattr(end, "result", None) or {}).get(key)
            if not isinstance(results[kind], shape) or stream.tokens:
                raise Broken("R1", f"{kind}: {end}; expected a result with {key}")
    if {"tokenize", "detokenize"} <= kinds:
        given = {"token_ids": results["tokenize"]}
        stream = run(stage, {"model": stage.model, "kind": "detokenize", "window": 1, **given})
        text = (stream.whole("R1").result or {}).get("text")
        if not isinstance(text, str) or "Once upon" not in text:
            raise Broken("R1", f"detokenize of the result of tokenize: {text!r}")
    if {"tokenize", "count"} <= kinds and results["count"] != len(results["tokenize"]):
        raise Broken(
            "R1", f"count says {results['count']} tokens, tokenize {len(results['tokenize'])}"
        )
    if "chat" in kinds:
        body = stage.body(3)
        del body["prompt"]
        is_end(run(stage, body | {"kind": "chat", "messages": talk}).whole(), "length", "R1")
