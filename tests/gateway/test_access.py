"""Access control: keys and their limits, CORS, hosts, health, metrics, start-up."""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest

from broker.protocol.refusals import WrongKeys
from client import Unauthenticated
from client.gateway import refusals
from client.gateway.__main__ import main
from client.gateway.config import Config, ConfigError, parse_args
from client.gateway.keys import add_key
from client.gateway.metrics import Metrics
from client.gateway.watch import watch_broker
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S, ROOT, Bus, wait_until

TODAY = datetime.date(2030, 1, 1)
HELLO = [{"role": "user", "content": "hello"}]


def slow(seconds: float) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"[[echo prefill_ms={int(seconds * 1000)}]]late"}]


# --- a gateway with keys --------------------------------------------------------------------------


def test_every_path_but_the_public_ones_needs_a_key(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice", concurrency=1)
    narrow = add_key(path, "bob", models=["other"])
    boss = add_key(path, "boss", operator=True, rate_per_minute=1)
    gateway = make_gateway("--keys", str(path))
    with gateway.http() as http:
        for open_path in ("/health", "/ready", "/", "/page/app.js"):
            assert http.get(open_path).status_code == 200, open_path
        for method, closed in (
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/bus/overview"),
            ("POST", "/bus/drain"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/responses"),
            ("POST", "/list_models"),
            ("POST", "/worker_generate_stream"),
            ("POST", "/worker_get_status"),
        ):
            answer = http.request(method, closed)
            assert answer.status_code == 401, closed
            assert answer.json()["error"]["code"] == "invalid_api_key"
        bearer = {"authorization": f"Bearer {key}"}
        assert http.get("/bus/overview", headers=bearer).status_code == 403
        assert http.post("/bus/drain", headers=bearer, json={"worker": "w"}).status_code == 403
        # A program that knows only an address.
        assert http.post("/list_models", auth=("any", key)).json() == {"models": [MODEL]}
        owner = http.post("/get_worker_address", auth=("any", key), json={"model": MODEL})
        assert f"any:{key}@" in owner.json()["address"]
    with pytest.raises(openai.AuthenticationError):
        gateway.openai(api_key="wrong").models.list()
    with pytest.raises(openai.PermissionDeniedError, match="bob"):
        gateway.openai(api_key=narrow).chat.completions.create(model=MODEL, messages=HELLO)
    assert gateway.openai(api_key=narrow).models.list().data == []
    with pytest.raises(openai.PermissionDeniedError, match="priority"):
        gateway.openai(api_key=key).chat.completions.create(
            model=MODEL, messages=HELLO, service_tier="priority"
        )
    # One at once.
    client = gateway.openai(api_key=key)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "[[echo step_delay_ms=10]]x"}],
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.response.headers["x-should-retry"] == "true"
    stream.close()
    wait_until(lambda: gateway.bus.running() == 0, "a free slot")
    assert client.chat.completions.create(model=MODEL, messages=HELLO)
    # One a minute.
    boss_client = gateway.openai(api_key=boss)
    boss_client.chat.completions.create(model=MODEL, messages=HELLO)
    with pytest.raises(openai.RateLimitError, match="per minute"):
        boss_client.chat.completions.create(model=MODEL, messages=HELLO)
    # A response belongs to the key that made it.
    made = client.responses.create(model=MODEL, input="mine")
    with pytest.raises(openai.NotFoundError):
        boss_client.responses.retrieve(made.id)


def test_an_answer_in_the_background_counts_until_it_is_over(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice", concurrency=1)
    client = make_gateway("--keys", str(path)).openai(api_key=key)
    made = client.responses.create(
        model=MODEL,
        input="[[echo mode=sampled answer_tokens=900 step_delay_ms=20]]x",
        background=True,
    )
    with pytest.raises(openai.RateLimitError):
        client.responses.create(model=MODEL, input="x")
    client.responses.cancel(made.id)
    assert client.responses.create(model=MODEL, input="x").output_text == "x"
    scrape = httpx.get(
        f"{str(client.base_url).removesuffix('v1/')}metrics",
        headers={"authorization": f"Bearer {key}"},
    )
    assert 'kind="prompt",model="echo"' in scrape.text


def test_a_service_tier_above_the_keys_priority_is_refused_wherever_it_is_taken(
    tmp_path: Path, make_gateway: Callable[..., GatewayProcess]
) -> None:
    path = tmp_path / "keys.toml"
    key = add_key(path, "alice")
    chat = [{"role": "user", "content": "x"}]
    bodies: dict[str, Any] = {
        "/v1/chat/completions": {"messages": chat},
        "/v1/chat/completions/batch": {"messages": [chat]},
        "/v1/responses": {"input": "x"},
        "/v1/responses/compact": {"input": "x"},
    }
    with make_gateway("--keys", str(path)).http(headers={"authorization": f"Bearer {key}"}) as http:
        for where, body in bodies.items():
            for tier, status in (("default", 200), ("priority", 403)):
                asked = {"model": MODEL, "service_tier": tier, **body}
                assert http.post(where, json=asked).status_code == status, (where, tier)


def test_the_command_line_manages_keys(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "client.gateway", "keys", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    file = ("--file", str(tmp_path / "k.toml"))
    made = run("add", "alice", "--concurrency", "2", *file)
    assert made.stdout.startswith("tb-") and len(made.stdout.strip()) == 46
    assert run("list", *file).stdout == "alice 2 at once\n"
    assert run("add", "a b", *file).returncode == 2


# --- around every answer --------------------------------------------------------------------------


def test_health_and_readiness(http: httpx.Client) -> None:
    assert http.get("/health").text == "ok"
    assert http.get("/ready").json() == {"ready": True, "models": 1, "serving": 1}


def test_a_gateway_without_a_broker_lives_but_is_not_ready(
    make_gateway: Callable[..., GatewayProcess],
) -> None:
    gateway = make_gateway("--broker", "tcp://127.0.0.1:9")
    with gateway.http() as http:
        answer = http.get("/ready")
        assert answer.status_code == 503 and answer.json()["ready"] is False


def test_an_absent_broker_is_logged_once_with_its_cause_and_once_when_it_is_back(
    make_bus: Callable[..., Bus], make_gateway: Callable[..., GatewayProcess]
) -> None:
    own = make_bus(workers=1)
    own.broker.kill()
    gateway = make_gateway(bus=own)
    wait_until(lambda: "broker away" in gateway.process.log(), "the warning")
    lines = gateway.process.log().splitlines()
    [away] = [json.loads(line) for line in lines if "broker away" in line]
    assert away["level"] == "warning"
    assert own.front in away["cause"] and "no broker answered" in away["cause"]
    with gateway.http() as http:
        asked = {"x-request-id": "asked"}
        failed = http.get("/v1/models", headers=asked)
        assert failed.status_code == 502
        assert gateway.logged("asked", status=502)["level"] == "warning"
        assert "tokenbus_gateway_broker_up 0.0" in http.get("/metrics?scope=gateway").text
    own.start_broker()
    wait_until(lambda: "answers again" in gateway.process.log(), "the broker's return")
    assert gateway.process.log().count("broker away") == 1


def test_a_broker_that_refuses_the_gateways_key_is_logged_as_final(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refused:
        async def query(self, *args: object, **options: object) -> None:
            raise Unauthenticated("the key is not on the list of tcp://bus:5555")

    with caplog.at_level("INFO"):
        asyncio.run(watch_broker(Refused(), Metrics()))
    [told] = caplog.records
    assert told.levelname == "ERROR"
    assert "not on the list of tcp://bus:5555" in told.fields["cause"]


def test_the_refusal_of_a_wrong_key_is_delayed_and_no_other_request_is(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    right = add_key(tmp_path / "keys.toml", "alice")
    gateway = make_gateway("--keys", str(tmp_path / "keys.toml"))

    def asks(key: str) -> httpx.Response:
        with gateway.http() as http:
            return http.get("/v1/models", headers={"authorization": f"Bearer {key}"})

    def overtaken() -> bool:
        with ThreadPoolExecutor() as threads:
            wrong = threads.submit(asks, "wrong")
            answers = [asks(right) for _ in range(3)]
            waited = not wrong.done()
            assert [answer.status_code for answer in answers] == [200] * 3
            assert wrong.result().status_code == 401
        return waited

    wait_until(overtaken, "a wrong key that waits")


def test_delayed_refusals_are_independent_and_limited_in_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(WrongKeys, "wait_s", lambda *_: 3600.0)
    monkeypatch.setattr(refusals, "MAX_WAITING", 2)

    async def ask() -> None:
        waiting = refusals.Refusals()
        first, second, third = (
            asyncio.create_task(waiting.wait(f"10.0.0.{number}")) for number in range(3)
        )
        await first  # the earliest, as there are three
        second.cancel()  # its caller has gone
        fourth = asyncio.create_task(waiting.wait("10.0.0.4"))
        await asyncio.wait((second, third, fourth), timeout=0)
        assert second.done() and not third.done() and not fourth.done()
        fifth = asyncio.create_task(waiting.wait("10.0.0.5"))
        await third
        for task in (fourth, fifth):
            task.cancel()
        await asyncio.gather(fourth, fifth, return_exceptions=True)

    asyncio.run(ask())


@pytest.mark.parametrize("field", ["worker", "reason"])
def test_an_invalid_drain_deadline_is_refused_by_the_gateway_and_not_by_the_broker(
    http: httpx.Client, field: str
) -> None:
    body = {"worker": "nobody", field: "x" * 100_000}
    answer = http.post("/bus/drain", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == field


def test_a_stop_lets_running_answers_end(make_gateway: Callable[..., GatewayProcess]) -> None:
    gateway = make_gateway("--shutdown-s", "20")
    with gateway.openai() as client:
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "[[echo step_delay_ms=20]]a last word or two"}],
            stream=True,
        )
        chunks = iter(stream)
        text = next(chunks).choices[0].delta.content or ""
        gateway.process.popen.terminate()
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "a last word or two"
    assert gateway.process.popen.wait(PATIENCE_S) == 0


def test_every_answer_carries_a_request_id(http: httpx.Client) -> None:
    assert re.fullmatch("req-[0-9a-f]{24}", http.get("/v1/models").headers["x-request-id"])
    answer = http.post("/v1/chat/completions", headers={"x-request-id": "mine"}, json={})
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["request_id"] == "mine"
    stream = http.post(
        "/v1/chat/completions", json={"model": MODEL, "messages": HELLO, "stream": True}
    )
    assert stream.headers["x-request-id"].startswith("req-")


def test_the_buss_own_ids_lead_from_an_answer_to_the_brokers_log(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    body = {"model": MODEL, "messages": HELLO, "n": 2}
    broker = gateway.bus.broker
    assert broker is not None
    for stream in (False, True):
        answer = http.post("/v1/chat/completions", json={**body, "stream": stream})
        ids = answer.headers["x-bus-requests"].split(",")
        assert len(ids) == 2
        for id_ in ids:
            wait_until(lambda id_=id_: id_ in broker.log(), "the id in the broker's log")
        both = answer.headers["x-bus-requests"]
        wait_until(lambda both=both: both in gateway.process.log(), "the ids in the gateway's log")


def test_a_404_has_the_same_shape_as_other_errors(http: httpx.Client) -> None:
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert http.put("/v1/chat/completions").status_code == 405
    text = http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert text.status_code == 400
    broken = http.post(
        "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and "JSON" in broken.json()["error"]["message"]


def test_a_body_without_a_media_type_is_json_unless_a_browser_sent_it(http: httpx.Client) -> None:
    """`curl -d` names a form; a page of another origin could send that without asking first."""
    body = b'{"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert http.post("/v1/chat/completions", content=body, headers=form).status_code == 200
    assert http.post("/v1/chat/completions", content=body).status_code == 200
    for header in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        refused = http.post("/v1/chat/completions", content=body, headers=form | header)
        assert (
            refused.status_code == 400 and "application/json" in refused.json()["error"]["message"]
        )


def test_a_foreign_name_of_this_machine_is_refused(http: httpx.Client) -> None:
    assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 400


def test_pages_of_other_origins_and_large_bodies_only_where_allowed(
    http: httpx.Client, make_gateway: Callable[..., GatewayProcess]
) -> None:
    ask = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    assert "access-control-allow-origin" not in http.get("/v1/models", headers=ask).headers
    gateway = make_gateway("--cors-origins", "https://app.example", "--body-bytes", "1000")
    with gateway.http() as allowed:
        answer = allowed.options("/v1/chat/completions", headers=ask)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        other = allowed.get("/v1/models", headers={"origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers
    with pytest.raises(openai.APIStatusError) as caught:
        gateway.openai().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * 2000}]
        )
    assert caught.value.status_code == 413 and caught.value.code == "too_large"


def test_metrics_are_in_prometheus_format(client: openai.OpenAI, http: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    client.chat.completions.create(model=MODEL, messages=HELLO)
    families = {
        family.name: family for family in text_string_to_metric_families(http.get("/metrics").text)
    }
    counted = {
        (sample.labels["endpoint"], sample.labels["status"]): sample.value
        for sample in families["tokenbus_gateway_requests"].samples
        if sample.name.endswith("_total")
    }
    assert counted["/v1/chat/completions", "200"] >= 1
    assert families["tokenbus_gateway_first_token_seconds"].type == "histogram"
    assert any(s.labels["kind"] == "prompt" for s in families["tokenbus_gateway_tokens"].samples)


def test_endpoint_labels_never_contain_what_clients_write(http: httpx.Client) -> None:
    http.get("/v1/models/some-name-that-nobody-serves")
    http.get("/v1/responses/resp_made_up")
    text = http.get("/metrics").text
    assert "nobody-serves" not in text and "made_up" not in text


# --- options --------------------------------------------------------------------------------------


def test_flags_win_over_the_environment() -> None:
    environment = {"TOKENBUS_GATEWAY_PORT": "9000", "TOKENBUS_GATEWAY_INSECURE": "yes"}
    config = parse_args(["--port", "9001", "--broker", "tcp://x:1, tcp://y:2"], environment)
    assert (config.port, config.insecure) == (9001, True)
    assert config.broker == ("tcp://x:1", "tcp://y:2")
    assert parse_args([], {}) == Config()
    aliases = parse_args(["--alias", "a=x", "--alias", "b=y, c*=z"], {})
    assert aliases.alias == (("a", "x"), ("b", "y"), ("c*", "z"))
    assert [aliases.served_name(name) for name in ("a", "cat", "d")] == ["x", "z", "d"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--keys"),
        (["--tls-cert", "a"], "--tls-key"),
        (["--port", "70000"], "--port"),
        (["--port", "x"], "--port: must be an integer, got 'x'"),
        (["--shutdown-s", "x"], "--shutdown-s: must be a number, got 'x'"),
        (["--broker", "foo"], "write tcp://HOST:PORT"),
        (["--image-networks", "10.0.0.0/99"], "--image-networks"),
        (["--batch-concurrency", "3000000000"], "--batch-concurrency: must be 2147483647 or less"),
        (["--alias", "a=" + "x" * 257], "--alias: a name has 1 to 256 bytes"),
    ],
)
def test_an_unsafe_or_impossible_option_is_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_args(arguments, {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--server-key", "short"], "40 characters of Z85"),
        (["--server-key", "x" * 40, "--key-file", "nowhere.key_secret"], "does not exist"),
    ],
)
def test_a_key_that_cannot_be_read_ends_the_gateway_before_it_serves(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--port", "0", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_tls_is_served_with_a_certificate_also_on_ipv6(
    make_gateway: Callable[..., GatewayProcess], tmp_path: Path
) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost "
        f"-keyout {key} -out {cert}",
        shell=True,
        check=True,
        capture_output=True,
    )
    gateway = make_gateway("--host", "::1", "--tls-cert", str(cert), "--tls-key", str(key))
    assert gateway.url.startswith("https://[::1]:")
    with gateway.http(verify=False) as http:
        address = http.post("/get_worker_address", json={"model": MODEL}).json()
        assert address == {"address": gateway.url}


def test_a_stream_whose_reader_left_is_logged_as_cancelled(
    gateway: GatewayProcess, http: httpx.Client
) -> None:
    body = {"model": MODEL, "messages": slow(30.0), "stream": True}
    headers = {"x-request-id": "gone-in-between"}
    with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
        next(answer.iter_lines())
    assert gateway.logged("gone-in-between", status=499)["code"] == "cancelled"
    assert gateway.process.log().count("gone-in-between") == 1
