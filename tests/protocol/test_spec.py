"""The protocol's page beside the code: grammars by their tools, tables by those of the code."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
import msgpack
import pytest
import zcbor
from abnf import ParseError, Rule

from broker.protocol import codec, header, messages as m
from broker.protocol.errors import ErrorCode, ProtocolError
from broker.protocol.header import MessageType
from tests.harness import ROOT
from tests.protocol.golden_examples import examples
from tests.protocol.make_golden import golden_bytes
from tests.protocol.wrong_messages import wrong_messages

FOLDER = ROOT / "broker" / "protocol"
PAGE = (FOLDER / "SPEC.md").read_text(encoding="utf-8")
LIMIT = 8 << 20


def table_after(text: str) -> list[list[str]]:
    """The cells of the first table after a text, without its head."""
    rows = PAGE[PAGE.index(text) :].split("\n| ---", 1)[1].splitlines()[1:]
    cells = [re.split(r"(?<!\\)\|", row.strip()[1:-1]) for row in _until_blank(rows)]
    return [[cell.strip() for cell in row] for row in cells]


def _until_blank(rows: list[str]) -> list[str]:
    return rows[: next(i for i, row in enumerate(rows) if not row.lstrip().startswith("|"))]


# --- frames ---------------------------------------------------------------------------------------


class Frames(Rule):  # type: ignore[misc]  # the package is untyped
    """The ABNF of the page."""


@cache
def grammar() -> type[Frames]:
    found = re.search(r"```abnf\n(.*?)```", PAGE, re.S)
    assert found is not None
    rules = re.sub(r" *;.*", "", found[1]).strip()
    Frames.load_grammar("\r\n".join([*rules.splitlines(), ""]))
    return Frames


@pytest.mark.parametrize("name", sorted(examples()))
def test_the_abnf_reads_every_golden_header(name: str) -> None:
    frame = bytes.fromhex(golden_bytes()[name][0])
    grammar()("header").parse_all(frame.decode("latin-1"))


GOOD = header.encode(MessageType.HELLO, header.NO_ID, 0)


@pytest.mark.parametrize(
    "frame",
    [
        GOOD[:-1],
        GOOD + b"\0",
        b"\xc5\x43" + GOOD[2:],
        GOOD[:2] + b"\2" + GOOD[3:],
        GOOD[:3] + b"\x0a" + GOOD[4:],
        GOOD[:6] + b"\1" + GOOD[7:],
    ],
    ids=["short", "long", "signature", "version", "code in decimal", "reserved"],
)
def test_abnf_and_code_refuse_the_same_headers(frame: bytes) -> None:
    with pytest.raises(ParseError):
        grammar()("header").parse_all(frame.decode("latin-1"))
    with pytest.raises(ProtocolError):
        header.decode(frame)


def test_the_table_of_messages_is_that_of_the_code() -> None:
    rows = table_after("### 3.1 Messages")
    assert {(int(row[0], 16), row[1]) for row in rows} == {(t.value, t.name) for t in MessageType}


# --- the exchange at its beginning ----------------------------------------------------------------


def exchange() -> list[tuple[str, str, bytes]]:
    """Direction, name and bytes of each message of section 1.1."""
    block = PAGE.split("### 1.1 ", 1)[1].split("```")[1]
    told: list[tuple[str, str, bytes]] = []
    for line in block.strip().splitlines():
        words = line.split(";")[0].split()
        if "→" in words[0]:
            told.append((words[0], words[1], b""))
        else:
            way, name, data = told[-1]
            told[-1] = way, name, data + bytes.fromhex("".join(words))
    return told


def test_the_exchange_in_bytes_is_one_that_both_sides_would_take() -> None:
    numbers = {"C→B": 0, "B→C": 0}
    seen = []
    for way, name, data in exchange():
        head = header.decode(data[:32])
        assert head.type.name == name
        assert head.sequence == numbers[way], name
        numbers[way] += 1
        seen.append(name)
        if head.type is MessageType.OUTPUT:
            tokens, end = codec.decode_events(data[32:], LIMIT)
            assert isinstance(tokens, m.TokensEvent) and isinstance(end, m.EndEvent)
            assert (tokens.token_ids, tokens.text, end.offset) == ([2402], " upon", 1)
            assert end.finish_reason is m.FinishReason.LENGTH
        else:
            type_ = getattr(m, name.capitalize())
            assert codec.decode(type_, data[32:], LIMIT)
            check(type_.__name__, msgpack.unpackb(data[32:]))
    assert seen == ["HELLO", "WELCOME", "REQUEST", "ACCEPTED", "OUTPUT", "GOODBYE"]


# --- rules ----------------------------------------------------------------------------------------


def test_each_rule_has_a_number_of_its_own() -> None:
    numbers = re.findall(r"\[([A-Z]\d+)\]", PAGE)
    assert len(numbers) > 90
    assert sorted(set(numbers)) == sorted(numbers)


def test_wrong_messages_break_or_test_rules_of_the_page() -> None:
    assert {wrong.rule for wrong in wrong_messages()} <= set(re.findall(r"\[([A-Z]\d+)\]", PAGE))


# --- bodies ---------------------------------------------------------------------------------------


def _for_zcbor(text: str) -> str:
    """CDDL as zcbor reads it: bare words before a colon are labels to it, so a key of a map becomes
    a string, and a label of an array something that is not the name of a rule."""
    out: list[str] = []
    open_: list[str] = []
    for part in re.findall(r'"[^"]*"|[\w-]+:|[{}\[\]()]|[^"{}\[\]()\w-]+|[\w.-]+', text):
        written = part
        if part in "{[(":
            open_.append(part)
        elif part in "}])":
            open_.pop()
        elif part.endswith(":"):
            inner = next(bracket for bracket in reversed(open_) if bracket != "(")
            written = f'"{part[:-1]}" =>' if inner == "{" else f"{part[:-1]}_:"
        out.append(written)
    return "".join(out)


@cache
def bodies() -> Any:
    text = re.sub(r";.*", "", (FOLDER / "bodies.cddl").read_text(encoding="utf-8"))
    # Without the keys of later versions: zcbor lets them stand for a known key with a wrong value.
    text = re.sub(r",\s*\* tstr => any,?(?=\s*\})", "", text)
    return zcbor.DataTranslator.from_cddl(cddl_string=_for_zcbor(text), default_max_qty=1 << 20)


def check(rule: str, value: Any) -> None:
    """Raises CddlValidationError where the value is not as the rule says."""
    bodies().my_types[rule].validate_str(cbor2.dumps(value))


GOLDEN_BODIES = [
    (name, "Output" if isinstance(body, list) else type(body).__name__, frame)
    for name, (*_, values, _) in examples().items()
    for body, frame in zip(values, golden_bytes()[name][1:], strict=False)
]


@pytest.mark.parametrize(("name", "rule", "frame"), GOLDEN_BODIES)
def test_the_cddl_holds_for_every_golden_body(name: str, rule: str, frame: str) -> None:
    check(rule, msgpack.unpackb(bytes.fromhex(frame)))


WRONG: list[tuple[Any, Any]] = [
    (m.Hello, {"role": "boss", "name": "x"}),
    (m.Hello, {"role": "client", "name": ""}),
    (m.Hello, {"role": "client", "name": b"x"}),
    (m.Welcome, {"version": 1, "broker": "bus"}),
    (m.Window, {"limit": 1.0}),
    (m.Window, {"limit": None}),
    (m.Refuse, {}),
    (m.Request, {"model": "x", "window": 0}),
    (m.Request, {"model": "x", "window": 1, "params": {"temperature": "hot"}}),
    (m.Request, {"model": "x", "window": 1, "params": {"overflow": "sometimes"}}),
    (m.Request, {"model": "x", "window": 1, "resume": {"epoch": 0}}),
    (m.Assign, {"reply_to": b"1"}),
    (m.Reject, {"error": {"code": "draining"}, "granted": 1}),
    (list[m.OutputEvent], [[9, b"1" * 16, 0, 0]]),
    (list[m.OutputEvent], {}),
    (list[m.OutputEvent], [[0, None, 0, 0, [], ""]]),
    (list[m.OutputEvent], [[1, b"1" * 16, 0, 0, "bored", "", {}, {}]]),
]


@pytest.mark.parametrize(("type_", "value"), WRONG, ids=lambda value: str(value)[:60])
def test_cddl_and_code_refuse_the_same_bodies(type_: Any, value: Any) -> None:
    rule = type_.__name__ if isinstance(type_, type) and hasattr(type_, "__struct_fields__") else ""
    with pytest.raises(zcbor.CddlValidationError):
        check(rule or "Output", value)
    with pytest.raises(ProtocolError):
        codec.decode(type_, msgpack.packb(value), LIMIT)


# --- codes ----------------------------------------------------------------------------------------


def test_the_errors_on_the_page_are_those_of_the_code() -> None:
    assert [row[0] for row in table_after("## 8. Errors")] == [code.value for code in ErrorCode]


def test_the_path_of_the_grammar_is_beside_the_page() -> None:
    assert Path(FOLDER / "bodies.cddl").is_file() and "`bodies.cddl`" in PAGE
