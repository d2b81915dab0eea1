"""Users of a model get equal shares of tokens, not of requests: in virtual time, with answers and
prompts of unlike length, streams that move, and users that come and go."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from broker.core.queue import ModelQueue
from broker.core.records import RequestState
from broker.core.shares import MAX_USERS, Shares
from broker.protocol.header import MessageType
from broker.protocol.messages import (
    Params,
    WorkerState,
)
from tests.core.broker_facts import Bus, ClientPeer, Message, WorkerPeer

TOKEN_S = 0.01
PATIENT: dict[str, Any] = {"client_liveness": 1000, "worker_liveness": 1000, "queue_s": 1e6}


class House:
    """One worker, and users whose answers and prompts have given lengths."""

    def __init__(self, slots: int = 1, **settings: Any) -> None:
        self.bus = Bus(**(PATIENT | {"inflight": 100_000, "queue_requests": 100_000} | settings))
        self.worker: WorkerPeer = self.bus.worker(slots=slots)
        self.client: ClientPeer = self.bus.client()
        self.lengths: dict[bytes, tuple[str, int, int]] = {}
        #: When each running request ends.
        self.running: list[tuple[float, Message]] = []
        self.served: Counter[str] = Counter()

    def ask(self, user: str, answer: int, prompt: int = 10, **body: Any) -> bytes:
        request = self.client.request(user=user, prompt="x" * 4 * prompt, **body)
        self.lengths[request] = user, answer, prompt
        return request

    def begin(self) -> None:
        """What was assigned begins its answer."""
        for assign in self.worker.assigned():
            self.worker.first_token(assign)
            ends_s = self.bus.now_s + TOKEN_S * self.lengths[assign.id][1]
            self.running.append((ends_s, assign))
        self.running.sort(key=lambda entry: entry[0])

    def end(self, assign: Message, outcome: str = "stop") -> str:
        """A request ends; returns its user."""
        user, answer, prompt = self.lengths[assign.id]
        self.worker.finish(assign, prompt=prompt, tokens=answer, outcome=outcome)
        self.client.receive()
        return user

    def step(self) -> str:
        """Time goes on until a request has ended; returns its user."""
        self.begin()
        ends_s, assign = self.running.pop(0)
        self.bus.wait(max(0.0, ends_s - self.bus.now_s))
        user, answer, prompt = self.lengths[assign.id]
        self.served[user] += answer + prompt
        return self.end(assign)

    def run(self, seconds: float) -> None:
        until_s = self.bus.now_s + seconds
        while self.bus.now_s < until_s:
            self.step()


@pytest.mark.parametrize("slots", [1, 4])
def test_long_answers_of_one_user_and_short_ones_of_another_get_equal_tokens(slots: int) -> None:
    house = House(slots)
    for _ in range(8 * slots):
        house.ask("long", 400)
    for _ in range(50 * slots):
        house.ask("short", 20)
    house.run(20.0)
    # Two long answers for each slot may be on their way.
    assert abs(house.served["long"] - house.served["short"]) <= 2 * slots * 410, house.served
    assert min(house.served.values()) > 500 * slots


def test_prompts_count_as_answers_do() -> None:
    house = House()
    for _ in range(60):
        house.ask("reads", 10, prompt=1000)
        house.ask("writes", 100, prompt=10)
    for _ in range(50):
        house.step()
    assert abs(house.served["reads"] - house.served["writes"]) <= 2 * 1010, house.served


def test_three_users_get_a_third_each_however_many_requests_they_send() -> None:
    house = House(2)
    for user, answer, count in (("a", 50, 120), ("b", 50, 60), ("c", 300, 12)):
        for _ in range(count):
            house.ask(user, answer)
    house.run(20.0)
    assert max(house.served.values()) - min(house.served.values()) <= 4 * 310, house.served


def test_a_user_that_comes_later_does_not_make_up_for_what_it_did_not_ask_for() -> None:
    house = House()
    for _ in range(60):
        house.ask("early", 50)
    for _ in range(30):
        house.step()
    for _ in range(30):
        house.ask("late", 50)
    before = house.served.copy()
    for _ in range(20):
        house.step()
    got = {user: house.served[user] - before[user] for user in ("early", "late")}
    assert abs(got["early"] - got["late"]) <= 2 * 60, got


def test_a_newcomer_is_served_next_and_one_that_pauses_saves_nothing_up() -> None:
    house = House()
    for _ in range(100):
        house.ask("greedy", 50)
    for _ in range(10):
        house.step()
    house.ask("modest", 50)
    house.begin()
    assert [house.step(), house.step()] == ["greedy", "modest"]
    for _ in range(20):
        house.step()
    for _ in range(10):
        house.ask("modest", 50)
    order = [house.step() for _ in range(12)]
    assert order[1:].count("modest") in (5, 6, 7), order


def test_what_a_users_batch_took_is_not_held_against_its_other_requests() -> None:
    house = House(preempt=False)
    for _ in range(20):
        house.ask("both", 300, priority=-50)
    for _ in range(10):
        house.step()
    for _ in range(10):
        house.ask("both", 50)
        house.ask("other", 50)
    house.step()
    order = [house.step() for _ in range(10)]
    assert order.count("both") == order.count("other") == 5, order


def test_a_request_that_its_worker_never_began_costs_nothing() -> None:
    house = House()
    first = house.ask("a", 50)
    (assign,) = house.worker.assigned()
    share = house.bus.core.shares_of("demo").of(0, "user a")
    assert share.tokens > 0
    house.worker.reject(assign)
    assert share.tokens == share.running == 0.0
    house.client.resume(first, user="a")
    (assign,) = house.worker.assigned()
    house.begin()
    house.lengths[first] = "a", 50, 10
    house.end(assign)
    assert (share.tokens, share.running) == (60.0, 0.0)


# --- streams that move ----------------------------------------------------------------------------


def moved(house: House, user: str, tokens: int) -> tuple[bytes, int]:
    """A stream of this user that was moved away after so many tokens; returns its id."""
    request = house.ask(user, 1000, params=Params(max_tokens=1000))
    house.begin()
    house.bus.wait(TOKEN_S * tokens)
    return request, tokens


def test_a_stream_that_moves_is_paid_for_once() -> None:
    house = House()
    for _ in range(4):
        house.ask("a", 100)
        house.step()
    share = house.bus.core.shares_of("demo").of(0, "user a")
    before = share.tokens
    request = house.ask("a", 100)
    house.begin()
    house.bus.wait(0.5)
    house.worker.beat(state=WorkerState.READY, ends_in_ms=1000, ends_why="job 7")
    other = house.bus.worker("other")
    house.bus.wait(0.5)
    (told,) = [m for m in house.client.receive() if m.type is MessageType.INTERRUPTED]
    assert told.id == request
    assert share.running == 0.0
    assert share.tokens - before == pytest.approx(10 + 50, rel=0.35), "what it was given so far"
    house.client.resume(request, user="a", tokens=55, prompt="x" * 40)
    (assign,) = other.assigned()
    other.finish(assign, prompt=10, tokens=100)
    assert (share.tokens - before, share.running) == (110.0, 0.0)


def a_request(shares: Shares, order: int, user: str, cost: float, **more: Any) -> RequestState:
    request = RequestState(order.to_bytes(16, "big"), "demo", 0.0)
    request.order, request.user_key, request.cost = order, user, cost
    request.priority, request.moved = more.get("priority", 0), more.get("moved", False)
    return request


def test_moved_streams_of_one_user_do_not_hold_up_those_of_another() -> None:
    """Eight streams of one user and one of another leave a worker that ends; the one is younger."""
    shares = Shares()
    queue = ModelQueue(shares)
    shares.served(0, shares.of(0, "many"), 8000.0)
    shares.served(0, shares.of(0, "one"), 1000.0)
    for order in range(8):
        queue.add(a_request(shares, order, "many", 500.0, moved=True))
    queue.add(a_request(shares, 8, "one", 500.0, moved=True))
    queue.add(a_request(shares, 9, "one", 500.0))
    queue.add(a_request(shares, 10, "third", 500.0))
    order = [(r.user_key, r.moved) for r in queue.upcoming(11)]
    assert order[0] == ("one", True)
    assert order[1:9] == [("many", True)] * 8, "what ran already goes before what did not"
    assert order[9:] == [("third", False), ("one", False)] or order[9][0] == "one"


def test_users_that_are_gone_are_forgotten_and_those_that_wait_are_not() -> None:
    shares = Shares()
    queue = ModelQueue(shares)
    queue.add(a_request(shares, 1, "waits", 10.0))
    mine = shares.of(0, "waits")
    running = shares.of(0, "runs")
    shares.served(0, running, 10.0)
    for number in range(MAX_USERS + 100):
        shares.of(0, f"passes {number}")
    assert len(list(shares)) == MAX_USERS
    assert shares.of(0, "waits") is mine and shares.of(0, "runs") is running


# --- the order that is foretold -------------------------------------------------------------------


def test_places_are_those_in_which_requests_are_served() -> None:
    for seed in range(30):
        rng = random.Random(seed)
        shares = Shares()
        queue = ModelQueue(shares)
        requests = []
        for order in range(rng.randint(1, 60)):
            moved = rng.random() < 0.2
            user = rng.choice("xy" if moved else "abcd")
            more = {"priority": rng.choice((0, 0, 0, 5)), "moved": moved}
            requests.append(a_request(shares, order, user, 40.0, **more))
        for request in requests:
            queue.add(request)
            if rng.random() < 0.2:
                shares.served(request.priority, shares.of(request.priority, request.user_key), 40.0)
                queue.reorder(request.priority, request.user_key)
        foretold = queue.upcoming(len(requests))
        assert sorted(r.order for r in foretold) == [r.order for r in requests]
        assert [queue.position(request) for request in foretold] == list(range(len(requests)))
        served = []
        while queue.requests:
            (request,) = queue.upcoming(1)
            queue.remove(request)
            share = shares.of(request.priority, request.user_key)
            shares.served(request.priority, share, request.cost)
            queue.reorder(request.priority, request.user_key)
            served.append(request)
        assert served == foretold, seed
