"""An operator of FastChat moves over: with the three commands of old, then by the page."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

import broker.config
import client.gateway.config
import worker.config
from tests.harness import PATIENCE_S, ROOT, ManagedProcess, wait_until

PAGE = (ROOT / "client" / "gateway" / "FROM_FASTCHAT.md").read_text(encoding="utf-8")


def rows(headline: str) -> list[list[str]]:
    """The cells of the table below this headline."""
    table = PAGE.partition(f"\n{headline}\n")[2].partition("\n\n")[0]
    lines = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def typed(command: str) -> subprocess.CompletedProcess[str]:
    """A command line of ours, given up at once: nothing of it may start."""
    return subprocess.run(
        [sys.executable, *shlex.split(command)[1:]],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        (
            "python -m broker --host localhost --port 21001 --dispatch-method shortest_queue --ssl",
            ["--host: .*--front", "--port: .*--back", "--dispatch-method: .*--placement", "--ssl"],
        ),
        (
            "python -m worker --model-path lmsys/vicuna-7b-v1.5 --controller-address "
            "http://localhost:21001 --worker-address http://localhost:31000 --num-gpus 2 "
            "--max-gpu-memory 20GiB --awq-ckpt x --conv-template falcon --stream-interval 2",
            [
                "http://localhost:21001 is a web address.*tcp://HOST:PORT",
                "--worker-address: not needed",
                "--num-gpus: .*--gpus",
                "--max-gpu-memory: .*--engine-arg",
                "--awq-ckpt: .*config.json",
                "falcon.*vicuna_v1.1",
                "--stream-interval: not needed",
            ],
        ),
        (
            "python -m client.gateway --host localhost --port 8000 --controller-address "
            "http://localhost:21001 --api-keys a --allowed-origins '[\"*\"]' --ssl",
            [
                "--controller-address: --broker tcp://",
                "--api-keys: --keys",
                "--allowed-origins: --cors-origins",
                "--ssl: --tls-cert",
            ],
        ),
    ],
    ids=["controller", "worker", "API server"],
)
def test_a_command_of_old_is_answered_once_with_all_that_differs(
    command: str, answers: list[str]
) -> None:
    done = typed(command)
    assert done.returncode == 2 and done.stdout == ""
    for answer in answers:
        assert re.search(answer, done.stderr), (answer, done.stderr)
    assert "Traceback" not in done.stderr


def _answer_to(option: str) -> list[str]:
    """What our programs say of an option, those that know it by name; nothing where it is taken."""
    told = []
    value = f"{option}=1"
    for read in (
        lambda: broker.config.read([value], {}, program="broker"),
        lambda: worker.config.parse([value], {}),
        lambda: client.gateway.config.parse_args([value], {}),
    ):
        try:
            read()
        except (Exception, SystemExit) as error:
            told.append(str(error))
        else:
            told.append("taken")
    return [line for line in told if "there is no option" not in line]


def test_every_option_of_the_page_is_known_to_one_of_our_programs() -> None:
    options = [re.findall(r"--[\w-]+", old) for old, _ in rows("| FastChat | tokenbus |")]
    assert len(options) > 10
    for name in (name for names in options for name in names):
        if name != "--gptq-ckpt":  # stands for several
            assert _answer_to(name), name


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[list[ManagedProcess]]:
    running: list[ManagedProcess] = []
    yield running
    for process in reversed(running):
        process.kill()


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def test_the_page_is_followed_to_the_letter(tmp_path: Path, programs: list[ManagedProcess]) -> None:
    """Its three commands, with a small model of the same name and ports that are free here."""
    pytest.importorskip("transformers", reason="install tokenbus[worker]")
    from tests.engines import tiny

    model = tmp_path / "vicuna-7b-v1.5"
    tiny.llama().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    front, back, web = _free_ports(3)
    table = {name: new for name, _, new in rows("| | FastChat | tokenbus |")}
    commands = [
        re.findall(r"`python (.*?)`", table[name])[0]
        for name in ("the middle", "a worker", "OpenAI's API")
    ]
    assert [command.split()[1] for command in commands] == ["broker", "worker", "client.gateway"]
    environment = {
        "TOKENBUS_FRONT": f"tcp://127.0.0.1:{front}",
        "TOKENBUS_BACK": f"tcp://127.0.0.1:{back}",
        "TOKENBUS_WORKER_BROKER": f"tcp://127.0.0.1:{back}",
        "TOKENBUS_BROKER": f"tcp://127.0.0.1:{front}",
    }
    for command in commands:
        words = shlex.split(
            command.replace("lmsys/vicuna-7b-v1.5", str(model)).replace("8000", str(web))
        )
        name = words[1].rpartition(".")[2]
        needs = {"broker": ("FRONT", "BACK"), "worker": ("WORKER_BROKER",)}.get(name, ("BROKER",))
        chosen = {f"TOKENBUS_{key}": environment[f"TOKENBUS_{key}"] for key in needs}
        programs.append(
            ManagedProcess(name, [sys.executable, *words], tmp_path, environment=chosen)
        )

    def story() -> str:
        return "\n".join(process.log() for process in programs)

    def ready() -> bool:
        assert all(process.running for process in programs), story()
        try:
            return httpx.get(f"http://localhost:{web}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    wait_until(ready, "a model at the gateway", story=story)
    # Callers need no change: OpenAI's client, and FastChat's controller API.
    api = openai.OpenAI(base_url=f"http://localhost:{web}/v1", api_key="EMPTY")
    assert [one.id for one in api.models.list()] == ["vicuna-7b-v1.5"]
    completion = api.completions.create(
        model="vicuna-7b-v1.5", prompt="Once upon a time", max_tokens=5
    )
    assert completion.usage is not None and completion.usage.completion_tokens > 0
    listed = httpx.post(f"http://localhost:{web}/list_models").json()
    assert listed == {"models": ["vicuna-7b-v1.5"]}
    # "One that is stopped with SIGTERM finishes."
    assert programs[1].terminate(PATIENCE_S) == 0
