"""Two gateways of one bus that know each other: answers kept at one are available at the other."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from client.gateway.config import ConfigError, parse_args
from client.gateway.keys import add_key
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.gateway.test_reattach import answer_id, body, read, texts
from tests.harness import wait_until

MakeGateway = Callable[..., GatewayProcess]
QUICK = "[[echo mode=sampled answer_tokens=200]]x"
SLOW = "[[echo mode=sampled answer_tokens=200 step_delay_ms=20]]x"
ENDLESS = "[[echo mode=sampled answer_tokens=30000 step_delay_ms=20]]x"
CHAT = "/v1/chat/completions"


@pytest.fixture
def pair(make_gateway: MakeGateway) -> Iterator[tuple[GatewayProcess, GatewayProcess]]:
    """Two gateways; the second knows the first, and a third that is absent."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{taken.getsockname()[1]}"
        first = make_gateway("--keep-alive-s", "0.2")
        yield first, make_gateway("--peers", f"{away},{first.url}")


def test_a_background_response_is_read_on_elsewhere(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    here, there = (gateway.openai() for gateway in pair)
    with here, there:
        stream = here.responses.create(
            model=MODEL, input=SLOW, background=True, stream=True, extra_body={"seed": 5}
        )
        heard = []
        for event in stream:
            heard.append(event)
            if len(heard) == 15:
                break
        stream.close()
        id_, last = heard[0].response.id, heard[-1].sequence_number
        rest = list(there.responses.retrieve(id_, stream=True, starting_after=last))
        numbers = [event.sequence_number for event in heard + rest]
        assert numbers == list(range(len(numbers))) and rest[-1].type == "response.completed"
        said = "".join(e.delta for e in heard + rest if e.type == "response.output_text.delta")
        assert said == there.responses.retrieve(id_).output_text
        assert there.responses.input_items.list(id_).data[0].role == "user"
        # A follow-up stands on it, wherever it is asked.
        follow = there.responses.create(model=MODEL, input="and?", previous_response_id=id_)
        assert follow.output_text == "and?" and follow.previous_response_id == id_
        there.responses.delete(id_)
        with pytest.raises(openai.NotFoundError):
            here.responses.retrieve(id_)


def test_a_background_response_is_cancelled_elsewhere(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    here, there = (gateway.openai() for gateway in pair)
    with here, there:
        made = here.responses.create(model=MODEL, input=ENDLESS, background=True)
        wait_until(lambda: there.responses.retrieve(made.id).status == "in_progress", "a start")
        assert there.responses.cancel(made.id).status == "cancelled"
    wait_until(lambda: pair[0].bus.running() == 0, "a free slot")


def test_the_running_answer_of_a_chat_goes_on_elsewhere(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    asked = body(SLOW, seed=4)
    with pair[0].http() as here, pair[1].http() as there:
        whole = texts(read(here, json=body(QUICK, seed=4)), 1)
        heard = read(here, json=asked, headers={"x-reattach": "20"}, stop_after=20)
        last = {"last-event-id": heard[-1][0] or ""}
        rest = read(there, "GET", f"{CHAT}/{answer_id(heard)}", headers=last)
        assert texts(heard + rest, 1) == whole and rest[-1][1] == "[DONE]"
        # A reader that leaves there has left here too: the answer ends after its grace period.
        heard = read(here, json=body(ENDLESS), headers={"x-reattach": "3"}, stop_after=3)
        read(there, "GET", f"{CHAT}/{answer_id(heard)}", stop_after=5)
    wait_until(lambda: pair[0].bus.running() == 0, "a free slot")


def test_an_id_that_no_gateway_knows_is_a_single_404(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    with pair[1].http() as there:
        answer = there.get("/v1/responses/resp_none")
        assert answer.status_code == 404 and "resp_none" in answer.json()["error"]["message"]
        # An unknown model is no matter for the others.
        answer = there.post("/v1/responses", json={"model": "nope", "input": "x"})
        assert answer.json()["error"]["code"] == "model_not_found"


def test_gateways_do_not_ask_each_other_in_circles(make_gateway: MakeGateway) -> None:
    first = make_gateway()
    second = make_gateway("--peers", first.url)
    port = first.url.rpartition(":")[2]
    first.process.kill()
    again = make_gateway("--port", port, "--peers", f"{second.url},{first.url}")
    with again.http() as http:
        assert http.get("/v1/responses/resp_none").status_code == 404


def test_a_peer_checks_the_callers_own_key(make_gateway: MakeGateway, tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    alice, bob = add_key(file, "alice"), add_key(file, "bob")
    first = make_gateway("--keys", str(file))
    second = make_gateway("--keys", str(file), "--peers", first.url)
    with first.openai(api_key=alice) as here, second.openai(api_key=alice) as there:
        made = here.responses.create(model=MODEL, input="hello")
        assert there.responses.retrieve(made.id).output_text == "hello"
    with second.openai(api_key=bob) as other, pytest.raises(openai.NotFoundError):
        other.responses.retrieve(made.id)
    assert httpx.get(f"{second.url}/v1/responses/{made.id}").status_code == 401


def test_a_peer_that_breaks_off_ends_the_stream_there(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    first, second = pair
    with first.openai() as here, second.http() as there:
        # It is not cancelled: its gateway dies.
        some = "[[echo mode=sampled answer_tokens=200 step_delay_ms=20]]x"
        made = here.responses.create(model=MODEL, input=some, background=True)
        path = f"/v1/responses/{made.id}?stream=true"
        with there.stream("GET", path) as answer:
            lines = answer.iter_lines()
            while not next(lines).startswith("data: "):
                pass
            first.process.kill()
            told = []
            # Not as if it were complete: the reader must see that there is more.
            with pytest.raises(httpx.RemoteProtocolError):
                for line in lines:
                    if line.startswith("data: "):
                        told.append(json.loads(line[6:])["type"])
        assert "response.completed" not in told
        assert there.get(path).status_code == 404
    wait_until(lambda: first.bus.running() == 0, "a free slot")


def follow_up(id_: str, said: str = "and?") -> dict[str, object]:
    return {"model": MODEL, "input": said, "previous_response_id": id_}


def test_a_follow_up_takes_as_long_as_its_model_does(make_gateway: MakeGateway) -> None:
    first = make_gateway()
    # Much longer than what a silent stream may be.
    second = make_gateway("--peers", first.url, "--keep-alive-s", "0.2")
    with first.openai() as here, second.http() as there:
        made = here.responses.create(model=MODEL, input="hello")
        late = follow_up(made.id, "[[echo prefill_ms=3000]]late")
        answer = there.post("/v1/responses", json=late)
        assert answer.status_code == 200, answer.text
        assert answer.json()["output"][0]["content"][0]["text"] == "late"


def test_a_caller_who_hangs_up_ends_the_peers_work(make_gateway: MakeGateway) -> None:
    first = make_gateway()
    second = make_gateway("--peers", first.url, "--keep-alive-s", "600")
    with first.openai() as here:
        made = here.responses.create(model=MODEL, input="hello")
    body = json.dumps(follow_up(made.id, ENDLESS)).encode()
    head = f"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(second.url).port or 0)) as caller:
        caller.sendall(head.encode() + body)
        wait_until(lambda: first.bus.running() == 1, "the follow-up at the peer")
    wait_until(lambda: first.bus.running() == 0, "a free slot", timeout_s=60)


def test_a_peer_that_dies_while_it_answers_is_no_unknown_id(
    pair: tuple[GatewayProcess, GatewayProcess],
) -> None:
    first, second = pair
    with first.openai() as here, second.http() as there:
        made = here.responses.create(model=MODEL, input="hello")
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                there.post("/v1/responses", json=follow_up(made.id, ENDLESS))
            )
        )
        asking.start()
        wait_until(lambda: first.bus.running() == 1, "the follow-up at the peer")
        first.process.kill()
        asking.join()
        assert answers[0].status_code == 502 and answers[0].headers["x-should-retry"] == "true"
        assert answers[0].json()["error"]["code"] == "connection_lost"
    wait_until(lambda: first.bus.running() == 0, "a free slot")


def limited(keys: Path, limit: str) -> Path:
    """The same key under a limit, for another gateway."""
    made = keys.with_name(f"{limit.split()[0]}.toml")
    made.write_text(f"{keys.read_text()}{limit}\n")
    return made


def test_a_peer_that_refuses_does_not_end_the_search(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    keys, others = tmp_path / "keys.toml", tmp_path / "others.toml"
    alice = add_key(keys, "alice")
    add_key(others, "bob")
    first, refuses = make_gateway("--keys", str(keys)), make_gateway("--keys", str(others))
    peers = f"{refuses.url},{first.url}"
    second = make_gateway("--keys", str(keys), "--peers", peers)
    with first.openai(api_key=alice) as here, second.openai(api_key=alice) as there:
        made = here.responses.create(model=MODEL, input="hello")
        assert there.responses.retrieve(made.id).output_text == "hello"
        # It might have been there.
        with pytest.raises(openai.AuthenticationError):
            there.responses.retrieve("resp_none")
        first.process.kill()
        with pytest.raises(openai.AuthenticationError):
            there.responses.retrieve(made.id)


def test_a_request_counts_where_its_answer_is_kept(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    alice = add_key(keys, "alice")
    seldom = str(limited(keys, "rate_per_minute = 0.01"))
    first = make_gateway("--keys", str(keys))
    second = make_gateway("--keys", seldom, "--peers", first.url)
    with first.openai(api_key=alice) as here, second.openai(api_key=alice) as there:
        made = here.responses.create(model=MODEL, input="hello")
        for _ in range(2):
            there.responses.create(model=MODEL, input="and?", previous_response_id=made.id)
        with pytest.raises(openai.BadRequestError):
            there.responses.create(model=MODEL, input="and?", previous_response_id="resp_none")
        with pytest.raises(openai.RateLimitError):
            there.responses.create(model=MODEL, input="hello")
    # Nor does it count at a peer that does not keep it.
    third = make_gateway("--keys", seldom)
    fourth = make_gateway("--keys", str(keys), "--peers", third.url)
    with fourth.openai(api_key=alice) as other, third.openai(api_key=alice) as at:
        for _ in range(2):
            with pytest.raises(openai.BadRequestError):
                other.responses.create(model=MODEL, input="x", previous_response_id="resp_none")
        at.responses.create(model=MODEL, input="hello")


def test_a_gateway_that_asks_itself_does_not_refuse_itself(
    make_gateway: MakeGateway, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    alice = add_key(keys, "alice")
    first = make_gateway("--keys", str(keys))
    alone = str(limited(keys, "concurrency = 1"))
    second = make_gateway("--keys", alone)
    port = second.url.rpartition(":")[2]
    second.process.kill()
    peers = f"{second.url},{first.url}"
    again = make_gateway("--keys", alone, "--port", port, "--peers", peers)
    with first.openai(api_key=alice) as here, again.openai(api_key=alice) as there:
        made = here.responses.create(model=MODEL, input="hello")
        follow = there.responses.create(model=MODEL, input="and?", previous_response_id=made.id)
        assert follow.output_text == "and?"
        with pytest.raises(openai.BadRequestError):
            there.responses.create(model=MODEL, input="and?", previous_response_id="resp_none")


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a peer to which everybody can connect, and which never says anything."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_peer_that_is_silent_to_everything_is_given_up(
    make_gateway: MakeGateway, silent: str
) -> None:
    first = make_gateway()
    second = make_gateway("--peers", f"{silent},{first.url}", "--keep-alive-s", "0.2")
    with first.openai() as here, second.http() as there:
        made = here.responses.create(model=MODEL, input="hello")
        # The next one is asked all the same.
        assert there.post("/v1/responses", json=follow_up(made.id)).status_code == 200
        # That nobody has it is not known.
        answer = there.post("/v1/responses", json=follow_up("resp_none"))
        assert answer.status_code == 502 and "does not answer any more" in answer.text


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="this system does not show timers")
def test_the_system_looks_whether_a_silent_peers_host_is_there(
    make_gateway: MakeGateway, silent: str
) -> None:
    gateway = make_gateway("--peers", silent)
    port = httpx.URL(silent).port or 0

    def timers() -> set[str]:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return {row[5][:2] for row in rows if row[2].endswith(f":{port:04X}") and row[3] == "01"}

    asked = "GET /v1/responses/resp_none HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port or 0)) as caller:
        caller.sendall(asked.encode())
        keep_alive = "02"
        wait_until(lambda: timers() == {keep_alive}, "a connection that is watched")


@pytest.mark.parametrize("value", ["gateway:8000", "ftp://x", "http://x/path"])
def test_a_peer_with_a_malformed_address_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="--peers"):
        parse_args(["--peers", value], {})
