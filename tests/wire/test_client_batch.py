"""`python -m client batch`: OpenAI batch lines in, OpenAI's answers out, each exactly once."""

from __future__ import annotations

import base64
import fcntl
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from PIL import Image

from client.__main__ import main
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until

CHAT = "/v1/chat/completions"
Batch = Callable[..., int]


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    body.setdefault("model", "echo")
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": f"say {custom_id}"}])
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


class Files:
    """The two files of a batch, in their own folder."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"

    def ask(self, *lines: dict[str, Any] | str) -> None:
        texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
        self.input.write_text("".join(f"{text}\n" for text in texts))

    def answers(self) -> dict[str, dict[str, Any]]:
        """The answers by custom_id; fails if an id is answered twice."""
        rows = [json.loads(text) for text in self.output.read_text().splitlines()]
        answers = {row["custom_id"]: row for row in rows}
        assert len(answers) == len(rows), "a line was answered twice"
        return answers

    def body(self, custom_id: str) -> Any:
        answer = self.answers()[custom_id]
        assert answer["response"]["status_code"] == 200, answer
        return answer["response"]["body"]

    def error(self, custom_id: str) -> tuple[int, dict[str, Any]]:
        response = self.answers()[custom_id]["response"]
        return response["status_code"], response["body"]["error"]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def batch(bus: Bus, files: Files) -> Batch:
    """Run the command to its end; return the exit status."""

    def run(*options: str) -> int:
        return main(["batch", str(files.input), str(files.output), "--broker", bus.front, *options])

    return run


# --- answers --------------------------------------------------------------------------------------


def test_every_endpoint_answers_in_the_shapes_of_openais_package(
    batch: Batch, files: Files
) -> None:
    files.ask(
        line("chat"),
        line("logprobs", logprobs=True, top_logprobs=2),
        line("text", "/v1/completions", prompt=["one two", "three"], logprobs=1),
        line("echo", "/v1/completions", prompt="one two", echo=True, max_tokens=0, logprobs=0),
        line("vectors", "/v1/embeddings", input=["a", "b"]),
        line("packed", "/v1/embeddings", input="a", encoding_format="base64"),
    )
    assert batch() == 0
    chat = ChatCompletion.model_validate(files.body("chat"), strict=True)
    assert chat.choices[0].message.content == "say chat"
    assert chat.usage is not None and chat.usage.completion_tokens > 0
    logprobs = ChatCompletion.model_validate(files.body("logprobs"), strict=True)
    assert logprobs.choices[0].logprobs is not None
    assert len(logprobs.choices[0].logprobs.content[0].top_logprobs) == 2
    text = Completion.model_validate(files.body("text"), strict=True)
    assert [choice.text for choice in text.choices] == ["one two", "three"]
    assert text.choices[0].logprobs is not None
    echo = files.body("echo")["choices"][0]
    assert echo["text"] == "one two" and echo["logprobs"]["token_logprobs"][0] is None
    vectors = CreateEmbeddingResponse.model_validate(files.body("vectors"), strict=True)
    assert len(vectors.data) == 2
    raw = base64.b64decode(files.body("packed")["data"][0]["embedding"])
    assert len(raw) == 4 * len(vectors.data[0].embedding)
    answer = files.answers()["chat"]
    assert answer["id"].startswith("batch_req_") and answer["error"] is None


def test_images_choices_and_tools_are_supported(batch: Batch, files: Files) -> None:
    image = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(image, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
    parts = [
        {"type": "text", "text": "what is it"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "look", "arguments": {"at": "sky"}}</tool_call>'
    files.ask(
        line("image", messages=[{"role": "user", "content": parts}], n=2),
        line("tool", messages=[{"role": "user", "content": call}], tools=[tool]),
    )
    assert batch() == 0
    choices = files.body("image")["choices"]
    assert len(choices) == 2 and "5x4" in choices[0]["message"]["content"]
    [choice] = ChatCompletion.model_validate(files.body("tool"), strict=True).choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    assert choice.message.tool_calls[0].function.arguments == '{"at": "sky"}'


def test_a_failed_line_says_why_and_the_others_are_answered(
    batch: Batch, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(
        line("good"),
        line("field", temprature=1),
        line("stream", stream=True),
        line("model", model="nobody"),
    )
    assert batch("--json") == 1
    status, error = files.error("field")
    assert (status, error["code"], error["param"]) == (400, "invalid_request", "temprature")
    assert files.error("stream")[1]["param"] == "stream"
    assert files.error("model")[0] == 404
    assert files.body("good")
    summary = json.loads(capsys.readouterr().out)
    assert (summary["answered"], summary["failed"]) == (4, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2"),
        (json.dumps(line("a", "/v1/images")), "url"),
        (json.dumps({**line("a"), "method": "GET"}), "method"),
        (json.dumps({**line("a"), "custom_id": ""}), "custom_id"),
        (json.dumps(line("first")), "'first' occurs twice"),
    ],
)
def test_a_file_with_a_mistake_is_refused_before_anything_runs(
    batch: Batch, files: Files, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    files.ask(line("first"), text)
    assert batch() == 2
    assert message in capsys.readouterr().err
    assert not files.output.exists()


def test_without_a_broker_nothing_is_written(files: Files) -> None:
    files.ask(line("a"))
    nowhere = ["--broker", "tcp://127.0.0.1:9", "--connect-timeout", "0.2"]
    assert main(["batch", str(files.input), str(files.output), *nowhere]) == 1
    assert files.output.read_text() == ""


# --- continuing a run -----------------------------------------------------------------------------


def test_answered_lines_are_not_sent_again(batch: Batch, files: Files, bus: Bus) -> None:
    files.ask(line("a"), line("b"))
    assert batch() == 0
    before = files.answers()
    files.ask(line("a"), line("b"), line("c"))
    assert batch() == 0
    after = files.answers()
    assert {name: after[name] for name in before} == before and "c" in after


def test_a_torn_last_line_is_sent_again(batch: Batch, files: Files) -> None:
    files.ask(line("a"), line("b"))
    assert batch() == 0
    first, second = files.output.read_text().splitlines()
    files.output.write_text(f"{first}\n{second[:-20]}")
    assert batch() == 0
    assert set(files.answers()) == {"a", "b"}
    assert files.output.read_text().splitlines()[0] == first


def test_a_last_line_without_a_newline_is_kept(batch: Batch, files: Files) -> None:
    files.ask(line("a"), line("b"))
    assert batch() == 0
    before = files.answers()
    files.output.write_text(files.output.read_text().rstrip("\n"))
    files.ask(line("a"), line("b"), line("c"))
    assert batch() == 0
    after = files.answers()
    assert {name: after[name] for name in before} == before and len(after) == 3


def test_failed_lines_are_sent_again_on_request(batch: Batch, files: Files) -> None:
    files.ask(line("a"), line("b", model="nobody"))
    assert batch() == 1
    good = files.answers()["a"]
    files.ask(line("a"), line("b"))
    assert batch() == 1  # nothing is sent: both have an answer, and one is an error
    assert files.error("b")[0] == 404
    assert batch("--retry-failed") == 0
    assert files.body("b") and files.answers()["a"] == good
    assert sorted(path.name for path in files.output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_continued_run_reports_earlier_failures(
    batch: Batch, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(line("a", model="nobody"))
    assert batch() == 1
    files.ask(line("a", model="nobody"), line("b"))
    capsys.readouterr()
    assert batch() == 1
    assert "1 failed in total; --retry-failed retries those" in capsys.readouterr().err


def test_the_input_file_is_never_used_as_the_answer_file(
    batch: Batch, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    files.ask(line("a"))
    asked = files.input.read_bytes()
    files.output.symlink_to(files.input)
    assert batch("--retry-failed") == 2
    assert "is also the input" in capsys.readouterr().err
    assert files.input.read_bytes() == asked


def test_a_file_that_is_not_an_answer_file_is_left_alone(batch: Batch, files: Files) -> None:
    files.ask(line("a"))
    files.output.write_text("precious\nnotes\n")
    assert batch() == 2
    assert files.output.read_text() == "precious\nnotes\n"


def test_two_runs_never_write_to_the_same_file(batch: Batch, files: Files) -> None:
    files.ask(line("a"))
    with files.output.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert batch() == 2
    assert files.output.read_text() == ""


def test_ctrl_c_stops_at_once_and_frees_the_slots_and_the_next_run_continues(
    bus: Bus, files: Files
) -> None:
    slow = "[[echo mode=sampled answer_tokens=100000 step_delay_ms=5]] go"
    ids = [f"quick-{i}" for i in range(20)]
    endless = [{"role": "user", "content": slow}]
    files.ask(*[line(i) for i in ids], *[line(f"slow-{i}", messages=endless) for i in range(4)])
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "client", "batch", str(files.input), str(files.output)),
            *("--broker", bus.front, "--concurrency", "4"),
        ],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: bus.running() == 4 and len(files.answers()) == 20, "the slow lines to run")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "4 lines are left" in errors and "Traceback" not in errors
    bus.wait_idle()
    before = files.answers()
    files.ask(*[line(i) for i in ids], *[line(f"slow-{i}") for i in range(4)])
    arguments = ["batch", str(files.input), str(files.output), "--broker", bus.front]
    assert main(arguments) == 0
    assert len(files.answers()) == 24
    assert {name: files.answers()[name] for name in before} == before


# --- in flight ------------------------------------------------------------------------------------


def test_lines_have_a_low_priority_unless_they_say_otherwise(
    batch: Batch, files: Files, bus: Bus
) -> None:
    files.ask(line("a"), line("b", priority=7), line("c", "/v1/embeddings", input="x"))
    assert batch("--priority", "-80") == 0
    latest = bus.client().requests(limit=3)
    assert sorted(row["priority"] for row in latest) == [-80, -80, 7]


def test_no_line_is_lost_if_the_broker_is_killed_during_the_run(
    make_bus: Callable[..., Bus], files: Files
) -> None:
    bus = make_bus(workers=1, slots=4, step_delay_ms=10)
    files.ask(*[line(f"l{i}") for i in range(60)])
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "client", "batch", str(files.input), str(files.output)),
            *("--broker", bus.front, "--concurrency", "8"),
        ],
        cwd=ROOT,
        env={**os.environ},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: files.output.exists() and len(files.answers()) >= 5, "the first answers")
    bus.broker.kill()
    bus.start_broker()
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors
    answers = files.answers()
    assert len(answers) == 60
    for name in answers:
        assert files.body(name)["choices"][0]["message"]["content"] == f"say {name}"


def test_max_tokens_beyond_the_context_is_reduced_as_by_the_gateway(
    make_bus: Callable[..., Bus], files: Files
) -> None:
    bus = make_bus(context_tokens=64)
    files.ask(line("a", max_tokens=32_000, messages=[{"role": "user", "content": "x" * 20}]))
    assert main(["batch", str(files.input), str(files.output), "--broker", bus.front]) == 0
    assert files.body("a")["choices"][0]["message"]["content"] == "x" * 20


def test_a_line_is_answered_as_the_gateway_answers_it(batch: Batch, files: Files) -> None:
    hello = [{"role": "user", "content": "say hello"}]
    files.ask(
        line("ids", messages=hello, return_token_ids=True),
        line("response", "/v1/responses", input="say hello"),
        line("background", "/v1/responses", input="say hello", background=True),
    )
    assert batch() == 1
    chat = files.body("ids")
    assert chat["choices"][0]["token_ids"] and chat["prompt_token_ids"]
    assert chat["system_fingerprint"]
    response = Response.model_validate(files.body("response"), strict=True)
    assert response.output_text == "say hello" and response.usage is not None
    assert files.error("background")[1]["param"] == "background"


def test_without_the_gateway_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    program = """
import sys
for name in ("openai", "starlette", "uvicorn", "prometheus_client", "pydantic", "rich"):
    sys.modules[name] = None
from client.__main__ import main
sys.exit(main(["batch", "in.jsonl", "out.jsonl"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 2 and "[gateway]" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())
