"""Writes golden.json: the bytes of one message of every kind, as SPEC.md describes them; beside it
wrong.json (`wrong_messages`) and GOLDEN.md, which says of each what it shows.

The golden file is the contract with peers in other languages, so it is only ever extended:
`python -m tests.protocol.make_golden` refuses to change an existing entry unless `--force` is given
(a new protocol version).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from broker.protocol import codec, header, messages as m
from broker.protocol.errors import ErrorInfo
from broker.protocol.header import Flag, MessageType
from tests.protocol.golden_shows import PAGE_TEXT, SHOWS
from tests.protocol.wrong_base import MEANING
from tests.protocol.wrong_messages import WRONG, as_json, wrong_messages

GOLDEN = Path(__file__).with_name("golden.json")
PAGE = Path(__file__).with_name("GOLDEN.md")
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


Example = tuple[MessageType, bytes, int, int, list[Any], list[bytes]]
"""Type, id, sequence, flags, bodies, attachments."""


def examples() -> dict[str, Example]:
    """One message of every kind, with every field in one of them."""
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
    } | _every_field()


def _every_field() -> dict[str, Example]:
    """Fields that the messages above leave at their defaults."""
    t = MessageType
    relay = m.ModelInfo(
        name="demo", kinds=(m.Kind.CHAT, m.Kind.EMBED), details={"via": ["lower"]}, capacity=3
    )
    hello = m.Hello(
        role="worker", name="relay", models=[relay], capacity=8, max_version=2, min_version=0
    )
    unbatched = m.ModelInfo(name="demo", serial="layers of type recurrent")
    serial = m.Hello(role="worker", name="gpu-0", models=[unbatched])
    loading = m.Heartbeat(state=m.WorkerState.LOADING, progress=0.5, note="weights", models=[relay])
    params = m.Params(
        min_tokens=2,
        top_p=0.9,
        top_k=40,
        min_p=0.05,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        stop_token_ids=[2],
        ignore_eos=True,
        include_stop=True,
        skip_special_tokens=False,
        prompt_logprobs=1,
        echo=True,
        logit_bias=[(5, -1.5)],
        banned_token_ids=[6],
        forced_token_ids=[7],
        constraint=m.Constraint(type="regex", value="[0-9]+"),
        overflow="truncate_left",
        stream_interval=4,
    )
    call = {"id": "call-1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    tools = m.Request(
        model="demo",
        messages=[
            m.Message(role="user", content=[m.VideoPart(attachments=[0, 1])], name="ann"),
            m.Message(role="assistant", reasoning_content="Ask the clock.", tool_calls=[call]),
            m.Message(role="tool", content="noon", tool_call_id="call-1"),
        ],
        params=params,
        tools=[{"type": "function", "function": {"name": "now"}}],
        tool_choice="auto",
        template_args={"enable_thinking": False},
        queue_ms=5000,
        window=1,
        attachments=[m.Attachment(kind="video_frame"), m.Attachment(kind="video_frame")],
        trace={"traceparent": "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"},
    )
    schema = m.Constraint(type="json_schema", value={"type": "integer"}, compact=True)
    left_open = m.Request(
        model="demo", prompt="1", params=m.Params(model_defaults=["temperature", "top_p"]), window=1
    )
    compact = m.Request(model="demo", prompt="1", params=m.Params(constraint=schema), window=1)
    embed = m.Request(
        model="demo",
        kind=m.Kind.EMBED,
        inputs=["Once", [1, 2]],
        embed_args={"dimensions": 2},
        window=1,
    )
    plain = {"add_special_tokens": False, "return_tokens": True}
    tokenize = m.Request(
        model="demo", kind=m.Kind.TOKENIZE, prompt="Once", tokenize_args=plain, window=1
    )
    rerank = m.Request(
        model="demo",
        kind=m.Kind.RERANK,
        pairs=[("Which is red?", "A rose."), ("Which is red?", "The sky.")],
        classify_args={"truncate": True},
        window=1,
    )
    classify = m.Request(model="demo", kind=m.Kind.CLASSIFY, inputs=["Once", [1, 2]], window=1)
    scored = m.EndEvent(
        REQUEST,
        0,
        0,
        m.FinishReason.STOP,
        "",
        m.Usage(prompt_tokens=12),
        m.Timings(),
        {"scores": [b"\x00\x00\x40\x3f", b"\x00\x00\x80\x3e"], "labels": ["LABEL_0"]},
    )
    vectors = {"embeddings": [bytes(8), bytes(8)], "dimensions": 2}
    ended = m.EndEvent(
        REQUEST,
        0,
        0,
        m.FinishReason.STOP,
        "",
        m.Usage(prompt_tokens=4),
        m.Timings(prefill_ms=2.5, decode_ms=1.5),
        vectors,
    )
    decide = m.Request(
        model="demo",
        kind=m.Kind.DECIDE,
        questions={
            "refund": m.Question(type="noul", instructions="Is a refund asked for?"),
            "tone": m.Question(type="choice", criteria={"calm": "polite", "angry": None}),
            "urgency": m.Question(type="score", criteria=["can wait", {"when": "today"}]),
        },
        state={"message": "I was charged twice, see <image-1>."},
        assets={"<image-1>": 0},
        window=1,
        attachments=[m.Attachment(media_type="image/png")],
    )
    answers = {
        "refund": {"type": "noul", "noul": 0.75},
        "tone": {
            "type": "choice",
            "choice": "calm",
            "confidence": 0.25,
            "probabilities": {"calm": 0.625, "angry": 0.375},
        },
    }
    decided = m.EndEvent(
        REQUEST,
        0,
        0,
        m.FinishReason.STOP,
        "",
        m.Usage(prompt_tokens=40, cached_tokens=16),
        m.Timings(),
        {"answers": answers},
    )
    deciding = m.ModelInfo(name="judge", kinds=(), further_kinds=("decide",))
    decider = m.Hello(role="worker", name="gpu-0", models=[deciding])
    prompt = m.PromptEvent(REQUEST, 1, 0, [1], "Once", [m.TokenLogprob(None, b"Once")])
    marks = m.Params(keep_special=["[TOOL_CALLS]", "<think>"])
    marked = m.Request(model="demo", prompt="2", params=marks, window=1)
    opened = m.PromptEvent(
        REQUEST, 1, 0, [], "", None, ["[TOOL_CALLS]"], "<think>", m.Usage(prompt_tokens=4)
    )
    placed = m.TokensEvent(REQUEST, 1, 0, [7], "a", [m.TokenLogprob(-0.5, b" a", [], 0)])
    thinking = m.Request(
        model="demo",
        prompt="2 + 2",
        params=m.Params(pieces=["reasoning"], thinking_tokens=100),
        window=1,
    )
    agent = m.Request(
        model="demo",
        prompt="2 + 2",
        params=m.Params(max_tokens=32_000, cut_max_tokens=True, prompt_usage=True),
        window=1,
    )
    thought = m.TokensEvent(
        REQUEST,
        1,
        0,
        [7, 8, 9],
        "4",
        None,
        [m.Piece("reasoning", "Easy."), m.Piece("content", "4")],
    )
    answered = m.EndEvent(
        REQUEST,
        1,
        3,
        m.FinishReason.STOP,
        "!",
        m.Usage(prompt_tokens=4, completion_tokens=3, reasoning_tokens=2),
        m.Timings(),
        None,
        None,
        [m.Piece("content", "!")],
    )
    calling = m.Request(
        model="m",
        messages=[m.Message(role="user", content="?")],
        params=m.Params(pieces=["call"]),
        tools=[{"type": "function", "function": {"name": "f"}}],
        parallel_tool_calls=False,
        window=1,
    )
    called = m.TokensEvent(
        REQUEST, 1, 0, [7], "", None, [m.Piece("call", "f"), m.Piece("arguments", '{"a": ')]
    )
    limits = m.BusLimits(
        request_bytes=1, attachment_bytes=2, attachments_bytes=3, attachments=4, inflight=5
    )
    welcome = m.Welcome(
        version=1,
        broker="bus",
        heartbeat_interval_ms=1,
        liveness=1,
        limits=limits,
        window=1,
        operator=True,
    )
    goodbye = m.Goodbye(reason="slow_consumer", message="read faster")
    return {
        "request_model_defaults": (t.REQUEST, REQUEST, 1, 0, [left_open], []),
        "hello_serial": (t.HELLO, header.NO_ID, 0, 0, [serial], []),
        "hello_relay": (t.HELLO, header.NO_ID, 0, 0, [hello], []),
        "welcome_operator": (t.WELCOME, SESSION, 0, 0, [welcome], []),
        "heartbeat_loading": (t.HEARTBEAT, SESSION, 1, 0, [loading], []),
        "goodbye_message": (t.GOODBYE, SESSION, 2, 0, [goodbye], []),
        "request_tools_video": (t.REQUEST, REQUEST, 1, 0, [tools], [b"frame 0", b"frame 1"]),
        "request_compact": (t.REQUEST, REQUEST, 1, 0, [compact], []),
        "request_keep_special": (t.REQUEST, REQUEST, 1, 0, [marked], []),
        "request_cut_max_tokens": (t.REQUEST, REQUEST, 1, 0, [agent], []),
        "request_tokenize": (t.REQUEST, REQUEST, 1, 0, [tokenize], []),
        "request_rerank": (t.REQUEST, REQUEST, 1, 0, [rerank], []),
        "request_classify": (t.REQUEST, REQUEST, 1, 0, [classify], []),
        "output_scores": (t.OUTPUT, SESSION, 2, 0, [[scored]], []),
        "request_embed": (t.REQUEST, REQUEST, 1, 0, [embed], []),
        "request_decide": (t.REQUEST, REQUEST, 1, 0, [decide], [b"\x89PNG not really"]),
        "hello_worker_with_an_end": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [
                m.Hello(
                    role="worker",
                    name="node7",
                    models=[m.ModelInfo(name="demo")],
                    ends_in_ms=3_600_000,
                    ends_why="Slurm job 123",
                )
            ],
            [],
        ),
        "hello_client_that_hears_of_waits": (
            t.HELLO,
            header.NO_ID,
            0,
            0,
            [m.Hello(role="client", name="laptop", waits=True)],
            [],
        ),
        "accepted_while_it_waits": (
            t.ACCEPTED,
            REQUEST,
            3,
            0,
            [
                m.Accepted(
                    position=2, starts_in_ms=4500, why="starting: job 123 pending (Resources)"
                )
            ],
            [],
        ),
        "heartbeat_with_an_end": (
            t.HEARTBEAT,
            SESSION,
            6,
            0,
            [
                m.Heartbeat(
                    state=m.WorkerState.READY,
                    granted=4,
                    ends_in_ms=30_000,
                    ends_why="spot notice",
                )
            ],
            [],
        ),
        "hello_decide": (t.HELLO, header.NO_ID, 0, 0, [decider], []),
        "accepted_worker": (t.ACCEPTED, REQUEST, 1, 0, [m.Accepted(worker="gpu-1")], []),
        "accepted_returned": (
            t.ACCEPTED,
            REQUEST,
            2,
            0,
            [m.Accepted(worker="gpu-2", returned=["gpu-1"])],
            [],
        ),
        "cancel_reason": (t.CANCEL, REQUEST, 2, 0, [m.Cancel(reason="closed")], []),
        "output_embed": (t.OUTPUT, SESSION, 2, 0, [[ended]], []),
        "output_decide": (t.OUTPUT, SESSION, 6, 0, [[decided]], []),
        "output_prompt": (t.OUTPUT, SESSION, 3, 0, [[prompt]], []),
        "output_place": (t.OUTPUT, SESSION, 5, 0, [[placed]], []),
        "output_prompt_tail": (t.OUTPUT, SESSION, 4, 0, [[opened]], []),
        "request_pieces": (t.REQUEST, REQUEST, 1, 0, [thinking], []),
        "request_calls": (t.REQUEST, REQUEST, 1, 0, [calling], []),
        "output_calls": (t.OUTPUT, SESSION, 7, 0, [[called]], []),
        "output_pieces": (t.OUTPUT, SESSION, 6, 0, [[thought, answered]], []),
    }


def golden_bytes() -> dict[str, list[str]]:
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


def page() -> str:
    """The text of GOLDEN.md."""
    wrong = [
        (row.name, row.to, row.shows, row.does + (row.code and f", `{row.code}`"), row.rule)
        for row in wrong_messages()
    ]
    return PAGE_TEXT.format(
        golden=_rows((name, row[0].name, SHOWS[name]) for name, row in examples().items()),
        meaning=_rows(MEANING.items()),
        wrong=_rows(wrong),
    )


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    known: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    now = golden_bytes()
    changed = [name for name in now if name in known and known[name] != now[name]]
    if changed and "--force" not in sys.argv:
        sys.exit(f"these messages would change, which needs a new protocol version: {changed}")
    if silent := now.keys() - SHOWS.keys():
        sys.exit(f"say in golden_shows.py what these show, in one line each: {sorted(silent)}")
    GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    WRONG.write_text(as_json())
    PAGE.write_text(page())
    print(f"{len(now)} messages, {len(now) - len(known)} new; {len(wrong_messages())} wrong ones")


if __name__ == "__main__":
    main()
