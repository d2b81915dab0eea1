"""The examples of golden.json: one message of every kind, with every field in one of them."""

from __future__ import annotations

from broker.protocol import header, messages as m
from broker.protocol.header import Flag, MessageType
from tests.protocol.golden_base import ERROR, REQUEST, ROUTE, SESSION, Example
from tests.protocol.golden_fields import every_field


def examples() -> dict[str, Example]:
    """One message of every kind, with every field in one of them."""
    t = MessageType
    image = b"\x89PNG not really"
    request = m.Request(
        model="demo",
        messages=[
            m.Message(role="system", content="Be brief."),
            m.Message(
                role="user",
                content=[m.TextPart(text="What is this?"), m.ImagePart(attachment=0)],
            ),
        ],
        params=m.Params(max_tokens=64, temperature=0.0, seed=7, stop=["\n\n"], logprobs=2),
        ttl_ms=60_000,
        priority=-1,
        user="ann",
        window=4096,
        attachments=[m.Attachment(media_type="image/png")],
    )
    complete = m.Request(model="demo", kind=m.Kind.COMPLETE, token_ids=[1, 2, 3], window=16)
    resumed = m.Request(
        model="demo",
        kind=m.Kind.COMPLETE,
        prompt="Once",
        window=20,
        resume=m.Resume(
            epoch=1, token_ids=[5, 6], text_characters=7, prompt_seen=True, lost_workers=["gpu-1"]
        ),
    )
    moved = m.Request(
        model="demo",
        kind=m.Kind.COMPLETE,
        prompt="Once",
        window=20,
        resume=m.Resume(epoch=2, token_ids=[5, 6], text_characters=7, holder="gpu-2"),
    )
    #: The client's second RESUME: epochs rise by a random step of 36 bits.
    suspect = m.Request(
        model="demo",
        kind=m.Kind.COMPLETE,
        prompt="Once",
        window=20,
        resume=m.Resume(
            epoch=(1 << 37) + 12_345_678_901,
            token_ids=[5, 6],
            text_characters=7,
            lost_workers=["gpu-1", "gpu-2"],
            lost_alone=["gpu-2"],
        ),
    )
    logprob = m.TokenLogprob(
        -0.5, b"He", [m.TopLogprob(11, -0.5, b"He"), m.TopLogprob(12, -1, b"A")]
    )
    usage = m.Usage(prompt_tokens=12, completion_tokens=2, cached_tokens=4, image_tokens=9)
    events = [
        m.PromptEvent(REQUEST, 1, 0, [1, 2], "Once", None),
        m.TokensEvent(REQUEST, 1, 2, [11, 300], "He…", [logprob, logprob]),
        m.EndEvent(
            REQUEST, 1, 4, m.FinishReason.STOP, "llo", usage, m.Timings(queue_ms=1.5), None, "\n\n"
        ),
        m.FailEvent(bytes(reversed(REQUEST)), 0, 3, ERROR),
    ]
    model = m.ModelInfo(
        name="demo", context_tokens=2048, images=True, details={"architecture": "Llava"}
    )
    ledger = m.Ledger(9, [m.Finished(REQUEST, "stop", 12, 2)], [REQUEST])
    limits = m.BusLimits(
        request_bytes=8 << 20,
        attachment_bytes=16 << 20,
        attachments_bytes=64 << 20,
        attachments=16,
        inflight=256,
    )
    return {
        "hello_client": (t.HELLO, header.NO_ID, 0, 0, [m.Hello(role="client", name="laptop")], []),
        "hello_worker": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [
                m.Hello(
                    role="worker",
                    name="gpu-1",
                    software="tokenbus 0.1",
                    models=[model],
                    capacity=32,
                    speed=2.0,
                    engine="transformers",
                    device="cuda:0",
                    holds=[m.Held(REQUEST, 1, 40), m.Held(ROUTE, 0, 3, False)],
                )
            ],
            [],
        ),
        "welcome": (
            t.WELCOME,
            SESSION,
            0,
            0,
            [
                m.Welcome(
                    version=1,
                    broker="bus",
                    software="tokenbus 0.1",
                    heartbeat_interval_ms=1000,
                    liveness=5,
                    limits=limits,
                    window=4096,
                )
            ],
            [],
        ),
        "refuse": (t.REFUSE, header.NO_ID, 0, 0, [m.Refuse(error=ERROR, fatal=True)], []),
        "heartbeat_empty": (t.HEARTBEAT, SESSION, 5, 0, [m.Heartbeat()], []),
        "heartbeat_worker": (
            t.HEARTBEAT,
            SESSION,
            6,
            0,
            [
                m.Heartbeat(
                    state=m.WorkerState.READY,
                    running=3,
                    waiting=1,
                    granted=12,
                    engine_age_ms=40,
                    metrics={"tokens_per_s": 812.5},
                    models=[model],
                    capacity=32,
                )
            ],
            [],
        ),
        "heartbeat_engine_ready": (
            t.HEARTBEAT,
            SESSION,
            7,
            0,
            [
                m.Heartbeat(
                    state=m.WorkerState.READY,
                    granted=0,
                    models=[model],
                    capacity=32,
                    engine="transformers",
                    device="cuda:0",
                )
            ],
            [],
        ),
        "heartbeat_broker": (
            t.HEARTBEAT,
            SESSION,
            7,
            0,
            [m.Heartbeat(waiting=3, recalled=2, returned=1)],
            [],
        ),
        "hello_worker_by_its_instance": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [m.Hello(role="worker", name="gpu-1", capacity=1, instance=bytes(range(1, 17)))],
            [],
        ),
        "hello_worker_of_two_brokers": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [m.Hello(role="worker", name="gpu-1", capacity=1, brokers=2)],
            [],
        ),
        "goodbye": (t.GOODBYE, SESSION, 7, 0, [m.Goodbye(reason="drained")], []),
        "drain": (t.DRAIN, SESSION, 8, 0, [m.Drain(reason="upgrade", deadline_ms=30_000)], []),
        "request_chat": (t.REQUEST, REQUEST, 1, 0, [request], [image]),
        "request_token_ids": (t.REQUEST, REQUEST, 2, 0, [complete], []),
        "accepted": (t.ACCEPTED, REQUEST, 1, 0, [m.Accepted(position=3)], []),
        "assign": (
            t.ASSIGN,
            REQUEST,
            9,
            0,
            [m.Assign(reply_to=ROUTE, ttl_ms=59_900), request],
            [image],
        ),
        "assign_attach": (
            t.ASSIGN,
            REQUEST,
            10,
            0,
            [m.Assign(reply_to=ROUTE, epoch=1, attach=True), resumed],
            [],
        ),
        "cancel": (t.CANCEL, REQUEST, 3, 0, [m.Cancel()], []),
        "window": (t.WINDOW, REQUEST, 4, 0, [m.Window(limit=8192)], []),
        "credit": (t.CREDIT, SESSION, 1, 0, [m.Credit(granted=32)], []),
        "credit_recalled": (t.CREDIT, SESSION, 2, 0, [m.Credit(granted=32, recalled=2)], []),
        "output_worker_ledger": (
            t.OUTPUT,
            ROUTE,
            11,
            Flag.LEDGER,
            [events, ledger],
            [],
        ),
        "output_client": (t.OUTPUT, SESSION, 12, 0, [events], []),
        "reject": (t.REJECT, REQUEST, 12, 0, [m.Reject(error=ERROR, granted=10)], []),
        "resume": (t.RESUME, REQUEST, 5, 0, [resumed], []),
        "resume_with_holder": (t.RESUME, REQUEST, 6, 0, [moved], []),
        "accepted_at_a_worker": (
            t.ACCEPTED,
            REQUEST,
            3,
            0,
            [m.Accepted(worker="gpu-2", returned=["gpu-1"], route=ROUTE)],
            [],
        ),
        "accepted_continues_by_text": (
            t.ACCEPTED,
            REQUEST,
            4,
            0,
            [m.Accepted(worker="lab", route=ROUTE, resume="text")],
            [],
        ),
        "accepted_while_loading": (t.ACCEPTED, REQUEST, 5, 0, [m.Accepted(progress=0.4)], []),
        "heartbeat_load": (t.HEARTBEAT, SESSION, 9, 0, [m.Heartbeat(load="demo")], []),
        "heartbeat_unload": (t.HEARTBEAT, SESSION, 10, 0, [m.Heartbeat(unload=True)], []),
        "heartbeat_on_demand": (
            t.HEARTBEAT,
            SESSION,
            10,
            0,
            [
                m.Heartbeat(
                    state=m.WorkerState.READY,
                    models=[
                        m.ModelInfo(name="demo", load_ms=9000),
                        m.ModelInfo(name="other", loaded=False, load_ms=4000),
                    ],
                    capacity=16,
                )
            ],
            [],
        ),
        "heartbeat_load_in_place": (
            t.HEARTBEAT,
            SESSION,
            11,
            0,
            [m.Heartbeat(load="demo", gives_way=["large", "larger"])],
            [],
        ),
        "heartbeat_memory": (
            t.HEARTBEAT,
            SESSION,
            12,
            0,
            [
                m.Heartbeat(
                    state=m.WorkerState.READY,
                    models=[
                        m.ModelInfo(name="demo", memory_bytes=6 << 30, loads_with="demo"),
                        m.ModelInfo(name="demo-2", memory_bytes=6 << 30, loads_with="demo"),
                        m.ModelInfo(
                            name="other",
                            loaded=False,
                            load_ms=4000,
                            memory_bytes=8 << 30,
                            must_free_bytes=2 << 30,
                        ),
                    ],
                    capacity=16,
                )
            ],
            [],
        ),
        "heartbeat_failed": (
            t.HEARTBEAT,
            SESSION,
            13,
            0,
            [
                m.Heartbeat(
                    state=m.WorkerState.READY,
                    models=[m.ModelInfo(name="demo")],
                    failed=[
                        m.FailedModel(name="broken", cause="no config.json", retry_in_ms=30_000)
                    ],
                    capacity=16,
                )
            ],
            [],
        ),
        "hello_failed": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [m.Hello(role="worker", name="lab", failed=[m.FailedModel(name="broken")])],
            [],
        ),
        "hello_continues_by_ids": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [m.Hello(role="worker", name="lab", models=[m.ModelInfo(name="demo", resume="ids")])],
            [],
        ),
        "resume_of_a_suspect": (t.RESUME, REQUEST, 7, 0, [suspect], []),
        "interrupted_alone": (
            t.INTERRUPTED,
            REQUEST,
            14,
            0,
            [
                m.Interrupted(
                    epoch=(1 << 36) + 5, worker="gpu-2", lost=True, error=ERROR, alone=True
                )
            ],
            [],
        ),
        "interrupted": (
            t.INTERRUPTED,
            REQUEST,
            13,
            0,
            [m.Interrupted(epoch=1, worker="gpu-1", lost=True, error=ERROR)],
            [],
        ),
        "query": (t.QUERY, ROUTE, 6, 0, [m.Query(verb="bus.drain", args={"worker": "gpu-1"})], []),
        "answer": (t.ANSWER, ROUTE, 14, 0, [m.Answer(result=[{"name": "demo"}])], []),
        "answer_error": (t.ANSWER, ROUTE, 15, 0, [m.Answer(error=ERROR)], []),
    } | every_field()
