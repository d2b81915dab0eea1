"""Tokens by key, model and day: counted once, kept across restarts, shared by gateways, and held to
budgets; each caller sees its own."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from client.cli.usage import KEY_VARIABLE
from client.gateway.accounts import Accounts, AccountsError, next_month
from client.gateway.errors import GatewayError
from client.gateway.keys import Key, KeyFile, KeyFileError, add_key
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S, ROOT, wait_until

HELLO = [{"role": "user", "content": "hello"}]
#: "user: hello" and a new line; one token a character.
PROMPT, ANSWER = 12, 5
DAY = datetime.date(2030, 1, 31)


class World:
    """A clock, a day and a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.now_s, self.day = path, 0.0, DAY

    def accounts(self, **options: Any) -> Accounts:
        return Accounts(self.path, clock=lambda: self.now_s, day=lambda: self.day, **options)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "usage.db")


# --- the file -------------------------------------------------------------------------------------


def test_what_several_gateways_count_adds_up_and_is_kept(world: World) -> None:
    async def work() -> list[dict[str, Any]]:
        first, second = world.accounts(), world.accounts()
        for accounts in (first, second, first):
            accounts.count("alice", "m", 10, 5)
        first.count("alice", "n", 1, 1)
        second.count("bob", "m", 100, 100)
        await first.write()
        assert await second.used("alice") == (47, 47)
        await first.close()
        await second.close()
        third = world.accounts()
        rows = await third.rows("alice", DAY)
        assert len(await third.rows(None, DAY)) == 3
        await third.close()
        return rows

    m, n = asyncio.run(work())
    assert m == {
        **{"key": "alice", "day": "2030-01-31", "model": "m", "requests": 3},
        **{"prompt_tokens": 30, "completion_tokens": 15},
    }
    assert (n["model"], n["requests"]) == ("n", 1)


def test_a_budget_counts_this_day_and_this_month_and_begins_again(world: World) -> None:
    async def work() -> None:
        accounts = world.accounts()
        by_day = Key("alice", tokens_per_day=100)
        by_month = Key("alice", tokens_per_month=150)
        both = Key("alice", tokens_per_day=100, tokens_per_month=150)
        for key in (by_day, by_month, Key("alice")):
            await accounts.admit(key)
        accounts.count("alice", "m", 60, 39)
        await accounts.admit(by_day)
        accounts.count("alice", "m", 0, 1)
        with pytest.raises(GatewayError) as caught:
            await accounts.admit(by_day)
        error = caught.value
        assert (error.status, error.openai_code) == (429, "insufficient_quota")
        assert "used 100 tokens of its 100 for this day" in error.info.message
        assert error.info.details["resets_at"] == "2030-02-01T00:00:00Z"
        await accounts.admit(by_month)
        await accounts.admit(Key("bob", tokens_per_day=1))
        accounts.count("alice", "m", 50, 0)
        with pytest.raises(GatewayError, match="for this month"):
            await accounts.admit(both)
        world.day = datetime.date(2030, 2, 1)
        await accounts.admit(both)
        accounts.count("alice", "m", 90, 0)
        world.day = datetime.date(2030, 2, 2)
        await accounts.admit(by_day)
        accounts.count("alice", "m", 60, 0)
        with pytest.raises(GatewayError, match="for this month"):
            await accounts.admit(by_month)
        await accounts.close()

    asyncio.run(work())


def test_what_another_gateway_counted_holds_within_a_second(world: World) -> None:
    async def work() -> None:
        here, there = world.accounts(), world.accounts()
        key = Key("alice", tokens_per_day=10)
        await here.admit(key)
        there.count("alice", "m", 10, 0)
        await there.write()
        world.now_s += 1
        with pytest.raises(GatewayError):
            await here.admit(key)
        await here.close()
        await there.close()

    asyncio.run(work())


def test_a_file_that_is_busy_loses_nothing_and_counts_nothing_twice(world: World) -> None:
    async def work() -> None:
        accounts = world.accounts(busy_s=0.01)
        other = sqlite3.connect(world.path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        accounts.count("alice", "m", 1, 2)
        await accounts.write()
        accounts.count("alice", "m", 10, 20)
        with pytest.raises(GatewayError) as caught:
            await accounts.admit(Key("alice", tokens_per_day=10))
        assert caught.value.info.code == "overloaded" and caught.value.info.retryable
        other.execute("COMMIT")
        for _ in range(2):
            await accounts.write()
        [row] = await accounts.rows("alice", DAY)
        assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (2, 11, 22)
        assert await accounts.used("alice") == (33, 33)
        await accounts.close()
        other.close()

    asyncio.run(work())


def test_what_is_counted_during_a_write_is_counted(world: World) -> None:
    async def work() -> None:
        accounts = world.accounts()
        for _ in range(20):
            accounts.count("alice", "m", 1, 0)
            writing = asyncio.create_task(accounts.write())
            await asyncio.sleep(0)
            accounts.count("alice", "m", 1, 0)
            await writing
            world.now_s += 1
            await accounts.used("alice")
        assert await accounts.used("alice") == (40, 40)
        await accounts.close()
        again = world.accounts()
        assert await again.used("alice") == (40, 40)
        again.shut()

    asyncio.run(work())


def test_a_path_that_is_not_a_usage_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no database" * 100)
    for path in (tmp_path / "text", tmp_path / "no" / "such" / "folder"):
        with pytest.raises(AccountsError, match=path.name):
            Accounts(path)


def test_the_month_after() -> None:
    for day, after in ((DAY, "2030-02-01"), (datetime.date(2031, 12, 1), "2032-01-01")):
        assert next_month(day).isoformat() == after


def test_a_budget_needs_a_file_to_count_in(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, "alice", tokens_per_day=10, tokens_per_month=20)
    [key] = KeyFile(path)
    assert (key.tokens_per_day, key.tokens_per_month, key.has_budget) == (10, 20, True)
    with pytest.raises(KeyFileError, match="--usage FILE"):
        KeyFile(path, counted=False)
    path.write_text(path.read_text().replace("= 10", "= 0"))
    with pytest.raises(KeyFileError, match="tokens_per_day must be above 0"):
        KeyFile(path)


# --- through the gateway --------------------------------------------------------------------------


class Place:
    """A key file with a usage file, and gateways over them."""

    def __init__(self, folder: Path, make: Callable[..., GatewayProcess]) -> None:
        self.folder, self._make = folder, make
        self.keys = {
            "alice": add_key(folder / "keys.toml", "alice"),
            "bob": add_key(folder / "keys.toml", "bob", tokens_per_day=30),
            "root": add_key(folder / "keys.toml", "root", operator=True),
        }

    def gateway(self) -> GatewayProcess:
        return self._make(
            *("--keys", str(self.folder / "keys.toml")),
            *("--usage", str(self.folder / "usage.db")),
        )

    def http(self, gateway: GatewayProcess, name: str) -> httpx.Client:
        return gateway.http(headers={"authorization": f"Bearer {self.keys[name]}"})

    def totals(self, gateway: GatewayProcess, name: str, requests: int) -> tuple[int, int]:
        """Tokens in and out once so many requests are counted."""

        def counted() -> Any:
            with self.http(gateway, name) as http:
                totals = http.get("/v1/usage").json()["totals"]
            return totals if totals["requests"] >= requests else None

        totals = wait_until(counted, f"{requests} requests counted", story=gateway.process.log)
        assert totals["requests"] == requests
        return totals["prompt_tokens"], totals["completion_tokens"]


@pytest.fixture
def place(tmp_path: Path, make_gateway: Callable[..., GatewayProcess]) -> Iterator[Place]:
    yield Place(tmp_path, make_gateway)


def test_every_door_counts_each_token_once(place: Place) -> None:
    gateway = place.gateway()
    hello = {"model": MODEL, "messages": HELLO}
    asked: list[tuple[str, dict[str, Any], int, int]] = [
        ("/v1/chat/completions", hello, PROMPT, ANSWER),
        ("/v1/chat/completions", {**hello, "stream": True}, PROMPT, ANSWER),
        ("/v1/chat/completions", {**hello, "n": 3}, PROMPT, 3 * ANSWER),
        ("/v1/completions", {"model": MODEL, "prompt": ["hello", "there you"]}, 14, 14),
        ("/v1/responses", {"model": MODEL, "input": "hello"}, PROMPT, ANSWER),
        ("/v1/messages", {**hello, "max_tokens": 50}, PROMPT, ANSWER),
        ("/api/chat", hello, PROMPT, ANSWER),
        ("/v1/embeddings", {"model": MODEL, "input": ["hello", "you"]}, 8, 0),
        ("/v1/rerank", {"model": MODEL, "query": "ab", "documents": ["abc", "d"]}, 8, 0),
    ]
    free: list[tuple[str, dict[str, Any]]] = [
        ("/tokenize", {"model": MODEL, "prompt": "hello"}),
        ("/detokenize", {"model": MODEL, "tokens": [104, 105]}),
        ("/apply-template", hello),
        ("/v1/responses/input_tokens", {"model": MODEL, "input": "hello"}),
        ("/v1/messages/count_tokens", hello),
    ]
    wanted = (0, 0)
    with place.http(gateway, "alice") as http:
        for requests, (path, body, prompt, completion) in enumerate(asked, 1):
            answer = http.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
            wanted = (wanted[0] + prompt, wanted[1] + completion)
            assert place.totals(gateway, "alice", requests) == wanted, path
        for path, body in free:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, (path, answer.text)
        assert http.post("/v1/chat/completions", json={**hello, "model": "no"}).status_code == 404
    assert place.totals(gateway, "alice", len(asked)) == wanted
    assert place.totals(gateway, "bob", 0) == (0, 0)


def test_a_reader_that_leaves_has_used_what_was_made(place: Place) -> None:
    gateway = place.gateway()
    text = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], "stream": True}
    path = "/v1/chat/completions"
    with (
        place.http(gateway, "alice") as http,
        http.stream("POST", path, json=body, timeout=PATIENCE_S) as answer,
    ):
        lines = answer.iter_lines()
        for _ in range(40):
            next(lines)
    prompt, completion = place.totals(gateway, "alice", 1)
    assert prompt == len("user: x\n") and completion >= 5


def test_counts_outlive_a_gateway_and_are_shared(place: Place) -> None:
    first, second = place.gateway(), place.gateway()
    for gateway in (first, second):
        with place.http(gateway, "alice") as http:
            http.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO})
        place.totals(gateway, "alice", 1 if gateway is first else 2)
    first.process.terminate()
    second.process.terminate()
    third = place.gateway()
    assert place.totals(third, "alice", 2) == (2 * PROMPT, 2 * ANSWER)


def test_a_spent_budget_is_refused_in_each_doors_words(place: Place) -> None:
    gateway = place.gateway()
    with place.http(gateway, "bob") as http:
        body = {"model": MODEL, "messages": HELLO}
        for _ in range(2):  # a request that begins within the budget is finished
            assert http.post("/v1/chat/completions", json=body).status_code == 200
        place.totals(gateway, "bob", 2)
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 429 and answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        assert "used 34 tokens of its 30" in http.post("/api/chat", json=body).json()["error"]
        own = http.get("/me").json()
        assert own["name"] == "bob" and own["operator"] is False
        assert own["tokens"]["day"]["used"] == 34 and own["tokens"]["day"]["left"] == 0
        assert own["tokens"]["month"]["budget"] is None
    options: Any = {"api_key": place.keys["bob"], "max_retries": 2}
    with gateway.openai(**options) as sdk, pytest.raises(openai.RateLimitError) as caught:
        sdk.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "insufficient_quota"
    with place.http(gateway, "alice") as http:
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_who_may_see_whose_usage(place: Place) -> None:
    gateway = place.gateway()
    with place.http(gateway, "alice") as http:
        http.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO})
        place.totals(gateway, "alice", 1)
        for key in ("bob", "*"):
            assert http.get("/v1/usage", params={"key": key}).status_code == 403
        assert http.get("/v1/usage", params={"key": "alice"}).status_code == 200
        for query in ({"days": "0"}, {"days": "x"}, {"since": "1"}):
            assert http.get("/v1/usage", params=query).status_code == 400
    with place.http(gateway, "root") as http:
        rows = http.get("/v1/usage", params={"key": "*", "days": 1}).json()["data"]
    [row] = rows
    assert (row["key"], row["model"], row["prompt_tokens"]) == ("alice", MODEL, PROMPT)


def test_a_gateway_that_does_not_count_says_so(http: httpx.Client) -> None:
    answer = http.get("/v1/usage")
    assert answer.status_code == 404 and "--usage FILE" in answer.json()["error"]["message"]
    assert http.get("/me").json()["tokens"] is None


def test_the_command_prints_what_was_used_and_what_is_left(place: Place) -> None:
    gateway = place.gateway()
    with place.http(gateway, "bob") as http:
        http.post("/v1/chat/completions", json={"model": MODEL, "messages": HELLO})
    place.totals(gateway, "bob", 1)

    def run(*arguments: str, key: str = "bob") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "client", "usage", "--gateway", gateway.url, *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=PATIENCE_S,
            env={**os.environ, KEY_VARIABLE: place.keys[key], "NO_PROXY": "127.0.0.1"},
        )

    told = run()
    assert told.returncode == 0, told.stderr
    assert "1 requests, 12 tokens in, 5 out" in told.stdout
    assert "this day: 17 of 30 tokens; 13 left" in told.stdout
    [row] = map(json.loads, run("--json").stdout.splitlines())
    assert (row["key"], row["completion_tokens"]) == ("bob", 5)
    assert "bob" in run("--of", "*", key="root").stdout
    refused = run("--of", "*")
    assert refused.returncode == 2 and "not an operator" in refused.stderr
