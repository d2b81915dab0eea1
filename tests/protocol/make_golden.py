"""Writes golden.json: the octets of one message of every kind, as SPEC.md describes them.

The golden file is the contract with peers in other languages, so it is only ever extended:
`python -m tests.protocol.make_golden` refuses to change an existing entry unless `--force` is given
(a new protocol version).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from broker.protocol import codec, header
from broker.protocol import messages as m
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import Flag, MessageType

GOLDEN = Path(__file__).with_name("golden.json")
SESSION = bytes(range(0x10, 0x20))
REQUEST = bytes(range(0x20, 0x30))
ROUTE = bytes(range(0x30, 0x40))
ERROR = ErrorInfo(
    code="overloaded",
    message="The queue of model demo is full. Try again in 250 ms.",
    retryable=True,
    retry_after_ms=250,
    details={"queued": 1000},
)


def examples() -> dict[str, tuple[MessageType, bytes, int, int, list[Any], list[bytes]]]:
    """name -> type, id, sequence, flags, bodies, attachments."""
    t = MessageType
    picture = b"\x89PNG not really"
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
        "request_chat": (t.REQUEST, REQUEST, 1, 0, [request], [picture]),
        "request_token_ids": (t.REQUEST, REQUEST, 2, 0, [complete], []),
        "accepted": (t.ACCEPTED, REQUEST, 1, 0, [m.Accepted(position=3)], []),
        "assign": (
            t.ASSIGN,
            REQUEST,
            9,
            0,
            [m.Assign(reply_to=ROUTE, ttl_ms=59_900), request],
            [picture],
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
    }


def octets() -> dict[str, list[str]]:
    """name -> frames as hexadecimal text."""
    written = {}
    for name, (type_, id_, sequence, flags, bodies, attachments) in examples().items():
        frames = [header.encode(type_, id_, sequence, flags)]
        frames += [
            codec.encode_events(body) if isinstance(body, list) else codec.encode(body)
            for body in bodies
        ]
        written[name] = [frame.hex() for frame in [*frames, *attachments]]
    return written


def main() -> None:
    known: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    now = octets()
    changed = [name for name in now if name in known and known[name] != now[name]]
    if changed and "--force" not in sys.argv:
        sys.exit(f"these messages would change, which needs a new protocol version: {changed}")
    GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    print(f"{len(now)} messages, {len(now) - len(known)} new")


if __name__ == "__main__":
    main()
