"""Models loaded on demand: whose turn it is, what bounds a turn, and that none starves."""

from __future__ import annotations

import random

from broker.protocol.header import MessageType
from broker.protocol.messages import ModelInfo, WorkerState
from tests.core.broker_facts import Bus, ClientPeer, Message

LOAD_S = 2.0
FACTOR = 5.0
TURN_S = LOAD_S * FACTOR


class Shelf:
    """A worker that has one of its models loaded, and loads another when told to."""

    def __init__(self, bus: Bus, *models: str, slots: int = 1) -> None:
        self.bus = bus
        self.models = models
        self.loaded = ""
        self.worker = bus.worker(models=models, slots=slots, grant=False)
        self.broken: set[str] = set()
        self._assigned: list[Message] = []
        self.tell()
        self.worker.grant(slots)
        self.worker.receive()

    def tell(self, **more: object) -> None:
        infos = [
            ModelInfo(name=name, loaded=name == self.loaded, load_ms=int(LOAD_S * 1000))
            for name in self.models
            if name not in self.broken
        ]
        self.worker.beat(state=WorkerState.READY, models=infos, **more)

    def asked(self) -> list[str]:
        """The models that it was told to load since the last call; an empty name means unload."""
        self._assigned += self.worker.assigned()
        beats = self.worker.beats_told()
        return [b.get("load", "") for b in beats if b.get("load") or b.get("unload")]

    def assigned(self) -> list[Message]:
        """What it was given since the last call."""
        came, self._assigned = self._assigned + self.worker.assigned(), []
        return came

    def load(self, model: str) -> None:
        """It loads the model that it was told to, and reports it loaded after a while."""
        assert self.asked()[-1:] in ([model], [])
        self.loaded = ""
        self.tell(progress=0.0)
        self.bus.wait(LOAD_S)
        self.loaded = model
        self.tell()


def quiet_bus(**settings: object) -> Bus:
    return Bus(
        swap_factor=FACTOR,
        queue_s=3600.0,
        ttl_s=7200.0,
        worker_liveness=1000,
        client_liveness=1000,
        stall_no_work_s=1e6,
        **settings,
    )


def quiet(slots: int = 1, *models: str, **settings: object) -> tuple[Bus, Shelf, ClientPeer]:
    bus = quiet_bus(**settings)
    return bus, Shelf(bus, *(models or ("a", "b")), slots=slots), bus.client()


def test_an_idle_worker_loads_what_is_asked_for_at_once() -> None:
    _, shelf, client = quiet()
    request = client.request("a")
    assert shelf.asked() == ["a"]
    assert shelf.assigned() == [], "it is not loaded yet"
    shelf.load("a")
    assert [m.id for m in shelf.assigned()] == [request]


def test_requests_for_the_loaded_model_go_first_within_the_bound() -> None:
    bus, shelf, client = quiet()
    client.request("a")
    shelf.load("a")
    (running,) = shelf.assigned()
    client.request("b")
    began_s = bus.now_s
    for _ in range(100):
        client.request("a")
        bus.wait(0.5)
        shelf.worker.finish(running)
        assigned = shelf.assigned()
        if not assigned:
            break
        (running,) = assigned
        assert bus.now_s - began_s <= TURN_S + 1.0
    assert bus.now_s - began_s >= TURN_S - 1.0
    bus.wait(0.2)
    assert shelf.asked() == ["b"]


def test_a_model_gives_way_as_soon_as_nothing_is_asked_of_it() -> None:
    bus, shelf, client = quiet()
    client.request("a")
    shelf.load("a")
    (running,) = shelf.assigned()
    client.request("b")
    bus.wait(1.0)
    assert shelf.asked() == []
    shelf.worker.finish(running)
    bus.wait(LOAD_S / 8)
    assert shelf.asked() == [], "its clients may ask again in a moment"
    bus.wait(LOAD_S / 2)
    assert shelf.asked() == ["b"]


def test_clients_that_are_answered_together_keep_their_models_turn() -> None:
    bus, shelf, client = quiet(4)
    for _ in range(4):
        client.request("a")
    shelf.load("a")
    client.request("b")
    began_s = bus.now_s
    while not shelf.asked():
        bus.wait(0.3)
        for running in shelf.assigned():
            shelf.worker.finish(running)
        bus.wait(0.15)  # a look sees it idle
        for _ in range(4):
            client.request("a")
    assert bus.now_s - began_s >= TURN_S - 1.0


def test_a_deadline_shortens_a_turn_to_one_load() -> None:
    bus, shelf, client = quiet()
    for _ in range(50):
        client.request("a")
    shelf.load("a")
    (running,) = shelf.assigned()
    began_s = bus.now_s
    client.request("b", queue_ms=int(2.5 * LOAD_S * 1000))
    while not shelf.asked():
        bus.wait(0.1)
        shelf.worker.finish(running)
        assigned = shelf.assigned()
        running = assigned[0] if assigned else running
        assert bus.now_s - began_s < TURN_S / 2
    assert bus.now_s - began_s >= LOAD_S / 2


def test_a_stream_that_outlasts_its_turn_moves_and_goes_on_in_the_next() -> None:
    bus, shelf, client = quiet()
    long = client.request("a")
    shelf.load("a")
    (running,) = shelf.assigned()
    shelf.worker.first_token(running)
    shelf.worker.tokens(running, offset=1, count=2)
    other = client.request("b")
    client.receive()
    bus.wait(2 * TURN_S + 1.0)
    messages = client.receive()
    (interrupted,) = [m for m in messages if m.type is MessageType.INTERRUPTED]
    assert interrupted.id == long and not interrupted.body.lost
    client.resume(long, model="a", tokens=3)
    assert shelf.asked() == [], "it has not stopped yet"
    shelf.worker.finish(running, outcome="cancelled")
    bus.wait(0.2)
    assert shelf.asked() == ["b"]
    shelf.load("b")
    (assigned,) = shelf.assigned()
    assert assigned.id == other
    shelf.worker.finish(assigned)
    bus.wait(1.0)
    assert shelf.asked() == ["a"]
    shelf.load("a")
    assert [m.id for m in shelf.assigned()] == [long]


def test_a_stream_without_a_token_stays_until_it_has_one() -> None:
    """Models whose first token takes longer than a turn would take turns for ever."""
    bus, shelf, client = quiet()
    slow = client.request("a")
    shelf.load("a")
    (running,) = shelf.assigned()
    client.request("b")
    client.receive()
    bus.wait(2 * TURN_S + 1.0)
    assert MessageType.INTERRUPTED not in [m.type for m in client.receive()]
    shelf.worker.first_token(running)
    bus.wait(0.2)
    assert [m.id for m in client.receive() if m.type is MessageType.INTERRUPTED] == [slow]


def test_those_who_wait_are_told_how_far_it_is() -> None:
    bus, shelf, client = quiet()
    client.request("a")
    client.receive()
    for progress in (0.05, 0.4, 0.42, 0.7):
        shelf.tell(progress=progress)
        bus.wait(0.2)
    told = [m.plain for m in client.receive() if m.type is MessageType.ACCEPTED]
    assert [row["progress"] for row in told] == [0.05, 0.4, 0.7]


def test_a_model_that_cannot_be_loaded_holds_nobody_up() -> None:
    bus, shelf, client = quiet(model_grace_s=1.0)
    client.request("a")
    assert shelf.asked() == ["a"]
    shelf.broken.add("a")
    shelf.tell()
    other = client.request("b")
    bus.wait(0.2)
    assert shelf.asked() == ["b"]
    shelf.load("b")
    assert [m.id for m in shelf.assigned()] == [other]
    bus.wait(2.0)
    assert "model_unavailable" in str(client.receive())


def test_a_lost_order_is_given_again() -> None:
    bus, shelf, client = quiet()
    client.request("a")
    assert shelf.asked() == ["a"]
    bus.wait(6.0)
    assert shelf.asked() == ["a"]


def test_of_two_workers_only_one_loads_it() -> None:
    bus, one, client = quiet()
    other = Shelf(bus, "a", "b")
    client.request("a")
    bus.wait(1.0)
    assert len(one.asked() + other.asked()) == 1


def test_the_operator_loads_and_unloads() -> None:
    bus, shelf, client = quiet()
    assert client.query("bus.load", worker="worker", model="b")["state"] == "loading"
    assert shelf.asked() == ["b"]
    shelf.load("b")
    (row,) = client.query("bus.workers")
    assert row["loaded"] == ["b"]
    assert client.query("bus.load", worker="worker", model="b")["state"] == "loaded"
    assert client.query("bus.unload", worker="worker")["state"] == "unloading"
    bus.wait(0.2)
    assert shelf.asked() == [""]
    shelf.loaded = ""
    shelf.tell()
    request = client.request("a")
    bus.wait(0.2)
    shelf.load("a")
    assert [m.id for m in shelf.assigned()] == [request]
    assert client.query("bus.load", worker="worker", model="c")["code"] == "invalid_request"


def test_a_lost_worker_in_the_middle_of_a_swap_leaves_nothing_behind() -> None:
    bus, shelf, client = quiet()
    client.request("a")
    shelf.worker.goodbye("engine_dead")
    bus.wait(5.0)
    again = Shelf(bus, "a", "b")
    bus.wait(0.2)
    assert again.asked() == ["a"]


def test_no_request_starves_and_swaps_are_bounded_whatever_is_asked() -> None:
    """Three models, sixteen clients that ask anew as soon as they are answered, for 1000 s."""
    models = ("a", "b", "c")
    bus, shelf, client = quiet(4, *models)
    draw = random.Random(3)
    asked_s: dict[bytes, float] = {}
    running: dict[bytes, tuple[float, Message]] = {}
    worst_s, loads, answered = 0.0, 0, dict.fromkeys(models, 0)

    def ask() -> None:
        model = draw.choices(models, weights=(8, 4, 1))[0]
        asked_s[client.request(model)] = bus.now_s

    for _ in range(16):
        ask()
    began_s = bus.now_s
    busy_until_s = 0.0
    while bus.now_s < began_s + 1000:
        bus.wait(0.25)
        for message in shelf.assigned():
            worst_s = max(worst_s, bus.now_s - asked_s.pop(message.id))
            running[message.id] = (bus.now_s + draw.uniform(0.5, 3.0), message)
        for id_, (end_s, message) in list(running.items()):
            if end_s <= bus.now_s:
                del running[id_]
                answered[shelf.loaded] += 1
                shelf.worker.finish(message)
                ask()
        for model in shelf.asked():
            assert not running, "nobody runs while a model gives way"
            shelf.loaded, busy_until_s = "", bus.now_s + LOAD_S
            loads += 1
            shelf.tell()
            while bus.now_s < busy_until_s:
                bus.wait(0.25)
            shelf.loaded = model
            shelf.tell()
        client.receive()
    assert all(answered.values()), answered
    # The turns of the two others, their drains and loads.
    assert worst_s <= 3 * (TURN_S + LOAD_S + 3.0) + TURN_S
    assert loads * LOAD_S <= 1000 / 4, f"{loads} loads"


def test_what_was_loaded_for_another_broker_is_used_at_once() -> None:
    _, shelf, client = quiet(2)
    client.request("a")
    shelf.load("a")
    other = client.request("b")
    assert [m.id for m in shelf.assigned()] != [other]
    shelf.asked()
    shelf.loaded = "b"
    shelf.tell()
    assert other in [m.id for m in shelf.assigned()]


# --- several at once ------------------------------------------------------------------------------


class Budget:
    """A worker that loads as many of its models as its memory holds."""

    def __init__(self, bus: Bus, room: int, slots: int = 4, **sizes: int) -> None:
        self.bus = bus
        self.sizes = sizes
        self.room = room
        self.loaded: list[str] = []
        #: Names that are loaded with others.
        self.units: dict[str, str] = {}
        self._assigned: list[Message] = []
        self.worker = bus.worker(models=tuple(sizes), slots=slots, grant=False)
        self.tell()
        self.worker.grant(slots)
        self.worker.receive()

    def tell(self) -> None:
        free = self.room - sum(self.sizes[name] for name in self.loaded if name not in self.units)
        infos = [
            ModelInfo(
                name=name,
                loaded=name in self.loaded,
                load_ms=int(LOAD_S * 1000),
                memory_bytes=size,
                loads_with=self.units.get(name, ""),
                must_free_bytes=None if name in self.loaded else max(0, size - free),
            )
            for name, size in self.sizes.items()
        ]
        self.worker.beat(state=WorkerState.READY, models=infos)

    def asked(self) -> list[tuple[str, list[str]]]:
        """The model that it was told to load, and the one to unload for it."""
        self.bus.wait(0.11)
        self._assigned += self.worker.assigned()
        return [
            (b.get("load", ""), b.get("gives_way", []))
            for b in self.worker.beats_told()
            if b.get("load") or b.get("unload")
        ]

    def assigned(self) -> list[Message]:
        """What it was given since the last call."""
        came, self._assigned = self._assigned + self.worker.assigned(), []
        return came

    def finish(self) -> None:
        """What it was given since the last call of `assigned` ends."""
        for running in self.assigned():
            self.worker.finish(running)

    def obey(self) -> list[tuple[str, list[str]]]:
        asked = self.asked()
        for model, gives_way in asked:
            self.loaded = [name for name in self.loaded if name not in gives_way]
            self.tell()
            self.bus.wait(LOAD_S)
            with_it = [name for name, unit in self.units.items() if unit == model]
            self.loaded += [model, *with_it] if model else []
            self.tell()
        return asked


def budget(room: int, **sizes: int) -> tuple[Bus, Budget, ClientPeer]:
    bus = quiet_bus()
    return bus, Budget(bus, room, **sizes), bus.client()


def test_a_model_that_fits_is_loaded_beside_the_others_at_once() -> None:
    _, shelf, client = budget(10, a=4, b=5)
    client.request("a")
    assert shelf.obey() == [("a", [])]
    assert len(shelf.assigned()) == 1
    client.request("b")
    assert shelf.asked() == [("b", [])], "although a is at work"
    more = client.request("a")
    assert [m.id for m in shelf.assigned()] == [more], "and goes on"


def test_the_least_recently_used_give_way_and_no_more_than_must() -> None:
    bus, shelf, client = budget(10, a=2, b=4, c=3, d=5)
    for model in ("a", "b", "c"):
        client.request(model)
        assert shelf.obey() == [(model, [])]
        shelf.finish()
        bus.wait(1.0)
    client.request("d")  # 1 is free, and 4 more must be: a and b are the oldest, and b is enough
    bus.wait(LOAD_S)
    assert shelf.obey() == [("d", ["b"])]
    assert sorted(shelf.loaded) == ["a", "c", "d"]


def test_a_request_makes_its_model_the_most_recently_used() -> None:
    bus, shelf, client = budget(10, a=5, b=5, c=5)
    for model in ("a", "b", "a"):
        client.request(model)
        shelf.obey()
        shelf.finish()
        bus.wait(1.0)
    client.request("c")
    bus.wait(LOAD_S)
    assert shelf.asked() == [("c", ["b"])]


def test_those_that_do_not_give_way_go_on_and_get_more() -> None:
    bus, shelf, client = budget(10, a=4, b=6, c=6)
    for model in ("a", "b"):
        client.request(model)
        shelf.obey()
    shelf.assigned()
    client.request("c")
    assert shelf.asked() == [], "both are asked for"
    bus.wait(TURN_S + 1.0)
    more, _ = client.request("a"), client.request("b")
    assert [m.id for m in shelf.assigned()] == [more], "only b's turn is over"


def test_names_that_are_loaded_together_give_way_together() -> None:
    bus, shelf, client = budget(10, a=6, also_a=6, b=6)
    shelf.units = {"also_a": "a"}
    client.request("a")
    shelf.obey()
    shelf.finish()
    shelf.tell()
    client.request("b")
    bus.wait(LOAD_S)
    assert shelf.asked() == [("b", ["a", "also_a"])]


def test_what_the_operator_unloads_waits_for_its_streams_and_takes_no_more() -> None:
    bus, shelf, client = budget(10, a=4, b=5)
    for model in ("a", "b"):
        client.request(model)
        shelf.obey()
    _, on_b = shelf.assigned()
    assert client.query("bus.unload", worker="worker", model="b")["model"] == "b"
    bus.wait(20 * TURN_S)
    assert shelf.asked() == []
    assert not [m for m in client.receive() if m.type is MessageType.INTERRUPTED]
    waits = client.request("b")
    assert shelf.assigned() == []
    shelf.worker.finish(on_b)
    assert shelf.obey() == [("", ["b"])]
    assert shelf.obey() == [("b", [])], "somebody asks for it, so it is loaded anew"
    assert [m.id for m in shelf.assigned()] == [waits]
    assert client.query("bus.unload", worker="worker", model="z")["code"] == "invalid_request"


def test_no_model_starves_where_memory_has_room_for_only_some() -> None:
    """Four models of which two fit, sixteen clients that ask anew as soon as they are answered."""
    bus, shelf, client = budget(10, a=5, b=5, c=4, d=6)
    draw = random.Random(5)
    asked_s: dict[bytes, tuple[float, str]] = {}
    ends: dict[bytes, tuple[float, Message]] = {}
    answered = dict.fromkeys(shelf.sizes, 0)
    worst_s = 0.0

    def ask() -> None:
        model = draw.choices("abcd", weights=(8, 4, 2, 1))[0]
        asked_s[client.request(model)] = bus.now_s, model

    for _ in range(16):
        ask()
    loading = ""
    due_s, loads = 0.0, 0
    began_s = bus.now_s
    while bus.now_s < began_s + 600:
        for model, gives_way in shelf.asked():
            busy = {asked_s[id_][1] for id_ in ends}
            assert not busy & set(gives_way), "nobody runs while a model gives way"
            shelf.loaded = [name for name in shelf.loaded if name not in gives_way]
            assert sum(shelf.sizes[n] for n in [*shelf.loaded, model]) <= shelf.room
            loading, due_s, loads = model, bus.now_s + LOAD_S, loads + 1
            shelf.tell()
        if loading and bus.now_s >= due_s:
            shelf.loaded.append(loading)
            loading = ""
            shelf.tell()
        for message in shelf.assigned():
            assert asked_s[message.id][1] in shelf.loaded
            ends[message.id] = bus.now_s + draw.uniform(0.5, 3.0), message
        for id_, (end_s, message) in list(ends.items()):
            if end_s <= bus.now_s:
                del ends[id_]
                since_s, model = asked_s.pop(id_)
                worst_s = max(worst_s, bus.now_s - since_s)
                answered[model] += 1
                shelf.worker.finish(message)
                ask()
        client.receive()
    assert all(answered.values()), answered
    assert worst_s <= 4 * (TURN_S + LOAD_S + 3.0) + TURN_S
    assert loads <= 600 / LOAD_S / 2
