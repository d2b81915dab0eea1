"""A newcomer follows the first page: three terminals in any order, then the demo in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import PATIENCE_S, ROOT, ManagedProcess, wait_until
from tests.people.test_fastchat_operator import _free_ports
from tests.wire.test_client_cli import Person, run

README = (ROOT / "README.md").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def test_the_three_commands_find_each_other_in_any_order(tmp_path: Path) -> None:
    block = README.partition("## Three terminals")[2].partition("```bash\n")[2].partition("```")[0]
    assert block.splitlines() == ["python -m broker", "python -m worker", "python -m client chat"]
    front, back = (f"tcp://127.0.0.1:{port}" for port in _free_ports(2))
    # The last one first, which says what it waits for.
    talk = Person("chat", TOKENBUS_BROKER=front)
    talk.sees(f"looking for a broker at {front}")
    worker = ManagedProcess(
        "worker",
        [sys.executable, "-m", "worker"],
        tmp_path,
        environment={"TOKENBUS_WORKER_BROKER": back, "TOKENBUS_WORKER_ENGINE": "echo"},
    )
    broker = None
    try:
        wait_until(lambda: "broker absent" in worker.log(), "the worker's word", story=worker.log)
        broker = ManagedProcess(
            "broker",
            [sys.executable, "-m", "broker"],
            tmp_path,
            environment={"TOKENBUS_FRONT": front, "TOKENBUS_BACK": back},
        )
        talk.sees("talking to echo")
        talk.types("hello there\n")
        talk.sees("hello there", times=2)
        talk.types("/exit\n")
        assert talk.leaves() == 0
    finally:
        worker.kill()
        if broker is not None:
            broker.kill()


def test_first_mistakes_are_answered_in_a_line() -> None:
    nobody = "tcp://127.0.0.1:1"
    for words, told in (
        (["demmo"], "did you mean demo?"),
        (["demo", "--imagee", "x"], "did you mean --image?"),
        (["chat", "--broker", "127.0.0.1:5555"], "tcp://HOST:PORT"),
        (["models", "--broker", nobody, "--connect-timeout", "0.3"], "python -m broker"),
        (["generate", "--broker", nobody, "--image", "README.md", "x"], "README.md"),
    ):
        done = run(*words)
        assert done.returncode in (1, 2) and told in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    missing = subprocess.run(
        [sys.executable, "-m", "worker", "--model-path", "/nowhere/model"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )
    assert missing.returncode == 1 and "there is no folder /nowhere/model" in missing.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the page of `demo --web`, with the bundled model."""
    pytest.importorskip("torch", reason="install tokenbus[worker]")
    folder = tmp_path_factory.mktemp("demo")
    process = ManagedProcess(
        "demo", [sys.executable, "-m", "client", "demo", "--web", "--no-browser"], folder
    )

    def found() -> str | None:
        assert process.running, process.log()
        match = re.search(r"The page is at (http://127\.0\.0\.1:\d+/)\n", process.log())
        return match and match[1]

    try:
        yield wait_until(found, "the page's address", story=process.log) or ""
        assert process.terminate(PATIENCE_S) == 0
    finally:
        process.kill()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (375, 667)], ids=["desktop", "phone"])
def test_the_demo_answers_about_its_image(demo: str, size: tuple[int, int], scheme: str) -> None:
    """`python -m client demo --web`, and a question of the page: the model is a true one."""
    api = pytest.importorskip("playwright.sync_api")
    from tests.gateway.test_page import FLAGS

    width, height = size
    errors: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=width < 500
        )
        page.set_default_timeout(PATIENCE_S * 1000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(demo)
        page.get_by_role("button", name="What is in this image?").click()
        page.locator(".message.assistant .facts").first.wait_for()
        answer = page.locator(".message.assistant .body").first.inner_text()
        assert re.search(r"circle|square|triangle", answer), answer
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Send").wait_for()
        browser.close()
    assert errors == []
