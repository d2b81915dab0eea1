"""`chat` and `generate` keep a model's thoughts apart from its answer."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from broker.protocol.messages import Piece, TokensEvent
from client.cli.terminal import Terminal
from client.cli.thoughts import SHOW, Thoughts, told
from tests.harness import Bus
from tests.wire.test_client_cli import Person, run

ASKED = "<think>hm, two</think>three"
SAMPLED = "[[echo mode=sampled think_tokens=5 answer_tokens=3]] go"
CLOSED = r"thought for \d+\.\d s \(about \d+ tokens\)\n"


def test_piped_output_is_the_answer_and_a_thought_is_shown_on_request(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, ASKED)
    assert (done.returncode, done.stdout, done.stderr) == (0, "three\n", "")
    done = run("generate", "--broker", bus.front, "--thoughts", "show", ASKED)
    assert (done.returncode, done.stdout) == (0, "three\n")
    assert re.fullmatch(r"hm, two\n" + CLOSED, done.stderr)
    done = run("generate", "--broker", bus.front, "--thoughts", "fold", ASKED)
    assert (done.returncode, done.stdout) == (0, "three\n")
    assert re.fullmatch(CLOSED, done.stderr)


def test_stats_count_the_reasoning_tokens(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "--stats", "--json", SAMPLED)
    thought = json.loads(done.stdout.splitlines()[-1])["usage"]["reasoning_tokens"]
    assert thought >= 5
    assert f"({thought} of them thought)" in done.stderr


def test_json_has_the_reasoning_beside_the_text(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "--json", SAMPLED)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    tokens = [line for line in lines if line["event"] == "tokens"]
    assert len(lines[-1]["reasoning"].split()) == 5
    assert "".join(line.get("reasoning", "") for line in tokens) == lines[-1]["reasoning"]
    assert "think" not in lines[-1]["text"] and done.stderr == ""
    done = run("generate", "--broker", bus.front, "--json", "--thoughts", "hide", SAMPLED)
    assert "reasoning" not in done.stdout.replace("reasoning_tokens", "")


def test_an_answer_that_is_cut_off_within_its_thought_says_why_it_has_no_text(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "--max-tokens", "10", SAMPLED)
    assert (done.returncode, done.stdout.strip()) == (0, "")
    assert "raise max_tokens" in done.stderr


def test_chat_keeps_thoughts_out_of_its_answers_and_in_what_it_saves(
    bus: Bus, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.json"
    lines = f"/thoughts show\n{ASKED}\n/thoughts hide\n{ASKED}\nplain\n/save {saved}\n"
    done = run("chat", "--broker", bus.front, stdin=lines)
    assert done.stdout == "three\nthree\nplain\n"
    assert re.fullmatch(r"hm, two\n" + CLOSED, done.stderr)
    turns = json.loads(saved.read_text())["turns"]
    assert turns[1] == {"role": "assistant", "content": "three", "reasoning": "hm, two"}
    assert turns[5] == {"role": "assistant", "content": "plain"}
    again = run("chat", "--broker", bus.front, "--load", str(saved), stdin="more\n")
    assert (again.returncode, again.stdout, again.stderr) == (0, "more\n", "")


def test_chat_shows_the_last_thought_when_asked(bus: Bus) -> None:
    done = run("chat", "--broker", bus.front, stdin=f"{ASKED}\n/thoughts\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "three\n", "hm, two\n")
    done = run("chat", "--broker", bus.front, stdin="plain\n/thoughts\n/thoughts loud\n")
    assert done.returncode == 1
    assert "nothing was thought" in done.stderr and "show or fold or hide" in done.stderr


def test_at_a_terminal_a_thought_is_dim_while_it_lasts_and_then_one_line(bus: Bus) -> None:
    person = Person("chat", "--broker", bus.front)
    person.sees("you> ")
    person.types("[[echo mode=sampled think_tokens=3 answer_tokens=2 step_delay_ms=50]] go\n")
    person.sees("thought for ")
    person.sees("you> ", times=2)
    person.types("/thoughts\n")
    person.sees("you> ", times=3)
    person.types("\x04")
    assert person.leaves() == 0
    before, _, after = person.screen.partition("thought for ")
    during = before.split("go\r\n", 1)[1]
    assert re.search(r"\x1b\[2m\w+", during), "the thought is shown, dimmed"
    assert during.rstrip("\x1b[2m").endswith("\x1b[2K"), "and its last line is erased afterwards"
    answer, whole = after.split("\n", 1)[1].split("you> ")[:2]
    assert answer.strip() and "\x1b[2m" not in answer
    assert len(re.findall(r"(?s)\x1b\[2m(.*?)\x1b\[0m", whole)[0].split()) == 3


def screen_of(monkeypatch: pytest.MonkeyPatch) -> tuple[Terminal, io.StringIO]:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    screen = io.StringIO()
    terminal = Terminal()
    console = Console(file=screen, force_terminal=True, width=20, color_system="standard")
    terminal._consoles = (Console(file=io.StringIO()), console)
    return terminal, screen


def test_a_thought_cannot_rewrite_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, screen = screen_of(monkeypatch)
    terminal.aside("a\x1b[2Jb[red]\x9b")
    assert screen.getvalue() == "\x1b[2ma[2Jb[red]\x1b[0m"
    place = terminal.passing()
    assert place is not None
    place.show("c\x1b[2Jd[red]\x9b", 6)
    place.stop()
    assert "\x1b[2J" not in screen.getvalue() and "c[2Jd[red]" in screen.getvalue()


def test_a_long_thought_takes_no_more_than_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, screen = screen_of(monkeypatch)
    place = terminal.passing()
    assert place is not None
    place.show("\n".join(f"line {i}" for i in range(50)), 3)
    place.stop()
    assert re.findall(r"line \d+", screen.getvalue())[-3:] == ["line 47", "line 48", "line 49"]
    assert "line 46" not in screen.getvalue()


def event(count: int, *pieces: Piece) -> TokensEvent:
    return TokensEvent(b"", 0, 0, [1] * count, "", None, list(pieces))


def test_every_thought_is_closed_with_its_own_time_and_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter([10.0, 13.24, 20.0, 20.5])
    thoughts = Thoughts(Terminal(), SHOW, now_s=lambda: next(clock))
    assert thoughts.take(event(3, Piece("reasoning", "one "))) == ""
    assert thoughts.take(event(2)) == ""
    assert thoughts.take(event(4, Piece("reasoning", "two"), Piece("content", "six"))) == "six"
    assert thoughts.take(event(9, Piece("content", "seven"))) == "seven"
    assert thoughts.take(event(4, Piece("reasoning", "more"))) == ""
    thoughts.close()
    thoughts.close()
    assert capsys.readouterr().err == (
        "one two\nthought for 3.2 s (about 7 tokens)\nmore\nthought for 0.5 s (about 4 tokens)\n"
    )


def test_the_time_of_a_long_thought_is_given_in_minutes() -> None:
    assert told(187.4, 1) == "thought for 3 min 7 s (about 1 token)"
