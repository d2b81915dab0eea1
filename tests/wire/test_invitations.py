"""A peer joins a bus with one line, even through a TCP proxy, until the line expires or is revoked.

The broker is not restarted.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq

from broker import auth, invite
from broker.core.events import Side
from broker.log import Logger
from broker.protocol import invitation
from broker.protocol.invitation import InvitationError
from client import Client, Timeout, Unauthenticated
from client.__main__ import _joined
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until
from tests.support.descriptors import room_for
from tests.support.faults import Proxy
from worker import config as worker_config


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    auth.keys_command([str(folder)], program="keys")
    return folder


def invited(keys: Path, name: str, *options: str) -> str:
    """The line of a new invitation."""
    return invite.invite([str(keys), name, *options], program="invite")[0]


class Home:
    """A bus with keys, behind a TCP proxy on each side, and its operator."""

    def __init__(self, folder: Path, keys: Path) -> None:
        self.bus = Bus(folder, "--keys", str(keys))
        self.bus.start_broker()
        self.front, self.back = Proxy(self.bus.front), Proxy(self.bus.back)
        self.operator = Client(
            self.bus.front,
            server_key=str(keys / "broker.key"),
            key_file=keys / "operator.key_secret",
        )

    def workers(self) -> list[str]:
        return [row["name"] for row in self.operator.workers() if row["state"] == "ready"]

    def close(self) -> None:
        self.operator.close()
        self.bus.stop()
        self.front.close()
        self.back.close()


@pytest.fixture
def home(tmp_path: Path, keys: Path) -> Iterator[Home]:
    made = Home(tmp_path, keys)
    try:
        yield made
    finally:
        made.close()


def client_of(line: str | Path, address: str | None = None) -> Client:
    return Client(address, join=line, timeout=Timeout(connect=PATIENCE_S, total=PATIENCE_S))


# --- joining and leaving --------------------------------------------------------------------------


def test_a_desktop_joins_with_one_line_through_a_proxy_and_is_revoked_by_name(
    tmp_path: Path, keys: Path, home: Home
) -> None:
    command = [sys.executable, "-m", "broker", "invite", str(keys), "desktop"]
    said = subprocess.run(
        [*command, "--address", home.back.address],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = said.stdout.splitlines()
    assert "secret" in said.stderr and line not in said.stderr
    file = tmp_path / "desktop.join"
    file.write_text(said.stdout)
    file.chmod(0o600)
    desktop = home.bus.launch(
        *("desktop", "worker", "--join", str(file), "--engine", "echo"),
        *("--worker-id", "desktop", "--no-progress"),
    )
    home.bus.workers["desktop"] = desktop
    wait_until(lambda: home.workers() == ["desktop"], "the desktop to join")
    person = invited(keys, "person", "--role", "client", "--address", home.front.address)
    with client_of(person) as client:
        assert client.chat("echo", "hello", max_tokens=8).text
        assert home.back.accepted and home.front.accepted, "both went through a proxy"
        output = invite.revoke([str(keys), "desktop"], program="revoke")
        assert "off workers.allow" in output
        wait_until(lambda: home.workers() == [], "the desktop's session to end")
        wait_until(lambda: "allow-list" in desktop.log(), "the desktop to say why")
        invite.revoke([str(keys), "person"], program="revoke")

        def refused() -> bool:
            try:
                client.workers()
            except Unauthenticated:
                return True
            return False

        wait_until(refused, "the person's session to end")


def test_an_invitation_expires_and_its_session_ends_with_it(keys: Path, home: Home) -> None:
    line = invited(
        keys, "guest", "--role", "client", "--address", home.bus.front, "--expires", "15s"
    )
    with client_of(line) as client:
        wait_until(lambda: client.query("bus.version"), "the guest to be let in")

        def refused() -> bool:
            try:
                client.query("bus.version")
            except Unauthenticated:
                return True
            return False

        wait_until(refused, "the guest to be shut out")
    assert home.operator.query("bus.version"), "others stay"
    with pytest.raises(Exception, match="ask for a new one"):
        client_of(line)


# --- the command ----------------------------------------------------------------------------------


def test_the_lists_say_who_may_connect_and_until_when(keys: Path) -> None:
    invited(keys, "desktop", "--expires", "12h")
    invited(keys, "guest", "--role", "client", "--expires", "never")
    listed = invite.revoke([str(keys)], program="revoke")
    assert "desktop  worker  until 20" in listed and "guest  client\n" in listed
    with pytest.raises(auth.KeyFileError, match="on a list already"):
        invited(keys, "desktop")
    with pytest.raises(auth.KeyFileError, match=r"no list names 'dsktop'; on the lists: .*desktop"):
        invite.revoke([str(keys), "dsktop"], program="revoke")
    assert "client.key_secret is of no use" in invite.revoke([str(keys), "client"], program="")


def test_changes_at_once_are_all_made(keys: Path) -> None:
    """Operators, or a script that lets many in, run the commands side by side."""
    for number in range(8):
        invited(keys, f"old{number}")

    def change(number: int) -> None:
        invited(keys, f"new{number}")
        auth.keys_command([str(keys), "--add", "worker", "--name", f"more{number}"], program="")
        invite.revoke([str(keys), f"old{number}"], program="")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(change, range(8)))
    expected = {f"{kind}{number}" for kind in ("new", "more") for number in range(8)}
    assert set(auth.names(keys)) == {*expected, *auth.ROLES}
    assert not list(keys.glob(".*.allow*")), "nothing is left beside the lists"


def test_of_two_invitations_of_one_name_one_is_refused(keys: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        all_of_them = [pool.submit(invited, keys, "desktop") for _ in range(8)]
    refused = [one.exception() for one in all_of_them if one.exception() is not None]
    assert len(refused) == 7 and all("is on a list already" in str(error) for error in refused)


@pytest.mark.parametrize("obstacle", [".lock", ".workers.allow.PID"])
@pytest.mark.parametrize(
    "command",
    [
        lambda keys: invited(keys, "desktop"),
        lambda keys: invite.revoke([str(keys), "worker"], program=""),
        lambda keys: auth.keys_command([str(keys), "--add", "worker", "--name", "w"], program=""),
    ],
)
def test_a_file_that_cannot_be_written_is_named_in_one_line(
    keys: Path, command: Callable[[Path], object], obstacle: str
) -> None:
    obstacle = obstacle.replace("PID", str(os.getpid()))
    (keys / obstacle).unlink(missing_ok=True)
    (keys / obstacle).mkdir()
    before = (keys / "workers.allow").read_text()
    with pytest.raises(auth.KeyFileError, match=f"{obstacle}: Is a directory$"):
        command(keys)
    assert (keys / "workers.allow").read_text() == before


def test_the_line_has_what_the_broker_expects_and_no_file_keeps_its_secret(keys: Path) -> None:
    line = invited(keys, "desktop", "--address", "tcp://bus.example:443")
    made = invitation.parse(line)
    assert made.brokers == ["tcp://bus.example:443"]
    assert made.public in auth.load_allow_lists(keys).workers
    assert made.until is not None and abs(made.until - time.time() - 30 * 86_400) < 600
    assert auth.names(keys)["desktop"] == ("worker", made.until), "the list and the line agree"
    assert not any(made.secret in path.read_text() for path in keys.iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in keys.iterdir())


def test_an_expired_entry_admits_nobody(keys: Path) -> None:
    public, _ = auth.fresh_pair()
    auth.allow(keys, "worker", public, "old", time.time() - 5)
    soon = time.time() + 600
    auth.allow(keys, "client", auth.fresh_pair()[0], "soon", soon)
    lists = auth.load_allow_lists(keys)
    assert public not in lists.workers
    assert abs(lists.next_end - soon) < 2
    path = keys / "workers.allow"
    path.write_text(path.read_text() + f"{auth.fresh_pair()[0]} x until=tomorrow\n")
    with pytest.raises(auth.KeyFileError, match=r"line \d+: until=tomorrow: not a date"):
        auth.load_allow_lists(keys)


@pytest.mark.parametrize("spoilt", ["before", "at the end"])
def test_an_entry_ends_whatever_the_state_of_the_files(
    keys: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    began = time.time()
    clock = SimpleNamespace(time=lambda: began, monotonic=time.monotonic)
    monkeypatch.setattr(auth, "time", clock)
    guests = {name: auth.fresh_pair()[0] for name in ("first", "second", "stays")}
    for name, ends in (("first", began + 60), ("second", began + 120), ("stays", None)):
        auth.allow(keys, "client", guests[name], name, ends)
    said = io.StringIO()

    def spoil(gate: auth.Gate) -> None:
        (keys / "workers.allow").write_text("not a key\n")
        if spoilt == "before":
            assert (gate.look(1.0), gate.look(2.0)) == (None, None)

    with zmq.Context() as context:
        gate = auth.Gate(context, keys, Logger(said, form="json"))
        try:
            assert gate.look(0.0) is None
            workers = gate.event().workers
            spoil(gate)
            clock.time = lambda: began + 62
            change = gate.look(3.0)
            assert change is not None and guests["first"] not in change.clients
            assert {guests["second"], guests["stays"]} < change.clients
            clock.time = lambda: began + 122
            change = gate.look(4.0)
            assert change is not None and guests["second"] not in change.clients
            assert guests["stays"] in change.clients and change.workers == workers
            assert gate.look(5.0) is None
            assert said.getvalue().count("not reloaded") == 1, "one line for each cause"
            # As soon as the file can be used, what it says counts.
            (keys / "workers.allow").write_text("")
            gate.look(6.0)
            change = gate.look(7.0)
            assert change is not None and not change.workers and guests["stays"] in change.clients
        finally:
            gate.socket.close(linger=0)


def test_a_key_does_not_enter_after_its_end_even_before_the_next_look(keys: Path) -> None:
    ended = auth.Entry("guest", time.time() - 1)
    both = auth.AllowLists({"k": ended}, {"k": ended}, {"k": auth.Entry("boss")})
    assert not both.admit("k", Side.BACK, time.time())
    assert both.admit("k", Side.FRONT, time.time()), "as an operator it has no end"


def test_lists_that_the_machine_could_not_read_are_read_again(keys: Path) -> None:
    with zmq.Context() as context:
        gate = auth.Gate(context, keys, Logger(io.StringIO()))
        try:
            gate.look(0.0)
            public = auth.fresh_pair()[0]
            auth.allow(keys, "client", public, "guest", None)
            with room_for(0):
                assert (gate.look(1.0), gate.look(2.0)) == (None, None)
            change = gate.look(3.0)
            assert change is not None and public in change.clients
        finally:
            gate.socket.close(linger=0)


def test_a_list_is_not_read_while_an_editor_writes_it(keys: Path) -> None:
    with zmq.Context() as context:
        gate = auth.Gate(context, keys, Logger(io.StringIO()))
        try:
            assert gate.look(0.0) is None
            path = keys / "clients.allow"
            text = path.read_text()
            path.write_text("")
            assert gate.look(1.0) is None, "it is empty for a moment"
            path.write_text(text + "# nobody else\n")
            assert gate.look(2.0) is None
            change = gate.look(3.0)
            assert change is not None and change.clients
            assert gate.look(4.0) is None
        finally:
            gate.socket.close(linger=0)


# --- the line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda line: line[:-9], "cut short or mistyped"),
        (lambda line: line[:40] + "x" + line[41:], "cut short or mistyped"),
        (lambda line: "hello", "neither an invitation"),
        (lambda line: line.replace("tokenbus1.", "tokenbus9."), "neither an invitation"),
    ],
)
def test_a_damaged_line_is_refused_with_the_reason(keys: Path, spoil: object, word: str) -> None:
    line = invited(keys, "desktop")
    with pytest.raises(InvitationError, match=word):
        invitation.read(spoil(line), "worker")  # type: ignore[operator]


def test_a_line_that_a_mail_program_broke_is_read(keys: Path) -> None:
    line = invited(keys, "desktop")
    broken = "\n ".join(line[at : at + 60] for at in range(0, len(line), 60))
    assert invitation.parse(broken) == invitation.parse(line)


def test_a_file_that_others_can_read_is_refused(keys: Path, tmp_path: Path) -> None:
    file = tmp_path / "line"
    file.write_text(invited(keys, "desktop"))
    file.chmod(0o644)
    with pytest.raises(InvitationError, match="chmod 600"):
        invitation.read(str(file), "worker")


def test_a_workers_line_is_refused_by_a_client(keys: Path) -> None:
    with pytest.raises(InvitationError, match="python -m worker --join takes it"):
        invitation.read(invited(keys, "desktop"), "client", "operator")


def test_the_worker_takes_address_and_keys_from_the_line(keys: Path) -> None:
    line = invited(keys, "desktop", "--address", "tcp://bus.example:443")
    config = worker_config.parse(["--engine", "echo", "--join", line], {})
    assert config.brokers == ("tcp://bus.example:443",)
    through = ["--engine", "echo", "--join", line, "--broker", "tcp://127.0.0.1:9443"]
    assert worker_config.parse(through, {}).brokers == ("tcp://127.0.0.1:9443",)
    by_variable = worker_config.parse(["--engine", "echo"], {"TOKENBUS_WORKER_JOIN": line})
    assert by_variable.join == config.join is not None
    with pytest.raises(worker_config.ConfigError, match="holds the keys"):
        worker_config.parse(["--join", line, "--key", "k", "--server-key", "s"], {})


def test_join_may_stand_before_the_command() -> None:
    assert _joined(["--join", "L", "models", "--json"]) == ["models", "--join", "L", "--json"]
    assert _joined(["--join", "L"]) == ["chat", "--join", "L"]
    assert _joined(["chat", "--join", "L"]) == ["chat", "--join", "L"]
