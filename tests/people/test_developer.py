"""A developer builds a small program on the library, in a project that has files of our names."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from client.parameters import ChatOptions, described
from tests.harness import MYPY, PATIENCE_S, ROOT, Bus

PROGRAM = """\
import os
import pickle
import sys
from dataclasses import dataclass

from tokenbus import BusError, Client, Completion, InvalidAnswer, Timeout


@dataclass
class Shape:
    colour: str


def ask(bus: Client) -> list[Completion]:
    return bus.chat("How are you?", model="echo", n=2, max_tokens=20, temperature=0)


def main() -> None:
    with Client(timeout=Timeout(total=300)) as bus:
        print([answer.text for answer in ask(bus)])
        # One order of arguments: the content, then the model by name.
        print(bus.generate("abc", model="echo").text, bus.count("abc", model="echo"))
        print(len(bus.embed(["a", "b"], model="echo").vectors))
        print("".join(bus.chat("piece by piece", model="echo", stream=True).text))
        answer = bus.chat("no JSON", model="echo", response_format={"type": "text"})
        print(answer.parsed)
        try:
            print(bus.chat("no JSON", model="echo", response_format=Shape).parsed.colour)
        except InvalidAnswer as error:
            print(isinstance(error, ValueError))
        try:
            print(bus.chat("x", model="nobody").text)
        except BusError as error:
            print(type(error).__name__)
        try:
            pickle.dumps(bus)
        except TypeError as error:
            print(error)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                bus.models()
            except RuntimeError as error:
                print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    try:
        Client("tcp://127.0.0.1:1", timeout=Timeout(connect=0.2)).models()
    except TimeoutError as error:
        print(isinstance(error, ConnectionError), "python -m broker" in str(error))


main()
"""


def python(
    folder: Path, *arguments: str, path: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python, as somebody runs it in a project's folder."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_a_program_does_what_its_writer_expects(bus: Bus, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    done = python(tmp_path, "program.py", TOKENBUS_BROKER=bus.front)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    texts, generated, vectors, streamed, parsed, typed, missing, pickled, forked, absent = lines
    assert texts == "['How are you?', 'How are you?']"
    assert generated.startswith("abc ") and int(generated.split()[1]) > 0
    assert (vectors, streamed, parsed, typed) == ("2", "piece by piece", "None", "True")
    assert missing == "ModelUnavailable"
    for told in (pickled, forked):
        assert "make the Client in the " in told and "process" in told
    assert absent == "True True"


def test_the_editor_knows_the_program_and_what_is_misspelt_in_it() -> None:
    api = pytest.importorskip("mypy.api")
    report, errors, _ = api.run([*MYPY, "-c", PROGRAM])
    assert report.startswith("Success") and not errors, report
    wrong = PROGRAM.replace("max_tokens=20", "max_token=20").replace("n=2,", 'n="two",')
    report, _, _ = api.run([*MYPY, "-c", wrong])
    assert "No overload variant" in report


def test_help_shows_every_option_with_type_unit_and_default(tmp_path: Path) -> None:
    told = described(ChatOptions)
    assert "tokens" in told["max_tokens"] and "seconds" in told["timeout"]
    done = python(tmp_path, "-c", "import client; help(client.Client.chat)")
    for line in (
        f"max_tokens (int): {told['max_tokens']}",
        f"timeout (Timeout | float): {told['timeout']}",
        "`n`: so many answers",
        "`response_format`: a class",
    ):
        assert line in done.stdout


def test_a_project_may_have_files_of_our_names(bus: Bus, tmp_path: Path) -> None:
    """Its own `client.py` stands before ours, which is told; the scripts are not disturbed."""
    for name in ("client.py", "worker.py", "broker.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong file')\n")
    (tmp_path / "program.py").write_text("from tokenbus import Client\n")
    done = python(tmp_path, "program.py")
    assert done.returncode != 0
    (tmp_path / "client.py").write_text("ours = 1\n")
    done = python(tmp_path, "program.py")
    assert str(tmp_path / "client.py") in done.stderr and "rename" in done.stderr
    # A script lies in a folder of its own, which is what Python looks into first.
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, entry in scripts.items():
        module, _, function = entry.partition(":")
        (folder / name).write_text(f"import sys\nfrom {module} import {function}\nsys.exit(main())")
        done = python(tmp_path, str(folder / name), "--version")
        assert done.returncode == 0 and "tokenbus" in done.stdout, done.stderr
    done = python(tmp_path, str(folder / "tokenbus"), "models", TOKENBUS_BROKER=bus.front)
    assert "echo" in done.stdout, done.stderr
