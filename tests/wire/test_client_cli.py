"""`python -m client`: what a person at a terminal, or a script, sees."""

from __future__ import annotations

import argparse
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from client import Timeout, __main__ as client_main
from client.__main__ import main
from client.cli.terminal import Terminal
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until

ENDLESS = "[[echo mode=sampled answer_tokens=100000 step_delay_ms=5]] go"


def run(
    *arguments: str, stdin: str = "", environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, piped."""
    return subprocess.run(
        [sys.executable, "-m", "client", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
        env={**os.environ, **(environment or {})},
    )


class Person:
    """A person at a terminal who types, reads and presses keys."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "client", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", **environment},
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)
        self.screen = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._ours, 65_536)
            except OSError:
                return  # the program has closed its end
            if not data:
                return
            self.screen += data.decode("utf-8", errors="replace")

    def sees(self, text: str, times: int = 1) -> None:
        wait_until(
            lambda: self.screen.count(text) >= times, f"{text!r} on screen", story=self._story
        )

    def _story(self) -> str:
        return f"screen: {self.screen!r}"

    def types(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def leaves(self) -> int:
        status = self.process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        os.close(self._ours)
        return status


def _take_terminal() -> None:
    """Make the pseudo-terminal the controlling one, so that Ctrl-C sends a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 4), "red").save(path)
    return str(path)


# --- one question ---------------------------------------------------------------------------------


def test_generate_prints_the_answer_and_nothing_else(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "hello", "there")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello there\n", "")


def test_generate_reads_standard_input_and_the_environment(bus: Bus) -> None:
    done = run("generate", stdin="from a pipe\n", environment={"TOKENBUS_BROKER": bus.front})
    assert (done.returncode, done.stdout) == (0, "from a pipe\n")


def test_piped_input_precedes_the_words_of_the_command_line(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "in one word?", stdin="a long text\n")
    assert done.stdout == "a long text\n\nin one word?\n"
    counted = run("count", "--broker", bus.front, "words", stdin="a text\n")
    assert int(counted.stdout) == bus.client().count("a text\n\nwords")


def test_generate_does_not_wait_for_an_open_pipe_that_nobody_writes_to(bus: Bus) -> None:
    reader, writer = os.pipe()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "client", "generate", "--broker", bus.front, "hello"],
            cwd=ROOT,
            stdin=reader,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.stdout, done.returncode) == ("hello\n", 0)
    assert "nothing came on standard input" in done.stderr


def test_generate_accepts_images_and_parameters(bus: Bus, image: str) -> None:
    done = run(
        *("generate", "--broker", bus.front, "-m", "echo", "-i", image, "--image", image),
        *("--max-tokens", "200", "--stop", "END", "--param", "logit_bias=[[5, 1.5]]", "--stats"),
        "before END after",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 images: 5x4, 5x4. before")
    assert "after" not in done.stdout
    assert "answer tokens" in done.stderr


def test_generate_as_json_prints_a_line_for_each_event(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "--json", "--seed", "7", "abc")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines][-1] == "end"
    tokens = [line for line in lines if line["event"] == "tokens"]
    assert "".join(line["text"] for line in tokens) == lines[-1]["text"] == "abc"
    assert lines[-1]["seed"] == 7 and lines[-1]["finish_reason"] == "stop"


def test_embed_and_count(bus: Bus) -> None:
    done = run("embed", "--broker", bus.front, "one", "two")
    vectors = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["text"] for line in vectors] == ["one", "two"]
    assert len(vectors[0]["embedding"]) == len(vectors[1]["embedding"]) > 0
    assert int(run("count", "--broker", bus.front, "hello").stdout) == bus.client().count("hello")


# --- tables ---------------------------------------------------------------------------------------


def test_models_workers_and_status_as_tables_and_as_json(bus: Bus) -> None:
    models = run("models", "--broker", bus.front)
    assert models.stdout.splitlines()[0].split()[:2] == ["model", "workers"]
    assert models.stdout.splitlines()[1].split()[:2] == ["echo", "2/2"]
    workers = run("workers", "--broker", bus.front, "--json")
    assert {json.loads(line)["name"] for line in workers.stdout.splitlines()} == {"w1", "w2"}
    status = run("status", "--broker", bus.front)
    assert "up and answering" in status.stdout and "w1" in status.stdout
    for command in ("clients", "requests"):
        assert run(command, "--broker", bus.front).returncode == 0


def test_a_worker_that_does_not_batch_says_so_with_the_reason(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(serial="layers of type recurrent")
    reason = "echo runs one request at a time: layers of type recurrent"
    workers = run("workers", "--broker", bus.front)
    assert "ready, serial" in workers.stdout and reason in workers.stdout
    assert reason in run("status", "--broker", bus.front).stdout
    client = bus.client()
    (worker,) = client.workers()
    assert worker["serial"] == {"echo": "layers of type recurrent"}
    (model,) = client.models()
    assert model["serial"] == "layers of type recurrent"
    (line,) = (line for line in bus.logs().splitlines() if "engine ready" in line)
    assert "one request at a time" in line and "layers of type recurrent" in line
    scraped = run("metrics", "--broker", bus.front).stdout
    labels = 'worker="w1",model="echo",reason="layers of type recurrent"'
    assert f"tokenbus_worker_serial{{{labels}}} 1" in scraped


def test_a_narrow_window_shows_the_full_name_that_drain_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    terminal = Terminal()
    terminal.interactive = True
    console = Console(file=screen, width=40)
    monkeypatch.setattr(terminal, "_consoles", (console, console))
    name = "gpu-machine-7-a1b2c3"
    terminal.table("workers", ["worker", "engine", "note"], [[name, "transformers", "long " * 9]])
    assert name in screen.getvalue() and "…" not in screen.getvalue()


def test_drain_makes_a_worker_leave(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=2)
    done = run("drain", "--broker", bus.front, "w1", "--deadline", "1")
    assert done.returncode == 0, done.stderr
    client = bus.client(timeout=Timeout(total=PATIENCE_S))
    wait_until(
        lambda: {row["name"] for row in client.workers() if row["state"] == "ready"} == {"w2"},
        "w1 drained",
    )
    assert client.chat("echo", "x").worker == "w2"


def test_a_held_worker_is_idle_until_undrain(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=2)
    done = run("drain", "--broker", bus.front, "w1", "--hold", "--wait")
    assert done.stdout.splitlines() == ["worker w1: held", "worker w1: idle"], done.stderr
    client = bus.client(timeout=Timeout(total=PATIENCE_S))
    assert {client.chat("echo", "x").worker for _ in range(4)} == {"w2"}
    assert "held" in run("workers", "--broker", bus.front).stdout
    assert run("undrain", "--broker", bus.front, "w1").returncode == 0
    assert {row["state"] for row in client.workers()} == {"ready"}


def test_drain_waits_until_the_worker_has_gone(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=1)
    done = run("drain", "--broker", bus.front, "w1", "--wait")
    assert done.stdout.splitlines() == ["worker w1: draining", "worker w1: gone"], done.stderr
    assert bus.client().workers() == []
    assert bus.workers["w1"].popen.wait(PATIENCE_S) == 0


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["models", "--broker", "tcp://127.0.0.1:1", "--connect-timeout", "0.3"], 1, "-m broker"),
        (["models", "--broker", "nonsense"], 2, "tcp://HOST:PORT"),
        (["generate", "x", "--image", "/nowhere.png"], 2, "/nowhere.png"),
        (["generate", "x", "--temperature", "-1"], 2, "error: temperature: "),
        (["generate", "x", "--param", "foo=1"], 2, "known parameters: "),
        (["generate", "x", "--param", "temprature=1"], 2, "did you mean temperature"),
        (["generate", "--server-key", "short", "x"], 2, "server_key"),
        (["generate"], 2, "no text"),
        (["generate", "--raw", "--system", "be brief", "x"], 2, "--system"),
    ],
)
def test_a_mistake_is_one_line_without_a_traceback(
    arguments: list[str], status: int, message: str
) -> None:
    done = run(*arguments)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "--requests", "many"], "must be 1 or more, got 'many'"),
        (["bench", "--rate", "fast"], "fast is not a rate above 0"),
        (["batch", "--concurrency", "0", "in", "out"], "must be 1 or more, got '0'"),
        (["batch", "--priority", "1.5", "in", "out"], "1.5 is not an integer from -100 to 100"),
        (["top", "--interval", "short"], "short is not from 0.1 to 3600 seconds"),
        (["generate", "--param", "seed=x", "hi"], "seed: must be an integer, got 'x'"),
    ],
)
def test_the_error_for_a_wrong_value_of_a_flag_is_in_words(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_command_is_wrong_usage() -> None:
    assert run("dance").returncode == 2
    assert run().returncode == 2


def test_an_error_of_the_bus_is_shown_with_its_code(bus: Bus) -> None:
    done = run("generate", "--broker", bus.front, "-m", "nope", "x")
    assert done.returncode == 1
    assert "[model_unavailable]" in done.stderr


def test_a_wait_is_announced_once(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=0)
    done = run("generate", "--broker", bus.front, "--timeout", "8", "x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("; trying again]\n") == 1 and "interrupted" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and "python -m" in last and "fewer tokens" not in last


def test_ctrl_c_ends_generate_with_130_and_frees_the_slot(bus: Bus) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "client", "generate", "--broker", bus.front, ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(10)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr.read() == b""
    bus.wait_idle()


def test_a_reader_that_goes_away_ends_generate_quietly(bus: Bus) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "client", "generate", "--broker", bus.front, ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 1
        assert process.stderr.read() == b""
    bus.wait_idle()


# --- chat -----------------------------------------------------------------------------------------


def test_chat_works_piped(bus: Bus, image: str, tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    first = run(
        *("chat", "--broker", bus.front),
        stdin=f"hello\n/image {image}\nlook\n/regen\n/undo\n/save {saved}\n/exit\nnever\n",
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["hello", *["1 image: 5x4. look"] * 2]
    turns = json.loads(saved.read_text())["turns"]
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("user", "hello"),
        ("assistant", "hello"),
    ]
    again = run("chat", "--broker", bus.front, "--load", str(saved), stdin="/regen\nmore\n")
    assert again.stdout.splitlines() == ["hello", "more"]


@pytest.mark.parametrize("nothing", ["", "\n \n"])
def test_chat_with_nothing_to_ask_says_what_to_do(nothing: str) -> None:
    done = run("chat", "--broker", "tcp://127.0.0.1:1", stdin=nothing)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: standard input is empty")
    assert "tcp://127.0.0.1:1" in done.stderr and "pipe in questions" in done.stderr


def test_chat_sets_parameters_and_forgets(bus: Bus) -> None:
    done = run(
        *("chat", "--broker", bus.front),
        stdin="/set stop X\nabXcd\n/set stop\nabXcd\n/reset\n/regen\n",
    )
    assert done.stdout.splitlines() == ["ab", "abXcd"]
    assert "no question" in done.stderr
    assert done.returncode == 1, "something in the script was wrong"


def test_chat_explains_mistakes_and_its_exit_status_tells_a_script(
    bus: Bus, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"format": "tokenbus-chat-1", "params": 3, "turns": 4}')
    missing = tmp_path / "missing" / "file"
    done = run(
        *("chat", "--broker", bus.front),
        stdin=f"/load {missing}\n/save {missing}\n/load {damaged}\n"
        "/set temperature warm\n/set seed 1.5\nstill here\n/exit\n",
    )
    assert done.stdout.splitlines() == ["still here"]
    assert done.stderr.splitlines() == [
        *[f"error: {missing}: No such file or directory"] * 2,
        f"error: {damaged}: model, system, params or turns is not what /save writes",
        "error: temperature: must be a number, got 'warm'",
        "error: seed: must be an integer, got '1.5'",
    ]
    assert done.returncode == 1


def test_chat_checks_an_image_a_parameter_and_a_model_at_once(bus: Bus, tmp_path: Path) -> None:
    gone = tmp_path / "gone.json"
    turn = '{"role": "user", "content": "x", "images": ["/nowhere.png"]}'
    gone.write_text(f'{{"format": "tokenbus-chat-1", "turns": [{turn}]}}')
    done = run(
        *("chat", "--broker", bus.front),
        stdin="/image README.md\n/set temprature 0\n/set top_p 3\n/set colour red\n/model ecko\n"
        f"/load {gone}\nstill here\n",
    )
    assert done.stdout.splitlines() == ["still here"]
    image, name, value, word, model, load = done.stderr.splitlines()
    assert "README.md is not an image" in image
    assert "did you mean temperature" in name
    assert "top_p" in value and "1.0" in value
    assert "unknown parameter 'colour'" in word
    assert "'ecko'" in model and "models served: echo" in model
    assert "/nowhere.png" in load


@pytest.mark.parametrize("form", ["{}", "'{}'", '"{}"', "file://{}", "{escaped}"])
def test_chat_reads_a_path_dropped_onto_the_terminal(
    bus: Bus, image: str, tmp_path: Path, form: str
) -> None:
    dropped = tmp_path / "my picture (1).png"
    dropped.write_bytes(Path(image).read_bytes())
    path = str(dropped).replace(" ", "%20") if "://" in form else str(dropped)
    typed = form.format(path, escaped=re.sub(r"([ ()])", r"\\\1", path))
    done = run("chat", "--broker", bus.front, stdin=f"/image {typed}\nlook\n")
    assert done.stdout.splitlines() == ["1 image: 5x4. look"], done.stderr


def test_undo_removes_an_attached_image_first(bus: Bus, image: str) -> None:
    done = run(
        *("chat", "--broker", bus.front),
        stdin=f"hello\n/image {image}\n/undo\nlook\n/undo\n/undo\n/regen\n",
    )
    assert done.stdout.splitlines() == ["hello", "look"]
    assert "no question" in done.stderr


def test_a_mistake_in_chat_does_not_end_it(bus: Bus) -> None:
    done = run(
        *("chat", "--broker", bus.front),
        stdin="/dance\n/image /nowhere.png\n/load /nowhere\n/set temperature -1\nx\n"
        "/set temperature\nstill here\n",
    )
    assert done.stdout.splitlines() == ["x", "still here"]
    assert done.stderr.count("error: ") == 4
    assert "Traceback" not in done.stderr


def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(bus: Bus) -> None:
    person = Person("chat", "--broker", bus.front)
    person.sees("you> ")
    person.types(ENDLESS + "\n")
    wait_until(lambda: bus.running() == 1, "the answer to run", story=lambda: person.screen)
    person.types("\x03")
    person.sees("(stopped)")
    bus.wait_idle()
    person.sees("you> ", times=2)
    person.types("hello again\n")
    person.sees("hello again", times=2)  # typed, and answered
    person.sees("you> ", times=3)
    person.types("\x03")
    person.sees("(Ctrl-D or /exit leaves)")
    person.types("\x04")
    assert person.leaves() == 0


def test_chat_may_be_started_before_the_broker(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=0)
    bus.broker.kill()
    person = Person("chat", "--broker", bus.front, "--connect-timeout", "0.5", NO_COLOR="1")
    person.sees("waiting for a broker")
    bus.start_broker()
    person.sees("serves no model yet")
    bus.start_worker()
    person.sees("talking to echo")
    assert "\x1b[3" not in person.screen, "NO_COLOR"
    person.types("/exit\n")
    assert person.leaves() == 0


def test_chat_says_when_a_stream_was_resumed(make_bus: Callable[..., Bus]) -> None:
    bus = make_bus(workers=2)
    person = Person("chat", "--broker", bus.front)
    person.sees("you> ")
    person.types(ENDLESS + "\n")
    rows = wait_until(
        lambda: [row["name"] for row in bus.rows() if row["running"]], "a running worker"
    )
    bus.workers[rows[0]].kill()
    other = ({"w1", "w2"} - set(rows)).pop()
    person.sees(f"resumed on worker {other}")
    person.types("\x03")
    person.sees("you> ", times=2)
    person.types("\x04")
    assert person.leaves() == 0


def _commands() -> dict[str, argparse.ArgumentParser]:
    (choices,) = (
        action.choices
        for action in client_main._parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(choices)


@pytest.mark.parametrize("name", sorted(_commands()))
def test_help_says_what_every_option_of_a_command_does(name: str) -> None:
    silent = [
        "/".join(action.option_strings) or action.dest
        for action in _commands()[name]._actions
        if not (action.help or "").strip()
    ]
    assert silent == []
