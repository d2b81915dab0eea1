"""Wrong messages, and what a broker, a worker or a client does about each: source of wrong.json.

`python -m tests.protocol.make_golden` writes the file; the kit (`tests/conformance`) sends each
message to whatever it judges. A message comes right after those in `after`, golden messages of the
same sender, and its sequence number counts on from theirs. The ids of golden.json stand in it: a
sender puts the session, request and route of the moment in their place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import msgpack

from broker.protocol.header import Flag, MessageType as T
from tests.protocol.wrong_base import (
    ANSWERS,
    ASK,
    CANCELLED,
    DROPS,
    ENDS,
    ERROR,
    FAILS,
    FOR_GOOD,
    NAMES,
    REFUSES,
    REQUEST,
    RESUMES,
    ROUTE,
    STRANGE,
    TAKES,
    Row,
    Wrong,
    ask,
    bent,
    hello,
    message,
    nested,
    output,
    tokens,
)

WRONG: Final = Path(__file__).with_name("wrong.json")


def to_broker() -> list[Wrong]:
    """Of somebody who has no session yet, of a client, of a worker."""
    good = hello(NAMES)
    new = [
        Row("short_header", "31 bytes", REFUSES, "F1", (good[0][:-1], good[1])),
        Row("signature", "another signature", REFUSES, "F1", bent(good, 1, 0x43)),
        Row("version_2", "the framing of another version", FOR_GOOD, "S4", bent(good, 2, 2)),
        Row("code_in_decimal", "10 for REQUEST, in decimal", REFUSES, "F1", bent(good, 3, 10)),
        Row("reserved", "a reserved byte that is not zero", REFUSES, "F1", bent(good, 7, 1)),
        Row("no_body", "HELLO without a body", REFUSES, "F2", good[:1]),
        Row("hello_3_frames", "HELLO with a frame too many", REFUSES, "F2", (*good, b"")),
        Row(
            "not_hello",
            "HEARTBEAT before HELLO",
            REFUSES,
            "S1",
            message(T.HEARTBEAT, {}, 0),
            code="unknown_session",
        ),
        Row("hello_sequence_1", "HELLO that does not begin at 0", REFUSES, "F4", hello(NAMES, 1)),
        Row(
            "hello_role",
            "a role that does not exist",
            FOR_GOOD,
            "E4",
            hello({"role": "boss", "name": "x"}),
        ),
        Row(
            "hello_worker_at_the_front",
            "a worker where clients connect",
            FOR_GOOD,
            "S1",
            hello({"role": "worker", "name": "x"}),
        ),
        Row(
            "hello_name_empty",
            "an empty name",
            FOR_GOOD,
            "E4",
            hello({"role": "client", "name": ""}),
        ),
        Row(
            "hello_name_bin",
            "bin in the place of str",
            FOR_GOOD,
            "E4",
            hello({"role": "client", "name": b"x"}),
        ),
        Row(
            "hello_versions",
            "versions 2 to 3 only",
            FOR_GOOD,
            "S4",
            hello({**NAMES, "min_version": 2, "max_version": 3}),
        ),
        Row("hello_no_msgpack", "0xc1, which msgpack never uses", FOR_GOOD, "E1", hello(b"\xc1")),
        Row(
            "hello_extension",
            "a timestamp",
            FOR_GOOD,
            "E1",
            hello(b"\x82\xa4role\xa6client\xa4name\xd6\xff\0\0\0\0"),
        ),
    ]
    client = [
        Row(
            "sequence_skipped",
            "a message is missing before it",
            REFUSES,
            "F4",
            message(T.HEARTBEAT, {}, 5),
        ),
        Row(
            "sequence_doubled",
            "a sequence number twice",
            REFUSES,
            "F4",
            message(T.HEARTBEAT, {}, 0),
        ),
        Row("hello_again", "a second HELLO", REFUSES, "S2", hello(NAMES, 1)),
        Row(
            "credit_of_a_client",
            "what only a worker may send",
            REFUSES,
            "F3",
            message(T.CREDIT, {"granted": 1}, 1),
        ),
        Row(
            "drain_of_a_client",
            "a client announces no drain",
            REFUSES,
            "F3",
            message(T.DRAIN, {}, 1),
        ),
        Row(
            "heartbeat_array",
            "an array in the place of a map",
            REFUSES,
            "E4",
            message(T.HEARTBEAT, [], 1),
        ),
        Row(
            "heartbeat_3_frames",
            "a frame too many",
            REFUSES,
            "F2",
            message(T.HEARTBEAT, {}, 1, b""),
        ),
        Row(
            "window_float",
            "4.0 where an int stands",
            REFUSES,
            "E3",
            message(T.WINDOW, {"limit": 4.0}, 1, id_=STRANGE),
        ),
        Row(
            "window_nil",
            "nil for a key that is required",
            REFUSES,
            "E2",
            message(T.WINDOW, {"limit": None}, 1, id_=STRANGE),
        ),
        Row(
            "window_of_nothing",
            "WINDOW of an unknown request",
            DROPS,
            "W3",
            message(T.WINDOW, {"limit": 4}, 1, id_=STRANGE),
        ),
        Row(
            "cancel_of_nothing",
            "CANCEL of an unknown request",
            CANCELLED,
            "C1",
            message(T.CANCEL, {}, 1, id_=STRANGE),
        ),
        Row(
            "query_verb",
            "a verb that does not exist",
            ANSWERS,
            "Q1",
            message(T.QUERY, {"verb": "bus.fly"}, 1, id_=STRANGE),
            code="invalid_request",
        ),
        Row(
            "flags_unknown",
            "flag bits of a later version",
            TAKES,
            "F5",
            message(T.HEARTBEAT, {}, 1, flags=0x8000),
        ),
        Row(
            "heartbeat_unknown_key",
            "a key of a later version",
            TAKES,
            "E5",
            message(T.HEARTBEAT, {"mood": ["good"]}, 1),
        ),
        Row(
            "heartbeat_nil",
            "nil for a key that may be absent",
            TAKES,
            "E2",
            message(T.HEARTBEAT, {"state": None, "running": None}, 1),
        ),
        Row("request_array", "an array in the place of the map", FAILS, "E4", ask([1])),
        Row("request_no_msgpack", "bytes that are no msgpack", FAILS, "E1", ask(b"\xc1")),
        Row("request_two_values", "two values in one body", FAILS, "E1", ask(b"\x80\x80")),
        Row(
            "request_temperature",
            "a text for a number",
            FAILS,
            "E4",
            ask({**ASK, "params": {"temperature": "hot"}}),
        ),
        Row(
            "request_max_tokens",
            "4.0 tokens",
            FAILS,
            "E3",
            ask({**ASK, "params": {"max_tokens": 4.0}}),
        ),
        Row("request_window_0", "a window of nothing", FAILS, "E4", ask({**ASK, "window": 0})),
        Row(
            "request_kind",
            "a kind that does not exist",
            FAILS,
            "E4",
            ask({**ASK, "kind": "sing"}),
        ),
        Row(
            "request_no_input",
            "no prompt",
            FAILS,
            "R1",
            ask({"model": "demo", "kind": "complete", "window": 1}),
        ),
        Row(
            "request_two_inputs",
            "prompt and token ids",
            FAILS,
            "R1",
            ask({**ASK, "token_ids": [1]}),
        ),
        Row(
            "request_input_of_another_kind",
            "messages for a completion",
            FAILS,
            "R1",
            ask({"model": "demo", "kind": "complete", "window": 1, "messages": [{"role": "user"}]}),
        ),
        Row("request_frames", "an attachment that is not described", FAILS, "R2", ask(ASK, b"x")),
        Row(
            "request_attachments",
            "a description without a frame",
            FAILS,
            "R2",
            ask({**ASK, "attachments": [{}]}),
        ),
        Row(
            "request_resume",
            "REQUEST with `resume`",
            FAILS,
            "R3",
            ask({**ASK, "resume": {"epoch": 1}}),
        ),
        Row(
            "request_deep",
            "tools nested 40 deep",
            FAILS,
            "L1",
            ask({**ASK, "tools": [nested(40)]}),
        ),
        Row(
            "request_id_zero",
            "an id that begins with zero",
            FAILS,
            "R4",
            ask(ASK, id_=b"\0" + REQUEST[1:]),
        ),
        Row("resume_without", "RESUME without `resume`", FAILS, "R3", ask(ASK, type_=T.RESUME)),
        Row(
            "resume_epoch_0",
            "RESUME with the epoch of a REQUEST",
            FAILS,
            "E4",
            ask({**ASK, "resume": {"epoch": 0}}, type_=T.RESUME),
        ),
    ]
    worker = [
        Row(
            "request_of_a_worker",
            "what only a client may send",
            REFUSES,
            "F3",
            message(T.REQUEST, ASK, 1, id_=REQUEST),
        ),
        Row(
            "credit_negative",
            "less than nothing",
            REFUSES,
            "E4",
            message(T.CREDIT, {"granted": -1}, 1),
        ),
        Row(
            "heartbeat_state",
            "a state that does not exist",
            REFUSES,
            "E4",
            message(T.HEARTBEAT, {"state": "asleep"}, 1),
        ),
        Row(
            "output_ledger_missing",
            "the LEDGER flag without a ledger",
            REFUSES,
            "F2",
            message(T.OUTPUT, [], 1, id_=ROUTE, flags=Flag.LEDGER),
        ),
        Row(
            "output_ledger_unflagged",
            "a ledger without the flag",
            REFUSES,
            "F2",
            message(T.OUTPUT, [], 1, msgpack.packb([1]), id_=ROUTE),
        ),
        Row(
            "output_ledger_broken",
            "a map for a ledger",
            REFUSES,
            "E4",
            message(T.OUTPUT, [], 1, msgpack.packb({}), id_=ROUTE, flags=Flag.LEDGER),
        ),
        Row(
            "output_nowhere",
            "OUTPUT to a route that does not exist",
            DROPS,
            "R12",
            message(T.OUTPUT, [], 1, id_=STRANGE),
        ),
        Row(
            "reject_no_error",
            "REJECT that does not say why",
            REFUSES,
            "E4",
            message(T.REJECT, {"granted": 1}, 1, id_=REQUEST),
        ),
    ]
    return [
        *(row.to("broker") for row in new),
        *(row.to("broker", "hello_client") for row in client),
        *(row.to("broker", "hello_worker_by_its_instance") for row in worker),
    ]


def to_worker() -> list[Wrong]:
    """Of a broker, to a worker that is ready and idle."""
    assign = {"reply_to": ROUTE}
    rows = [
        Row(
            "to_worker_sequence",
            "a message is missing before it",
            ENDS,
            "F4",
            message(T.HEARTBEAT, {}, 9),
        ),
        Row(
            "to_worker_request",
            "a client's message, unassigned",
            ENDS,
            "F3",
            message(T.REQUEST, ASK, 1, id_=REQUEST),
        ),
        Row(
            "to_worker_version",
            "the framing of another version",
            ENDS,
            "F1",
            bent(message(T.HEARTBEAT, {}, 1), 2, 2),
        ),
        Row(
            "to_worker_heartbeat_3_frames",
            "a frame too many",
            ENDS,
            "F2",
            message(T.HEARTBEAT, {}, 1, b""),
        ),
        Row(
            "assign_2_frames",
            "ASSIGN without the client's body",
            ENDS,
            "F2",
            message(T.ASSIGN, assign, 1, id_=REQUEST),
        ),
        Row(
            "assign_no_route",
            "ASSIGN that does not say where to",
            ENDS,
            "E4",
            message(T.ASSIGN, {}, 1, msgpack.packb(ASK), id_=REQUEST),
        ),
        Row(
            "assign_body_broken",
            "a request that cannot be read",
            FAILS,
            "E4",
            message(T.ASSIGN, assign, 1, b"\xc1", id_=REQUEST),
        ),
        Row(
            "assign_other_model",
            "a model that the worker does not serve",
            FAILS,
            "G4",
            message(T.ASSIGN, assign, 1, msgpack.packb({**ASK, "model": "x-none"}), id_=REQUEST),
            code="",
        ),
        Row(
            "to_worker_cancel_array",
            "an array in the place of a map",
            ENDS,
            "E4",
            message(T.CANCEL, [], 1, id_=STRANGE),
        ),
        Row(
            "to_worker_unknown_key",
            "a key of a later version",
            TAKES,
            "E5",
            message(T.HEARTBEAT, {"mood": 1}, 1),
        ),
    ]
    return [row.to("worker", "welcome") for row in rows]


def to_client() -> list[Wrong]:
    """Of a broker, to a client with one request, of which it has two tokens."""
    rows = [
        Row("output_map", "a map for the array of events", DROPS, "K1", output({})),
        Row(
            "output_nil_id",
            "nil for the id of a request",
            DROPS,
            "K1",
            output([[0, None, 0, 2, [1], "WRONG"]]),
        ),
        Row(
            "output_event_9",
            "an event that does not exist",
            DROPS,
            "K1",
            output([[9, REQUEST, 0, 2]]),
        ),
        Row(
            "output_bored",
            "a finish reason that does not exist",
            DROPS,
            "K1",
            output([[1, REQUEST, 0, 2, "bored", "WRONG", {}, {}]]),
        ),
        Row(
            "output_text_bin",
            "bin in the place of the text",
            DROPS,
            "K1",
            output([[0, REQUEST, 0, 2, [1], b"WRONG"]]),
        ),
        Row(
            "output_strange",
            "an event of somebody else's request",
            DROPS,
            "K2",
            output([[0, STRANGE, 0, 0, [1], "WRONG"]]),
        ),
        Row(
            "output_forged_epoch",
            "an epoch that the client never sent",
            DROPS,
            "K3",
            output([tokens(2, 77)]),
        ),
        Row(
            "output_forged_route",
            "the request under a route that is not its",
            DROPS,
            "K3",
            output([tokens(2)], STRANGE),
        ),
        Row(
            "output_repeated",
            "tokens that have come before",
            DROPS,
            "R10",
            output([tokens(0, 0, (1, 2))]),
        ),
        Row("output_gap", "tokens are missing before these", RESUMES, "R10", output([tokens(5)])),
        Row(
            "output_overlap",
            "tokens that are half old, half new",
            RESUMES,
            "R10",
            output([tokens(1, 0, (2, 3))]),
        ),
        Row(
            "end_too_far",
            "an END of more tokens than came",
            RESUMES,
            "R10",
            output([[1, REQUEST, 0, 9, "stop", "WRONG", {}, {}]]),
        ),
        Row(
            "interrupted_stale",
            "INTERRUPTED of another epoch",
            DROPS,
            "M2",
            message(
                T.INTERRUPTED,
                {"epoch": 9, "worker": "gpu-1", "lost": False, "error": ERROR},
                3,
                id_=REQUEST,
            ),
        ),
        Row(
            "to_client_sequence",
            "a message is missing before it",
            RESUMES,
            "F4",
            message(T.HEARTBEAT, {}, 9),
        ),
        Row(
            "to_client_version",
            "the framing of another version",
            RESUMES,
            "F1",
            bent(message(T.HEARTBEAT, {}, 3), 2, 2),
        ),
        Row(
            "accepted_array",
            "an array in the place of a map",
            RESUMES,
            "E4",
            message(T.ACCEPTED, [], 3, id_=REQUEST),
        ),
        Row(
            "to_client_assign",
            "what only a worker gets",
            RESUMES,
            "F3",
            message(T.ASSIGN, {"reply_to": ROUTE}, 3, msgpack.packb(ASK), id_=REQUEST),
        ),
        Row(
            "heartbeat_of_a_later_version",
            "a key of a later version",
            TAKES,
            "E5",
            message(T.HEARTBEAT, {"mood": 1}, 3),
        ),
        Row(
            "tokens_of_a_later_version",
            "a field more at the end of an event",
            TAKES,
            "E5",
            output([[0, REQUEST, 0, 2, [3], " ok", None, None, "later"]]),
        ),
    ]
    after = "welcome", "accepted_at_a_worker", "output_client"
    return [row.to("client", *after) for row in rows]


def wrong_messages() -> list[Wrong]:
    """All of them."""
    return [*to_broker(), *to_worker(), *to_client()]


def as_json() -> str:
    """The text of wrong.json."""
    rows = {
        wrong.name: {
            "shows": wrong.shows,
            "to": wrong.to,
            "after": list(wrong.after),
            "frames": [frame.hex() for frame in wrong.frames],
            "does": wrong.does,
            **({"code": wrong.code} if wrong.code else {}),
            "rule": wrong.rule,
        }
        for wrong in wrong_messages()
    }
    return json.dumps(rows, indent=1) + "\n"
