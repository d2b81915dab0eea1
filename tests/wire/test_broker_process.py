"""The broker as a process: start and stop, addresses, options, exit codes, imports."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from broker import __main__ as broker_main, auth, config
from broker.config import Config, ConfigError
from broker.protocol.header import MessageType
from broker.protocol.messages import Drain, Welcome
from tests.harness import PATIENCE_S, ROOT, wait_until
from tests.wire.broker_peers import (
    RawClient,
    RawWorker,
    peers_context,
    running_broker,
    stream_works,
)


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with peers_context() as context:
        yield context


def run(
    *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **(environment or {})},
    )


# --- start ----------------------------------------------------------------------------------------


def test_it_imports_nothing_heavy() -> None:
    """Otherwise it would start slowly."""
    code = "import sys, json, broker.__main__; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    foreign = loaded - set(sys.stdlib_module_names) - {"__main__", "broker"}
    foreign = {name for name in foreign if not name.startswith(("_", "sitecustomize"))}
    assert foreign <= {"zmq", "msgpack", "msgspec", "typing_extensions", "cython_runtime"}
    assert "asyncio" not in loaded


@pytest.mark.parametrize(
    "path", sorted((ROOT / "broker" / "core").glob("*.py")), ids=lambda p: p.name
)
def test_the_core_imports_nothing_that_does_io(path: Path) -> None:
    allowed = {
        "__future__",
        "bisect",
        "broker",
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "itertools",
        "math",
        "msgspec",
        "random",
        "re",
        "types",
        "typing",
    }
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.partition(".")[0] in allowed, f"{path.name} imports {name}"
            if name.startswith("broker."):
                assert name.startswith(("broker.core", "broker.protocol")), name


def test_it_prints_where_it_listens_and_what_to_do_next(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        assert broker.ready == {
            "front": [broker.front],
            "back": [broker.back],
            "pid": broker.process.pid,
        }
        assert broker.front.startswith("tcp://127.0.0.1:")
        assert f"python -m worker --broker {broker.back}" in broker.log
        assert broker.front in broker.log


def test_it_listens_on_several_addresses_tcp_and_ipc(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    options = ["--front", f"ipc://{tmp_path}/front", "--front", "tcp://127.0.0.1:0"]
    options += ["--back", f"ipc://{tmp_path}/back"]
    with running_broker(tmp_path, *options) as broker:
        worker = RawWorker(context, broker.back)
        worker.join()
        assert len(broker.ready["front"]) == 2
        for address in broker.ready["front"]:
            client = RawClient(context, address)
            client.hello(role="client", name="client")
            stream_works(client, worker)


# --- stop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_an_idle_broker_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    with running_broker(tmp_path) as broker:
        broker.signal(number)
        assert broker.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in broker.log


def test_the_first_signal_lets_streams_end_and_says_goodbye(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    with running_broker(tmp_path) as broker:
        worker, client = RawWorker(context, broker.back), RawClient(context, broker.front)
        worker.join()
        client.hello(role="client", name="client")
        request_id = client.request()
        _, assign, _ = worker.take()
        client.expect(MessageType.ACCEPTED)
        broker.signal(signal.SIGTERM)
        client.expect(MessageType.DRAIN)
        worker.finish(request_id, assign.reply_to, 0)
        client.expect(MessageType.OUTPUT)
        assert client.expect(MessageType.GOODBYE)[1]["reason"] == "shutdown"
        assert worker.expect(MessageType.GOODBYE)[1]["reason"] == "shutdown"
        assert broker.process.wait(PATIENCE_S) == 0


def test_the_second_signal_stops_it_at_once_and_hands_its_streams_over(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    with running_broker(tmp_path) as broker:
        worker, client = RawWorker(context, broker.back), RawClient(context, broker.front)
        worker.join()
        client.hello(role="client", name="client")
        client.request()
        client.expect(MessageType.ACCEPTED)
        broker.signal(signal.SIGINT)
        client.expect(MessageType.DRAIN)
        broker.signal(signal.SIGINT)
        assert client.expect(MessageType.INTERRUPTED)[1]["lost"] is False
        assert broker.process.wait(PATIENCE_S) == 0


# --- options --------------------------------------------------------------------------------------


def test_an_address_in_use_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    with running_broker(tmp_path) as broker:
        done = run("--front", broker.front, "--back", "tcp://127.0.0.1:*")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "in use" in done.stderr


def test_a_broker_that_fails_says_why_before_anything_else_can_end_it() -> None:
    """Closing the sockets could: libzmq aborts the process on an unexpected error."""
    script = """
        import os, sys
        from broker import __main__, loop
        def fails(self): raise RuntimeError("a bug")
        loop.BrokerLoop.run = fails
        make_router = __main__.make_router
        def abort(): os.abort()
        def router(*args, **kwargs):
            socket = make_router(*args, **kwargs)
            socket.close = abort
            return socket
        __main__.make_router = router
        sys.exit(__main__.main(["--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*"]))
    """
    code = textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "RuntimeError: a bug" in done.stderr


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("readiness.Readiness.wait", id="in a turn"),
        pytest.param("readiness.Readiness.__init__", id="before the first"),
    ],
)
def test_a_broker_that_fails_ends_so_that_it_is_restarted(where: str) -> None:
    """A socket left open would hold the process for ever, with its ports closed."""
    name, _, method = where.rpartition(".")
    script = f"""
        import sys
        from broker import __main__, readiness
        def fails(self, *_): raise RuntimeError("a bug")
        {name}.{method} = fails
        sys.exit(__main__.main(["--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--front", "tcp://0.0.0.0:*"), "--insecure"),
        (("--back", "tcp://*:*"), "--insecure"),
        (("--front", "127.0.0.1:5555"), "is not an address"),
        (("--front", "tcp://127.0.0.1:99999"), "1 to 65535"),
        (("--back", "tcp://127.0.0.1:http"), "1 to 65535"),
        (("--placement", "best"), "least_loaded"),
        (("--inflight", "many"), "integer"),
        (("--queue-s", "nan"), "below"),
        (("--ttl-s", "inf"), "--ttl-s: inf is above"),
        (("--ttl-s", "2e9"), "--ttl-s: 2000000000.0 is above"),
        (("--shutdown-grace-s", "inf"), "above"),
        (("--window-tokens", str((1 << 31) + 1)), "above"),
        (("--inflight", "9" * 30), "above"),
        (("--high-water-mark", str(1 << 31)), "above"),
        (("--broker-name", ""), "1 to 256 bytes"),
        (("--broker-name", "é" * 129), "1 to 256 bytes, got 258"),
        (("--broker-name", os.fsdecode(b"\xff")), "not UTF-8"),
        (("--config", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments: tuple[str, ...], word: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert word in done.stderr


def test_what_the_wire_cannot_say_is_refused_wherever_it_is_written(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    for text in ("ttl_s = inf", "shutdown_grace_s = inf", "drain_s = 1" + "0" * 400):
        file.write_text(text)
        done = run("check", str(file))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    done = run("check", environment={"TOKENBUS_BROKER_NAME": ""})
    assert done.returncode == 2 and "TOKENBUS_BROKER_NAME: a name has" in done.stderr


def test_peers_understand_a_broker_whose_options_are_at_their_highest(
    tmp_path: Path, context: zmq.Context[Any]
) -> None:
    options = ["--broker-name", "é" * 128]
    for name, field in Config.__dataclass_fields__.items():
        if "high" in field.metadata and name != "io_threads":
            options += [f"--{name.replace('_', '-')}", str(field.metadata["high"])]
    with running_broker(tmp_path, *options) as broker:
        worker, client = RawWorker(context, broker.back), RawClient(context, broker.front)
        worker.join()
        welcome = msgspec.convert(client.hello(role="client", name="client"), Welcome)
        assert (welcome.broker, welcome.window) == ("é" * 128, 1 << 31)
        stream_works(client, worker)
        broker.signal(signal.SIGTERM)
        drain = msgspec.convert(client.expect(MessageType.DRAIN)[1], Drain)
        assert drain.deadline_ms == 10**12


def test_insecure_must_be_explicit(tmp_path: Path) -> None:
    done = run("check", "--front", "tcp://0.0.0.0:7001", "--insecure")
    assert done.returncode == 0, done.stderr


def test_check_accepts_a_file_alone_and_says_what_is_wrong_in_it(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("inflight = 7\n")
    good = run("check", str(file))
    assert good.returncode == 0 and "inflight = 7" in good.stdout, good.stderr
    file.write_text("inflght = 7\n")
    wrong = run("check", str(file))
    assert wrong.returncode == 2 and "unknown option 'inflght'" in wrong.stderr


def test_check_finds_ignored_settings_and_addresses_that_cannot_be_bound() -> None:
    done = run("check", environment={"TOKENBUS_INFLIHGT": "7"})
    assert done.returncode == 2
    assert "did you mean TOKENBUS_INFLIGHT?" in done.stderr
    for one, other in (
        ("tcp://127.0.0.1:7001", "tcp://127.0.0.1:7001"),
        ("tcp://*:7001", "tcp://127.0.0.1:7001"),
        ("ipc:///tmp/one", "ipc:///tmp/one"),
    ):
        done = run("check", "--insecure", "--front", one, "--back", other)
        assert done.returncode == 2 and "are one port" in done.stderr, done
    free = ("--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*")
    assert run("check", *free).returncode == 0


def test_all_options_of_fastchats_controller_are_reported_together() -> None:
    done = run("--host", "0.0.0.0", "--port", "21001", "--dispatch-method", "lottery")
    assert done.returncode == 2
    assert "--front and --back" in done.stderr and "--placement lottery" in done.stderr


def test_the_usage_names_every_form_whichever_was_called() -> None:
    usage, same = (run(*words, "--help").stdout.partition("\n\n")[0] for words in ((), ("check",)))
    assert usage == same
    assert all(
        f"broker {form}" in usage for form in ("[OPTION", "keys", "invite", "revoke", "check")
    )


def test_a_ready_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    free = ("--front", "tcp://127.0.0.1:*", "--back", "tcp://127.0.0.1:*")
    done = run(*free, "--ready-file", str(tmp_path / "missing" / "ready"))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "--ready-file" in done.stderr, done.stderr


def test_the_next_commands_name_the_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    auth.keys_command([str(tmp_path)], program="keys")
    broker_main._announce(Config(keys=str(tmp_path)), ["tcp://f:1"], ["tcp://b:2"])
    worker, client = capsys.readouterr().out.splitlines()[1:]
    for line, flag, name in ((worker, "--key", "worker"), (client, "--key", "client")):
        assert f" --server-key {tmp_path}/broker.key {flag} {tmp_path}/{name}.key_secret" in line
    assert all(Path(word).exists() for word in worker.split() if word.startswith(str(tmp_path)))


def test_flags_win_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text(
        'inflight = 1\nqueue_requests = 1\nqueue_s = 1.5\nfront = ["ipc://a", "ipc://b"]\n'
    )
    environment = {
        "TOKENBUS_INFLIGHT": "2",
        "TOKENBUS_QUEUE_REQUESTS": "2",
        "TOKENBUS_BACK": "ipc://c",
    }
    arguments = ["--config", str(file), "--inflight", "3", "--insecure"]
    read = config.read(arguments, environment, program="broker")
    assert (read.inflight, read.queue_requests, read.queue_s) == (3, 2, 1.5)
    assert (read.front, read.back, read.insecure) == (("ipc://a", "ipc://b"), ("ipc://c",), True)
    assert read.ttl_s == Config().ttl_s


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broker.toml"
    file.write_text("inflght = 1\n")
    with pytest.raises(ConfigError, match="inflght"):
        config.read(["--config", str(file)], {}, program="broker")


def test_help_shows_every_option_with_flag_environment_default_and_reason() -> None:
    text = run("--help").stdout
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')} " in text
        assert f"TOKENBUS_{name.upper()} " in text
    for field in Config.__dataclass_fields__.values():
        assert field.metadata["reason"] in text


def test_the_descriptor_limit_is_raised(tmp_path: Path) -> None:
    code = (
        "import resource, runpy, sys; hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)); "
        "sys.argv = ['broker', '--front', 'tcp://127.0.0.1:*', '--back', 'tcp://127.0.0.1:*', "
        f"'--ready-file', {str(tmp_path / 'ready')!r}]; "
        "runpy.run_module('broker', run_name='__main__')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_until((tmp_path / "ready").exists, "a start")
        limits = Path(f"/proc/{process.pid}/limits").read_text()
        soft = next(line for line in limits.splitlines() if "open files" in line).split()[3]
        assert int(soft) > 64
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
