"""Coding agents as people install them: Claude Code by `/v1/messages`, Codex by `/v1/responses`,
Qwen Code by `/v1/chat/completions`.

Each answers a question, and does what the model calls: the echo engine says what the task says, so
the task is a call of the agent's own tool for commands, and it is called again in every turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.harness import wait_until
from tests.judges.stage import PATIENCE_S, Stage, node_packages, offline_settings, run

CLAUDE = ("@anthropic-ai/claude-code@2.1.197",)
CODEX = ("@openai/codex@0.171.0",)
QWEN = ("@qwen-code/qwen-code@0.15.10",)
#: Its first prompt is longer than the echo's context.
WIDE_TOKENS = 200_000
#: Agents run commands: no more of them than the file needs to be seen to grow.
TURNS = 3


def judge(stage: Stage) -> None:
    """Raises AssertionError where an agent fails or does not do what it was told."""
    _claude(stage)
    _codex(stage)
    _qwen(stage)


def _call(tool: str, argument: str, file: Path, **more: bool) -> str:
    arguments = {argument: f"echo done >> {file}", "description": "Writes.", **more}
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"


def _claude(stage: Stage) -> None:
    modules = node_packages("claude-code", *CLAUDE)
    command = (
        *("node", modules / "@anthropic-ai" / "claude-code" / "cli-wrapper.cjs"),
        *("--model", "echo", "--output-format", "json", "--allowedTools", "Bash"),
    )
    home = stage.folder / "claude"
    home.mkdir()
    environment = {
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": stage.url,
        "ANTHROPIC_API_KEY": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    said = json.loads(run(stage, *command, "-p", "say hello", **environment).splitlines()[-1])
    assert "say hello" in said["result"] and said["stop_reason"] == "end_turn", said
    file = home / "seen"
    task = _call("Bash", "command", file)
    # It ends with an error: the task has more turns than it may take.
    words = [*map(str, command), "--max-turns", str(TURNS), "-p", f"{task}\n{task}"]
    with _started(stage, words, environment) as process:
        assert process.wait(PATIENCE_S) is not None
    assert file.read_text().split() == ["done"] * 2 * TURNS, "two calls in each turn"


def _codex(stage: Stage) -> None:
    modules = node_packages("codex", *CODEX)
    home = stage.folder / "codex"
    home.mkdir()
    (home / "config.toml").write_text(
        'model = "echo"\nmodel_provider = "bus"\napproval_policy = "never"\n'
        'sandbox_mode = "danger-full-access"\n[model_providers.bus]\nname = "bus"\n'
        f'base_url = "{stage.url}/v1"\nwire_api = "responses"\nenv_key = "BUS_KEY"\n'
    )
    environment = {"HOME": str(home), "CODEX_HOME": str(home), "BUS_KEY": "none"}
    command = (modules / ".bin" / "codex", "exec", "--skip-git-repo-check", "--cd", home)
    said = run(stage, *command, "say hello", **environment)
    assert said.rstrip().endswith("say hello"), said
    file = home / "seen"
    words = [*map(str, command), _call("exec_command", "cmd", file)]
    with _started(stage, words, environment) as process:
        wait_until(
            lambda: file.exists() and len(file.read_text().split()) >= TURNS,
            "commands of Codex",
            PATIENCE_S,
            story=lambda: f"it ended with {process.poll()}",
        )


def _qwen(stage: Stage) -> None:
    modules = node_packages("qwen-code", *QWEN)
    home = stage.folder / "qwen"
    home.mkdir()
    environment = {
        "HOME": str(home),
        "OPENAI_BASE_URL": f"{stage.url}/v1",
        "OPENAI_API_KEY": "none",
        "OPENAI_MODEL": "wide",
    }
    command = ("node", modules / "@qwen-code" / "qwen-code" / "cli.js", "--auth-type", "openai")
    worker = stage.bus.start_worker("wide", "--model-name", "wide", context_tokens=WIDE_TOKENS)
    try:
        stage.bus.wait_ready(3)
        said = run(stage, *command, "say hello", **environment)
        assert said.rstrip().endswith("say hello"), said
        file = home / "seen"
        task = _call("run_shell_command", "command", file, is_background=False)
        words = [*map(str, command), "--yolo", "--max-session-turns", str(TURNS), task]
        with _started(stage, words, environment) as process:
            assert process.wait(PATIENCE_S) is not None
        assert file.read_text().split() == ["done"] * TURNS, "a call in each turn"
    finally:
        worker.terminate()
        del stage.bus.workers["wide"]


@contextlib.contextmanager
def _started(
    stage: Stage, words: list[str], environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """An agent at work, ended whatever happens."""
    process = subprocess.Popen(
        words,
        cwd=stage.folder,
        env=offline_settings(**environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # An agent is a script that starts a program, which starts others.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
