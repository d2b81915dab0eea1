"""Examples with the fields that those of every kind (`golden_examples`) leave at their defaults."""

from __future__ import annotations

from broker.protocol import header, messages as m
from broker.protocol.header import MessageType
from tests.protocol.golden_base import REQUEST, SESSION, Example


def every_field() -> dict[str, Example]:
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
        "drain_now": (t.DRAIN, SESSION, 9, 0, [m.Drain(deadline_ms=0)], []),
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
