"""Broker, worker and gateway log in one style, and a peer's text cannot forge a line."""

from __future__ import annotations

import io
import json
import logging
import sys

import pytest

from broker.log import Logger
from broker.protocol import logs

FORGED = "demo\n12:00:00.000 ERROR   the broker burns"


def test_a_line_is_time_level_event_and_fields() -> None:
    text = logs.line(0.5, "info", "client joined", {"peer": "laptop", "s": 1.5}, as_json=False)
    assert text.endswith(".500 INFO    client joined peer=laptop s=1.500")
    assert json.loads(logs.line(0.5, "info", "client joined", {"peer": "x"}, as_json=True)) == {
        "time": 0.5,
        "level": "info",
        "event": "client joined",
        "peer": "x",
    }


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("name", [FORGED, "a\x1b[31mb", "a\u2028b", "a\rb"])
def test_a_peers_text_stays_within_its_line(name: str, as_json: bool) -> None:
    for written in (
        logs.line(0.0, "info", "model", {"name": name}, as_json=as_json),
        logs.line(0.0, "info", "model", {name: 1}, as_json=as_json),
        logs.line(0.0, "info", name, None, as_json=as_json),
    ):
        assert written.isprintable() and len(written.splitlines()) == 1


def test_the_broker_and_programs_that_use_logging_write_the_same_line() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "worker %s", ("left",), None)
    record.fields = {"why": "two words", "count": 3}
    stream = io.StringIO()
    Logger(stream, form="text")("warning", "worker left", {"why": "two words", "count": 3})
    clock = len("12:00:00.000 ")
    theirs = logs.Formatter(as_json=False).format(record)
    assert stream.getvalue().rstrip("\n")[clock:] == theirs[clock:]


def test_a_traceback_is_a_field_of_a_json_line() -> None:
    try:
        raise ValueError("no")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    written = logs.Formatter(as_json=True).format(record)
    assert len(written.splitlines()) == 1
    assert "ValueError: no" in json.loads(written)["traceback"]


def test_without_a_terminal_lines_are_json() -> None:
    assert logs.is_json("auto", io.StringIO()) and logs.is_json("auto", None)
    assert logs.is_json("json", sys.stderr) and not logs.is_json("text", None)
