"""The key file: what is written, read again when it changes, and refused."""

from __future__ import annotations

import datetime
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from broker.protocol.errors import ErrorCode
from client.gateway.errors import GatewayError
from client.gateway.keys import Key, KeyFile, KeyFileError, Usage, add_key, remove_key
from tests.gateway.conftest import GatewayProcess
from tests.harness import wait_until

TODAY = datetime.date(2030, 1, 1)
HELLO = [{"role": "user", "content": "hello"}]


def test_a_key_is_shown_once_and_kept_as_a_hash(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice", rate_per_minute=60, models=['a"b'])
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = KeyFile(path).find(key, TODAY)
    assert (found.name, found.rate_per_minute, found.models) == ("alice", 60, frozenset({'a"b'}))
    with pytest.raises(KeyFileError, match="already"):
        add_key(path, "alice")
    with pytest.raises(KeyFileError, match="does not exist; make keys"):
        KeyFile(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    "limit",
    [
        *({"concurrency": 0}, {"rate_per_minute": 0}, {"rate_per_minute": float("nan")}),
        *({"tokens_per_day": -1}, {"tokens_per_month": 0}),
    ],
)
def test_a_limit_that_the_file_may_not_have_is_not_written(
    tmp_path: Path, limit: dict[str, Any]
) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "alice")
    before = path.read_text()
    with pytest.raises(KeyFileError, match=f"{next(iter(limit))} must be above 0"):
        add_key(path, "bob", **limit)
    assert path.read_text() == before


def test_changes_at_once_are_all_made(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    for number in range(8):
        add_key(path, f"old{number}")

    def change(number: int) -> str:
        key = add_key(path, f"new{number}")
        remove_key(path, f"old{number}")
        return key

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(change, range(8)))
    keys = KeyFile(path)
    assert {key.name for key in keys} == {f"new{number}" for number in range(8)}
    for number, key in enumerate(made):
        assert keys.find(key, TODAY).name == f"new{number}"


@pytest.mark.parametrize("obstacle", ["keys.toml", ".keys.toml.lock", ".keys.toml.PID"])
def test_a_key_file_that_cannot_be_written_is_one_line(tmp_path: Path, obstacle: str) -> None:
    path = tmp_path / "keys.toml"
    obstacle = obstacle.replace("PID", str(os.getpid()))
    if obstacle != path.name:
        add_key(path, "alice")
    (tmp_path / obstacle).unlink(missing_ok=True)
    (tmp_path / obstacle).mkdir()
    for change in (add_key, remove_key):
        with pytest.raises(KeyFileError, match=r"keys\.toml: Is a directory$"):
            change(path, "bob" if change is add_key else "alice")
    with pytest.raises(KeyFileError, match="No such file"):
        remove_key(tmp_path / "nowhere.toml", "alice")
    assert not (tmp_path / ".nowhere.toml.lock").exists()


def test_a_changed_key_file_applies_from_the_next_request(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    alice, bob = add_key(path, "alice"), add_key(path, "bob")
    keys = KeyFile(path)
    remove_key(path, "alice")
    assert keys.find(bob, TODAY).name == "bob"
    with pytest.raises(GatewayError) as caught:
        keys.find(alice, TODAY)
    assert caught.value.status == 401
    # A broken edit changes nothing.
    path.write_text("[keys.bob]\nhash = 3\n")
    assert keys.find(bob, TODAY).name == "bob"
    assert "hash" in keys.problem


def test_a_key_file_that_breaks_is_logged_once_for_each_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tokenbus.gateway")
    path = tmp_path / "keys.toml"
    bob = add_key(path, "bob")
    good = path.read_text()
    keys = KeyFile(path)

    def logged() -> list[str]:
        for _ in range(3):
            assert keys.find(bob, TODAY).name == "bob"
        told = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return told

    assert logged() == []
    path.write_text("[keys.bob]\nhash = 3\n")
    [line] = logged()
    assert "hash has a wrong type" in line and "the previous keys stay valid" in line
    path.write_text('[keys."a\\n2030 forged"]\n')
    [line] = logged()
    assert "forged" in line and "\n" not in line
    path.unlink()
    [line] = logged()
    assert "does not exist" in line
    path.write_text(good)
    [line] = logged()
    assert "can be used again" in line
    # A path without a file: checked each time, logged once.
    path.unlink()
    path.mkdir()
    [line] = logged()
    assert "directory" in line
    path.rmdir()
    path.write_text(good)
    [line] = logged()
    assert "can be used again" in line and keys.problem == ""


def test_a_key_file_that_breaks_is_shown_in_metrics_and_to_operators(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    boss = {"authorization": f"Bearer {add_key(path, 'boss', operator=True)}"}
    gateway = make_gateway("--keys", str(path))
    with gateway.http(headers=boss) as http:

        def shown() -> tuple[str, str]:
            figures = http.get("/metrics", params={"scope": "gateway"}).text
            found = re.search(r"^tokenbus_gateway_key_file_broken (\S+)$", figures, re.M)
            assert found is not None
            problem = http.get("/bus/overview").json()["gateway"]["key_file_problem"]
            return found[1], problem

        assert shown() == ("0.0", "")
        good = path.read_text()
        path.write_text("nonsense")
        wait_until(lambda: str(path) in shown()[1], "the problem in the operator's view")
        assert shown()[0] == "1.0"
        path.write_text(good)
        wait_until(lambda: shown() == ("0.0", ""), "the figures of a good file")
    log = gateway.process.log()
    assert log.count("the key file cannot be used") == 1
    assert log.count("can be used again") == 1


def test_an_expired_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice")
    path.write_text(path.read_text() + "expires = 2029-12-31\n")
    with pytest.raises(GatewayError, match="expired"):
        KeyFile(path).find(key, TODAY)


@pytest.mark.parametrize(
    "text", ["x = 1", "[keys.a]\n", "[keys.a]\nhash='md5:00'", "[keys.a]\nfoo=1", "[", "keys=3"]
)
def test_a_broken_key_file_is_an_error_at_the_start(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(KeyFileError, match="keys"):
        KeyFile(path)


def test_the_rate_of_a_key_refills_with_time() -> None:
    key, usage = Key("k", rate_per_minute=2), Usage()
    for _ in range(2):
        usage.admit(key, 100.0)
        usage.finished()
    with pytest.raises(GatewayError) as caught:
        usage.admit(key, 100.0)
    assert caught.value.info.code == ErrorCode.QUOTA
    assert caught.value.info.retry_after_ms == 30_000
    usage.admit(key, 130.0)
    assert usage.running == 1
