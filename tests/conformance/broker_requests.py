"""Cases of a broker: requests, credit, and streams that survive (sections 6 and 7)."""

from __future__ import annotations

import time

import msgpack

from broker.protocol import messages
from broker.protocol.header import MessageType as T
from tests.conformance.broker_stage import BrokerScene
from tests.conformance.verdicts import Broken, case
from tests.conformance.wire import Got, Peer, new_id, next_epoch


def ends(events: list[object], rule: str, reason: str) -> None:
    """Check that the last event is END with this reason."""
    last = events[-1] if events else None
    if not isinstance(last, messages.EndEvent) or last.finish_reason.value != reason:
        raise Broken(rule, f"{events}; expected END {reason}")


def interrupted(client: Peer, id_: bytes, code: str, rule: str, *, lost: bool) -> Got:
    """Check that the client gets INTERRUPTED next."""
    got = client.expect(T.INTERRUPTED, T.ACCEPTED, T.OUTPUT, rule=rule)
    body = got.body
    if got.id != id_ or body.error.code != code or body.lost != lost:
        raise Broken(rule, f"INTERRUPTED {got.plain}; expected code {code}, lost {lost}")
    return got


def assigned_to(workers: list[Peer], seconds: float, rule: str) -> tuple[Peer, Got]:
    """The worker that gets the next ASSIGN."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        for worker in workers:
            got = worker.next(seconds=0.02)
            if got is not None and got.type is T.ASSIGN:
                return worker, got
    raise Broken(rule, f"no ASSIGN within {seconds:g} s")


# --- the normal course ----------------------------------------------------------------------------


@case("broker", "R15", "R16", "R12", "R2")
def broker_course(scene: BrokerScene) -> None:
    """A request with an attachment: the worker gets its bytes unchanged; the client gets ACCEPTED
    with worker and route, and the body of OUTPUT unchanged, without the ledger."""
    worker, client = scene.worker(), scene.client()
    image = scene.random.randbytes(1000)
    body = scene.body(attachments=[{"media_type": "image/png"}], later=["a key of a later version"])
    id_ = new_id(scene.random)
    client.send(T.REQUEST, id_, body, image)
    got = scene.assigned(worker, id_)
    if got.frames[2:] != [msgpack.packb(body), image]:
        raise Broken("R15", "ASSIGN does not carry the client's frames as they came")
    accepted = scene.placed(client, id_)
    route = got.body.reply_to
    if accepted.body.worker != f"worker-{scene.name}" or accepted.body.route != route:
        raise Broken("R16", f"ACCEPTED {accepted.plain}; expected route {route.hex()}")
    events = [
        [0, id_, 0, 0, [1, 2], "äö", None, None, "a field of a later version"],
        [1, id_, 0, 2, "stop", "", {}, {}],
    ]
    sent = [msgpack.packb([event]) for event in events]
    worker.send(T.OUTPUT, route, sent[0], msgpack.packb([1, [], [id_]]), flags=1)
    worker.granted += 1
    ledger = [worker.granted, [[id_, "stop", 1, 2]]]
    worker.send(T.OUTPUT, route, sent[1], msgpack.packb(ledger), flags=1)
    for expected in sent:
        output = client.expect(T.OUTPUT, rule="R15")
        if output.frames[1:] != [expected]:
            raise Broken("R15", "OUTPUT does not reach the client as it came")
        if output.id != route:
            raise Broken("R12", f"OUTPUT under {output.id.hex()}; the route is {route.hex()}")


@case("broker", "R16", "G1", "G2")
def broker_queue(scene: BrokerScene) -> None:
    """Three requests and no credit: ACCEPTED gives their positions; each credit, in whichever
    message it comes, brings one ASSIGN, in order."""
    worker, client = scene.worker(slots=0), scene.client()
    ids = []
    for position in range(3):
        ids.append(scene.request(client))
        got = client.expect(T.ACCEPTED, rule="R16")
        if got.id != ids[-1] or got.body.position != position or got.body.worker:
            raise Broken("R16", f"ACCEPTED {got.plain} of request number {position}")
    worker.quiet("G1", "nothing is granted")
    scene.grant(worker)
    first = scene.assigned(worker, ids[0], "R11").body.reply_to
    worker.send(T.HEARTBEAT, worker.id, {"state": "ready", "granted": 2})
    worker.granted = 2
    scene.assigned(worker, ids[1], "G2")
    scene.finish(worker, ids[0], first)
    scene.assigned(worker, ids[2], "G1")
    worker.quiet("G1", "three slots were granted, and are taken")


@case("broker", "G1")
def broker_lower_grant(scene: BrokerScene) -> None:
    """Two slots are granted; then a CREDIT and a HEARTBEAT say 1 and 0: `granted` never falls."""
    worker, client = scene.worker(slots=2), scene.client()
    worker.send(T.CREDIT, worker.id, {"granted": 1})
    worker.send(T.HEARTBEAT, worker.id, {"state": "ready", "granted": 0})
    worker.rest(0.1)
    for _ in range(2):
        scene.assigned(worker, scene.request(client), "G1")
    scene.request(client)
    worker.quiet("G1", "two slots were granted, and are taken")


@case("broker", "R11")
def broker_order(scene: BrokerScene) -> None:
    """Higher priority first; within a priority, users take turns; within a user, oldest first."""
    worker, client = scene.worker(slots=0), scene.client()
    asked = [("late", 0, "a"), ("later", 0, "a"), ("other", 0, "b"), ("high", 5, "c")]
    ids = {}
    for name, priority, user in asked:
        ids[scene.request(client, priority=priority, user=user)] = name
        client.expect(T.ACCEPTED, rule="R16")
    scene.grant(worker, 4)
    order = [ids.get(worker.expect(T.ASSIGN, rule="R11").id) for _ in asked]
    if order != ["high", "late", "other", "later"]:
        raise Broken("R11", f"assigned in the order {order}")


@case("broker", "R5", "R6")
def broker_same_id(scene: BrokerScene) -> None:
    """REQUEST with the id of a running request: ignored from its own session, refused from another
    and after its end."""
    worker, client, other = scene.worker(slots=3), scene.client(), scene.client("other")
    id_, route = scene.running(client, worker)
    client.send(T.REQUEST, id_, scene.body())
    client.quiet("R5", "a copy of a running request is ignored")
    other.send(T.REQUEST, id_, scene.body())
    scene.failed(other, id_, "duplicate_request", "R6")
    scene.finish(worker, id_, route)
    ends(scene.output(client, "R15"), "R15", "stop")
    client.send(T.REQUEST, id_, scene.body())
    scene.failed(client, id_, "duplicate_request", "R6")
    worker.quiet("R6", "nothing is assigned twice")


@case("broker", "R9", "R7")
def broker_unknown_model(scene: BrokerScene) -> None:
    """A model that nobody serves, beside one that is served."""
    scene.worker()
    client = scene.client()
    id_ = new_id(scene.random)
    client.send(T.REQUEST, id_, scene.body(model="x-nobody"))
    event = scene.failed(client, id_, "model_unavailable", "R9")
    if event.offset != 0:
        raise Broken("R7", f"FAIL with offset {event.offset}")


@case("broker", "R8")
def broker_deadlines(scene: BrokerScene) -> None:
    """`queue_ms` 0 and 200, and `ttl_ms`, while no slot is free; ASSIGN has the time that is
    left."""
    worker, client = scene.worker(slots=0), scene.client()
    for limits, least_s in (
        ({"queue_ms": 0}, 0.0),
        ({"queue_ms": 200}, 0.2),
        ({"ttl_ms": 200}, 0.2),
    ):
        begun_s = time.monotonic()
        id_ = scene.request(client, **limits)
        scene.failed(client, id_, "deadline_exceeded", "R8")
        if time.monotonic() - begun_s < least_s * 0.9:
            raise Broken("R8", f"{limits} failed after {time.monotonic() - begun_s:.2f} s")
    id_ = scene.request(client, ttl_ms=60_000)
    client.expect(T.ACCEPTED, rule="R16")
    client.rest(0.3)
    scene.grant(worker)
    rest = scene.assigned(worker, id_).body.ttl_ms
    if rest is None or not 30_000 < rest < 59_900:
        raise Broken("R8", f"ASSIGN with ttl_ms {rest}; some of 60000 had passed")


@case("broker", "L1")
def broker_attachments(scene: BrokerScene) -> None:
    """Seventeen attachments: FAIL `too_large`, or the session ends."""
    client = scene.client()
    id_ = scene.request(client, *([b"x"] * 17), attachments=[{}] * 17)
    got = client.next(T.ACCEPTED)
    if got is None or (got.type is T.OUTPUT and got.body[0].error.code != "too_large"):
        raise Broken("L1", f"{got and got.plain} for 17 attachments")
    if got.type not in (T.OUTPUT, T.REFUSE):
        raise Broken("L1", f"{got.type.name} for 17 attachments of {id_.hex()[:8]}")


# --- cancel and window ----------------------------------------------------------------------------


@case("broker", "C2", "C3", "C1")
def broker_cancel(scene: BrokerScene) -> None:
    """CANCEL of a queued request, twice: the broker answers with END `cancelled` each time. CANCEL
    of a running one goes to the worker, whose END goes to the client."""
    worker, client = scene.worker(), scene.client()
    id_, route = scene.running(client, worker)
    queued = scene.request(client)
    client.expect(T.ACCEPTED, rule="R16")
    for rule in ("C2", "C1"):
        client.send(T.CANCEL, queued)
        ends(scene.output(client, rule), rule, "cancelled")
    client.send(T.CANCEL, id_)
    if worker.expect(T.CANCEL, rule="C3").id != id_:
        raise Broken("C3", "CANCEL of another request")
    client.quiet("C3", "the worker answers, not the broker")
    scene.finish(worker, id_, route, reason="cancelled")
    ends(scene.output(client, "C3"), "C3", "cancelled")


@case("broker", "C6")
def broker_goodbye_cancels(scene: BrokerScene) -> None:
    """A client leaves: its running request is cancelled at the worker, its queued one forgotten."""
    worker, client = scene.worker(), scene.client()
    id_, route = scene.running(client, worker)
    scene.request(client)
    client.leave()
    if worker.expect(T.CANCEL, rule="C6").id != id_:
        raise Broken("C6", "CANCEL of another request")
    scene.finish(worker, id_, route, reason="cancelled")
    worker.quiet("C6", "the queued request was cancelled")


@case("broker", "C6", "M14")
def broker_orphan(scene: BrokerScene) -> None:
    """A client vanishes, or leaves with `protocol_error`: its request runs on until the orphan
    grace is over, and is then cancelled."""
    worker, client, other = scene.worker(slots=2), scene.client(), scene.client("other")
    ids = {scene.running(client, worker)[0], scene.running(other, worker)[0]}
    client.vanish()
    other.leave("protocol_error")
    worker.quiet("C6", "the client may come back", seconds=0.4)
    got = {worker.expect(T.CANCEL, rule="M14").id for _ in range(2)}
    if got != ids:
        raise Broken("M14", "CANCEL of another request")


@case("broker", "W3")
def broker_window(scene: BrokerScene) -> None:
    """WINDOW goes to the worker, unless it is not above the last or comes from another client."""
    worker, client, other = scene.worker(), scene.client(), scene.client("other")
    id_ = new_id(scene.random)
    client.send(T.REQUEST, id_, scene.body(window=16))
    scene.assigned(worker, id_)
    other.send(T.WINDOW, id_, {"limit": 99})
    for limit in (16, 8, 32):
        client.send(T.WINDOW, id_, {"limit": limit})
    got = worker.expect(T.WINDOW, rule="W3")
    if got.id != id_ or got.body.limit != 32:
        raise Broken(
            "W3",
            f"WINDOW {got.body.limit}; expected 32, the client's only higher one",
        )


# --- interruptions --------------------------------------------------------------------------------


@case("broker", "M1", "S14", "S17")
def broker_interrupted(scene: BrokerScene) -> None:
    """A worker leaves drained, with a dead engine, or without GOODBYE: `lost` and the code tell."""
    client = scene.client()
    for reason, code, lost in (
        ("drained", "draining", False),
        ("closed", "draining", False),
        ("engine_dead", "worker_lost", True),
        ("stalled", "worker_lost", True),
        ("", "worker_lost", True),
    ):
        worker = scene.worker(reason or "vanishing")
        id_, _ = scene.running(client, worker)
        if reason:
            worker.leave(reason)
        else:
            worker.vanish()
        got = interrupted(client, id_, code, "M1", lost=lost)
        if got.body.epoch != 0 or got.body.worker != f"{reason or 'vanishing'}-{scene.name}":
            raise Broken("M1", f"INTERRUPTED {got.plain}")
        if lost and not got.body.alone:
            raise Broken(
                "M9", "the worker ran nothing else, before the first token; expected alone"
            )


@case("broker", "M1")
def broker_silent_worker(scene: BrokerScene) -> None:
    """A worker falls silent: INTERRUPTED with `lost` false, since the cause may be the network."""
    worker, client = scene.worker(), scene.client()
    id_, _ = scene.running(client, worker)
    worker.beats = False
    limit_s = worker.interval_s * worker.welcome.liveness
    worker.silence_s = 3600.0
    got = client.next(seconds=limit_s + scene.stage.patience_s)
    if got is None or got.type is not T.INTERRUPTED or got.id != id_ or got.body.lost:
        raise Broken("M1", f"{got and got.plain}; expected INTERRUPTED with lost false")


@case("broker", "G4")
def broker_reject(scene: BrokerScene) -> None:
    """REJECT: `retryable` true interrupts, false fails, whatever the code; the slot is free
    again."""
    worker, client = scene.worker(), scene.client()
    for retryable in (True, False):
        id_, _ = scene.running(client, worker)
        worker.granted += 1
        error = {"code": "draining", "message": "the kit rejects", "retryable": retryable}
        worker.send(T.REJECT, id_, {"error": error, "granted": worker.granted})
        if retryable:
            interrupted(client, id_, "draining", "G4", lost=False)
        else:
            scene.failed(client, id_, "draining", "G4")
    scene.running(client, worker)


# --- RESUME ---------------------------------------------------------------------------------------


@case("broker", "M7", "M4", "M11")
def broker_resume(scene: BrokerScene) -> None:
    """RESUME of a running request: ASSIGN with `attach` to its worker, at the new epoch, without
    using credit; the same epoch again is a copy, an older one fails."""
    worker, client = scene.worker(), scene.client()
    id_, route = scene.running(client, worker)
    worker.events(route, [0, id_, 0, 0, [1], " w"])
    scene.output(client, "R15")
    epoch = next_epoch(0, scene.random)
    scene.resume(client, id_, epoch, token_ids=[1], text_characters=2)
    got = worker.expect(T.ASSIGN, rule="M7")
    if got.id != id_ or not got.body.attach or got.body.epoch != epoch:
        raise Broken("M7", f"ASSIGN {got.plain}; expected attach at epoch {epoch}")
    route = got.body.reply_to
    scene.resume(client, id_, epoch, token_ids=[1], text_characters=2)
    worker.quiet("M4", "a RESUME with the current epoch is a copy")
    scene.resume(client, id_, 1)
    event = scene.failed(client, id_, "invalid_request", "M4")
    if event.epoch != 1:
        raise Broken("M4", f"FAIL with epoch {event.epoch}; expected that of the RESUME")
    scene.finish(worker, id_, route, tokens=1, epoch=epoch)
    ends(scene.output(client, "M11"), "M11", "stop")
    scene.resume(client, id_, next_epoch(epoch, scene.random), token_ids=[1])
    got = worker.expect(T.ASSIGN, rule="M7")
    if got.id != id_ or not got.body.attach:
        raise Broken("M7", "expected attach, also to a request that has just ended")


@case("broker", "R13", "M4", "R12")
def broker_stolen(scene: BrokerScene) -> None:
    """Another session resumes a running request: the first gets FAIL `duplicate_request` and no
    more tokens; a RESUME whose epoch is not higher gets that FAIL itself."""
    worker, client, thief = scene.worker(), scene.client(), scene.client("thief")
    id_, old = scene.running(client, worker)
    epoch = next_epoch(0, scene.random)
    scene.resume(thief, id_, epoch)
    scene.failed(client, id_, "duplicate_request", "R13")
    got = worker.expect(T.ASSIGN, rule="M7")
    if not got.body.attach or got.body.reply_to == old:
        raise Broken("R12", f"ASSIGN {got.plain}; expected another route for another session")
    worker.events(old, [0, id_, 0, 0, [1], " late"])
    worker.events(got.body.reply_to, [0, id_, epoch, 0, [2], " new"])
    (event,) = scene.output(thief, "M7")
    if event.text != " new":
        raise Broken("M7", f"the thief got {event}")
    client.quiet("R13", "its stream goes on elsewhere")
    scene.resume(client, id_, epoch - 1)
    scene.failed(client, id_, "duplicate_request", "M4")


@case("broker", "M7", "M8")
def broker_resume_unknown(scene: BrokerScene) -> None:
    """RESUME of a request that the broker never saw: queued like a new one; ASSIGN without
    `attach`, at its epoch, and not to a worker that it was lost with."""
    lost, good, client = scene.worker("lost", 4), scene.worker("good", 1), scene.client()
    id_, epoch = new_id(scene.random), next_epoch(0, scene.random)
    name = f"lost-{scene.name}"
    facts = {"token_ids": [4, 5], "text_characters": 3, "lost_workers": [name]}
    body = scene.body(resume={"epoch": epoch, **facts})
    client.send(T.RESUME, id_, body)
    worker, got = assigned_to([lost, good], scene.stage.patience_s, "M7")
    if worker is lost:
        raise Broken(
            "M8", f"assigned to {name}, which it was lost with, while another serves the model"
        )
    if got.body.attach or got.body.epoch != epoch or got.frames[2] != msgpack.packb(body):
        raise Broken(
            "M7", f"ASSIGN {got.plain}; expected no attach, epoch {epoch} and the body unchanged"
        )


@case("broker", "M7", "M14", "C6")
def broker_client_comes_back(scene: BrokerScene) -> None:
    """A client vanishes and resumes on a new session: attached, on a new route."""
    worker, client = scene.worker(), scene.client()
    id_, old = scene.running(client, worker)
    client.vanish()
    again = scene.client()
    epoch = next_epoch(0, scene.random)
    scene.resume(again, id_, epoch, holder=f"worker-{scene.name}")
    got = worker.expect(T.ASSIGN, rule="M7")
    if not got.body.attach or got.body.reply_to == old:
        raise Broken("M7", f"ASSIGN {got.plain}; expected attach on a new route")
    worker.events(old, [0, id_, 0, 0, [1], " dead"])
    worker.events(got.body.reply_to, [0, id_, epoch, 0, [2], " live"])
    if scene.output(again, "R12")[0].text != " live":
        raise Broken("R12", "OUTPUT under an old route reached a client")


@case("broker", "M7", "G4")
def broker_holder(scene: BrokerScene) -> None:
    """RESUME names a holder that is connected: attached there. If the holder does not have it, its
    REJECT interrupts the request, and frees no slot."""
    worker, client = scene.worker("holder"), scene.client()
    id_ = new_id(scene.random)
    scene.resume(client, id_, next_epoch(0, scene.random), holder=f"holder-{scene.name}")
    got = worker.expect(T.ASSIGN, rule="M7")
    if not got.body.attach:
        raise Broken("M7", "the holder is connected; expected attach")
    error = {"code": "worker_lost", "message": "not here", "retryable": True}
    worker.send(T.REJECT, id_, {"error": error, "granted": worker.granted})
    interrupted(client, id_, "worker_lost", "G4", lost=False)


@case("broker", "M7", "M14", "G7")
def broker_worker_comes_back(scene: BrokerScene) -> None:
    """A worker loses its connection and comes back with two requests in `holds`: the client's
    RESUME is attached to the running one; a ledger without a route reports the one that ended
    unread."""
    instance = b"\7" * 16
    worker, client = scene.worker(slots=2, instance=instance), scene.client()
    id_, _ = scene.running(client, worker)
    ended, _ = scene.running(client, worker)
    worker.vanish()
    for request in (id_, ended):
        got = client.expect(T.INTERRUPTED, rule="M1")
        if got.id not in (id_, ended):
            raise Broken("M1", f"INTERRUPTED of {request.hex()[:8]}")
    holds = [[id_, 0, 1, True], [ended, 0, 1, True]]
    again = scene.worker(slots=0, instance=instance, holds=holds)
    again.events(bytes(16), ledger=[1, [[ended, "stop", 1, 1]]])
    again.granted = 1
    epoch = next_epoch(0, scene.random)
    scene.resume(client, id_, epoch, lost_workers=[f"worker-{scene.name}"])
    got = again.expect(T.ASSIGN, rule="M7")
    if got.id != id_ or not got.body.attach:
        raise Broken("M7", f"ASSIGN {got.plain}; expected attach, since the worker holds it")


@case("broker", "M17")
def broker_resume_loop(scene: BrokerScene) -> None:
    """A worker rejects and the client resumes at once, again and again: FAIL `overloaded` stops the
    loop, and says when to come back."""
    worker, client = scene.worker(), scene.client()
    id_, _ = scene.running(client, worker)
    epoch = 0
    for _ in range(40):
        worker.granted += 1
        error = {"code": "draining", "message": "the kit rejects", "retryable": True}
        worker.send(T.REJECT, id_, {"error": error, "granted": worker.granted})
        interrupted(client, id_, "draining", "G4", lost=False)
        epoch = next_epoch(epoch, scene.random)
        scene.resume(client, id_, epoch)
        got = client.next()
        while got is not None and got.type is T.ACCEPTED and not got.body.worker:
            got = client.next()
        if got is not None and got.type is T.OUTPUT:
            (event,) = got.body
            failure = isinstance(event, messages.FailEvent) and event.error
            if not failure or failure.code != "overloaded" or not failure.retryable:
                raise Broken("M17", f"{event}; expected FAIL overloaded, retryable")
            if not failure.retry_after_ms or event.epoch != epoch:
                raise Broken("M17", f"{event}; expected retry_after_ms and the epoch of the RESUME")
            return
        scene.assigned(worker, id_, "M7")
    raise Broken("M17", "40 RESUMEs in a row were accepted without delay")


@case("broker", "M9")
def broker_poison(scene: BrokerScene) -> None:
    """A request that killed three workers while it ran alone: FAIL `poison`, and no worker gets
    it."""
    worker, client = scene.worker(), scene.client()
    id_ = new_id(scene.random)
    names = [f"dead-{n}-{scene.name}" for n in range(3)]
    epoch = next_epoch(0, scene.random)
    client.send(
        T.RESUME,
        id_,
        scene.body(resume={"epoch": epoch, "lost_workers": names, "lost_alone": names}),
    )
    got = client.next(T.ACCEPTED, seconds=20.0)
    event = got.body[0] if got is not None and got.type is T.OUTPUT else None
    if not isinstance(event, messages.FailEvent) or event.error.code != "poison":
        raise Broken("M9", f"{got and got.plain}; expected FAIL poison")
    worker.quiet("M9", "no worker gets it")


@case("broker", "M9", "M10")
def broker_suspect(scene: BrokerScene) -> None:
    """A request that was lost with two workers runs alone until 0.5 s after its first token; then
    ACCEPTED names them in `returned`, and other requests run beside it."""
    worker, client = scene.worker(slots=2), scene.client()
    names = [f"dead-{n}-{scene.name}" for n in range(2)]
    id_, epoch = new_id(scene.random), next_epoch(0, scene.random)
    scene.resume(client, id_, epoch, lost_workers=names)
    got = worker.next(seconds=20.0)
    if got is None or got.type is not T.ASSIGN or got.id != id_:
        raise Broken("M9", "the suspect was not assigned")
    scene.placed(client, id_)
    beside = scene.request(client)
    worker.quiet("M9", "a suspect runs alone")
    worker.events(got.body.reply_to, [0, id_, epoch, 0, [1], "x"], ledger=[2, [], [id_]])
    until_s = time.monotonic() + scene.stage.patience_s
    returned: set[str] = set()
    while not returned and time.monotonic() < until_s:
        message = client.next(T.OUTPUT, seconds=0.1)
        worker.pump(0.0)
        if message is not None and message.type is T.ACCEPTED and message.id == id_:
            returned = set(message.body.returned)
        if message is None:
            # The broker notices by the next ledger that the time has passed.
            worker.events(got.body.reply_to, ledger=[2, [], []])
    if returned != set(names):
        raise Broken("M9", f"ACCEPTED.returned {returned}; expected {set(names)}")
    scene.assigned(worker, beside, "M9")


@case("broker", "R12")
def broker_foreign_route(scene: BrokerScene) -> None:
    """A worker sends OUTPUT under another worker's route: nobody gets it, and its session goes
    on."""
    worker, client = scene.worker("first"), scene.client()
    id_, route = scene.running(client, worker)
    other = scene.worker("other")
    other.events(route, [0, id_, 0, 0, [6], " EVIL"])
    other.quiet("R12", "it is dropped silently")
    client.quiet("R12", "another worker's OUTPUT is dropped")
    worker.events(route, [0, id_, 0, 0, [1], " good"])
    if scene.output(client, "R12")[0].text != " good":
        raise Broken("R12", "OUTPUT of another worker reached the client")


@case("broker", "K4", "R15")
def broker_report(scene: BrokerScene) -> None:
    """A worker's OUTPUT is not an array: it reaches the client unread, and the client reports it;
    the broker cuts the worker off, names it, and interrupts its requests."""
    worker, client = scene.worker(), scene.client()
    id_, route = scene.running(client, worker)
    worker.send(T.OUTPUT, route, {"no": "array"})
    raw = None
    until_s = time.monotonic() + scene.stage.patience_s
    while raw is None and time.monotonic() < until_s:
        worker.pump(0.0)
        client.pump(0.02)
        raw = client.broken
        client.inbox.clear()
    if raw is None:
        raise Broken("R15", "OUTPUT did not reach the client as it came")
    client.broken = None  # the kit itself caused it
    sequence = client.expected
    client.expected += 1
    query = new_id(scene.random)
    args = {"sequence": sequence, "why": "a map instead of the array"}
    client.send(T.QUERY, query, {"verb": "bus.report", "args": args})
    arrived = {}
    for _ in range(2):
        got = client.next(T.ACCEPTED)
        if got is not None:
            arrived[got.type] = got
    answer, gone = arrived.get(T.ANSWER), arrived.get(T.INTERRUPTED)
    if answer is None or (answer.body.result or {}).get("worker") != f"worker-{scene.name}":
        raise Broken("K4", f"bus.report was answered with {answer and answer.plain}")
    if gone is None or gone.id != id_:
        raise Broken("K4", "the worker's request was not interrupted")
    got = worker.expect(T.REFUSE, rule="K4")
    if got.body.error.code != "protocol_error":
        raise Broken("K4", f"the worker was refused with {got.body.error.code}")
