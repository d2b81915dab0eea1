"""`python -m client demo`: in the terminal, and on the page with `--web`."""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from client.__main__ import main
from tests.harness import PATIENCE_S, ROOT, wait_until
from tests.wire.test_client_cli import run

PLAIN = urllib.request.build_opener(urllib.request.ProxyHandler({}))


# --- the terminal ---------------------------------------------------------------------------------


def test_the_demo_shows_every_step_and_leaves_no_process_or_file(tmp_path: Path) -> None:
    done = run("demo", "--engine", "echo", environment={"TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 image: 240x240. ")
    for word in ("first token after", "tokens/s", "all, on demo", "expected", "right"):
        assert word in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert _processes_of(tmp_path) == ""


def test_the_demo_accepts_an_image_and_a_question(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    Image.new("RGB", (5, 4)).save(image)
    done = run("demo", "--engine", "echo", "--image", str(image), "--question", "what?")
    assert (done.returncode, done.stdout) == (0, "1 image: 5x4. what?\n")


def test_without_the_workers_packages_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    errors = capsys.readouterr().err
    assert "[worker]" in errors and "--engine echo" in errors


def test_the_error_for_a_worker_that_cannot_start_quotes_its_last_line() -> None:
    done = run("demo", "--engine", "no-such-engine", "--load-timeout", "30")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "no-such-engine" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "client", "demo", "--engine", "echo", "--keep"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        assert process.stderr is not None
        seen = b""
        while b"the bus keeps running" not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        assert "broker" in _processes_of(tmp_path)
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0
        process.stderr.read()
    assert _processes_of(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


# --- the page -------------------------------------------------------------------------------------


class Demo:
    """A running `demo --web`."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.folder = folder
        clean = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
        with (folder / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "client", "demo", "--web", "--engine", "echo", *options],
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env={**clean, "TMPDIR": str(folder), **environment},
            )

    def output(self) -> str:
        return (self.folder / "output").read_text()

    def url(self) -> str:
        def found() -> str | None:
            assert self.process.poll() is None, self.output()
            match = re.search(r"The page is at (http://127\.0\.0\.1:\d+/)\n", self.output())
            return match and match[1]

        return wait_until(found, "the page's address", story=self.output)


@contextmanager
def web_demo(folder: Path, *options: str, **environment: str) -> Iterator[Demo]:
    demo = Demo(folder, *options, **environment)
    try:
        yield demo
    finally:
        demo.process.terminate()
        demo.process.wait(PATIENCE_S)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_served_until_it_is_interrupted(tmp_path: Path, number: signal.Signals) -> None:
    with web_demo(tmp_path, "--no-browser") as demo:
        # Once the address is printed, the page, its image and a model are ready.
        url = demo.url()
        assert b"<title>tokenbus</title>" in PLAIN.open(url).read()
        image = Image.open(io.BytesIO(PLAIN.open(f"{url}page/sample.png").read()))
        assert image.size == (240, 240)
        assert b'"serving":1' in PLAIN.open(f"{url}ready").read()
        assert f"base_url {url}v1" in demo.output()
        demo.process.send_signal(number)
        assert demo.process.wait(PATIENCE_S) == 0, demo.output()
    assert _processes_of(tmp_path) == ""
    assert [path.name for path in tmp_path.iterdir()] == ["output"]


def test_the_shipped_image_is_the_one_that_the_generator_draws() -> None:
    from worker.demo.pictures import example

    drawn, *_ = example()
    shipped = Image.open(ROOT / "client" / "gateway" / "static" / "sample.png")
    assert shipped.convert("RGB").tobytes() == drawn.tobytes()


def test_a_browser_is_opened_if_there_is_a_display(tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    browser = tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    with web_demo(tmp_path, DISPLAY=":99", BROWSER=f"{browser} %s") as demo:
        url = demo.url()
        wait_until(lambda: opened.exists() and opened.read_text(), "an opened browser")
        # It must not show the conversation of an earlier demo.
        assert opened.read_text().strip() == f"{url}#new"


def test_without_a_display_only_the_address_is_printed(tmp_path: Path) -> None:
    with web_demo(tmp_path, BROWSER="/bin/false %s") as demo:
        demo.url()
        wait_until(lambda: "no browser could be opened" in demo.output(), "the hint")


def test_an_explicit_port_in_use_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with web_demo(tmp_path, "--no-browser", "--port", str(port)) as demo:
            assert demo.process.wait(PATIENCE_S) == 1
            last = demo.output().splitlines()[-1]
            assert last.startswith("error: the gateway ended") and f"port {port} is in use" in last


def test_another_port_is_used_if_the_default_is_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        except OSError:
            pass  # another program has it, which serves as well
        with web_demo(tmp_path, "--no-browser") as demo:
            assert not demo.url().endswith(":8000/")


def test_the_end_of_a_process_is_reported(tmp_path: Path) -> None:
    with web_demo(tmp_path, "--no-browser") as demo:
        demo.url()
        [worker] = _numbers_of(tmp_path, "-m worker ")
        os.kill(worker, signal.SIGKILL)
        assert demo.process.wait(PATIENCE_S) == 1
        assert "error: the worker ended with status -9" in demo.output()
    assert _processes_of(tmp_path) == ""


def test_without_the_gateways_packages_the_demo_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--web", "--engine", "echo"]) == 1
    errors = capsys.readouterr().err
    assert "[gateway]" in errors and "uvicorn" in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "options", [("--web", "--question", "x"), ("--port", "1"), ("--no-browser",)]
)
def test_options_without_an_effect_are_refused(
    options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--engine", "echo", *options]) == 2
    assert "--web" in capsys.readouterr().err


def test_a_missing_image_is_an_error_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--engine", "echo", "--image", "/nowhere.png"]) == 2
    errors = capsys.readouterr().err
    assert "/nowhere.png" in errors and errors.count("\n") == 1


def _numbers_of(folder: Path, words: str) -> list[int]:
    return [number for number, command in _started_with(folder).items() if words in command]


def _processes_of(folder: Path) -> str:
    return "\n".join(_started_with(folder).values())


def _started_with(folder: Path) -> dict[int, str]:
    """The command lines of processes started with this temporary folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue  # gone, or another user's
        if f"TMPDIR={folder}".encode() in environment and int(entry.name) != os.getpid():
            found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found
