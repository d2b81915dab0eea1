"""Coverage-guided fuzzing with atheris, which no extra installs (`pip install atheris`):

    python -m tests.protocol.atheris_bus seeds CORPUS       # the golden bytes
    python -m tests.protocol.atheris_bus codec CORPUS -max_total_time=60
    python -m tests.protocol.atheris_bus ports -max_total_time=60 -len_control=0 -max_len=1500

`codec` decodes bytes as every type of body. `ports` feeds frames into both ports of a broker's
loop, beside an honest client and an honest worker whose stream must come out unaltered; only the
sockets are simulated. It stops at the first finding and writes the bytes to a file, which `python
-m tests.protocol.atheris_bus ports FILE` runs again.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections import deque
from pathlib import Path
from typing import Any, Final

import atheris

with atheris.instrument_imports(include=["broker"]):
    import zmq

    from broker import loop as broker_loop
    from broker.config import Config
    from broker.core import admission
    from broker.core.controller import BrokerCore
    from broker.core.events import Side, Tick
    from broker.core.settings import CoreSettings
    from broker.protocol import codec, header, limits, messages as m
    from broker.protocol.errors import ErrorCode, ProtocolError, RequestError
    from broker.protocol.header import Flag, MessageType

Frames = list[bytes]

_GOLDEN: Final = Path(__file__).with_name("golden.json")
_SEEDS: Final[list[Frames]] = [
    [bytes.fromhex(frame) for frame in frames]
    for frames in json.loads(_GOLDEN.read_text()).values()
]
HONEST: Final = b"\x77" * limits.ID_BYTES
"""The honest client's request, whose id no stranger knows."""
_BODIES: Final[tuple[type, ...]] = (
    m.Hello,
    m.Welcome,
    m.Refuse,
    m.Heartbeat,
    m.Goodbye,
    m.Drain,
    m.Request,
    m.Accepted,
    m.Assign,
    m.Cancel,
    m.Window,
    m.Credit,
    m.Reject,
    m.Interrupted,
    m.Query,
    m.Answer,
)


# --- the codec ------------------------------------------------------------------------------------


def codec_takes(raw: bytes) -> None:
    """The codec raises only ProtocolError, and admission only RequestError."""
    for type_ in _BODIES:
        try:
            value = codec.decode(type_, raw, limits.MAX_REQUEST_BYTES)
        except ProtocolError:
            continue
        assert codec.decode(type_, codec.encode(value), limits.MAX_REQUEST_BYTES) == value
    for decode in (codec.decode_events, codec.decode_ledger):
        with contextlib.suppress(ProtocolError):
            decode(raw, limits.MAX_OUTPUT_BYTES)
    with contextlib.suppress(ProtocolError):
        header.decode(raw)
    settings = CoreSettings()
    for resumed in (False, True):
        try:
            admission.read_request(raw, (), resumed=resumed, settings=settings)
        except RequestError as error:
            assert error.info.code in (ErrorCode.INVALID_REQUEST, ErrorCode.TOO_LARGE)
    admission.resume_facts(raw, settings)


# --- both ports -----------------------------------------------------------------------------------


class _Frame:
    """The result of `recv(copy=False)`."""

    def __init__(self, raw: bytes, more: bool) -> None:
        self.bytes = raw
        self.more = more

    def get(self, _what: object) -> Any:
        raise zmq.ZMQError(22)


class _Socket:
    """A ROUTER made of lists."""

    def __init__(self) -> None:
        self.frames: deque[tuple[bytes, bool]] = deque()
        self.sent: dict[bytes, list[Frames]] = {}
        self._more = False
        self._sending: Frames = []

    def put(self, routing_id: bytes, frames: Frames) -> None:
        whole = [routing_id, *frames]
        self.frames.extend(
            (frame, frame_number < len(frames)) for frame_number, frame in enumerate(whole)
        )

    def recv(self, _flags: int = 0, copy: bool = True) -> Any:
        if not self.frames:
            raise zmq.Again
        raw, self._more = self.frames.popleft()
        return raw if copy else _Frame(raw, self._more)

    def getsockopt(self, option: int) -> int:
        if option == zmq.EVENTS:
            return zmq.POLLIN if self.frames else 0
        assert option == zmq.RCVMORE
        return int(self._more)

    def send(self, frame: bytes, flags: int = 0, _copy: bool = True) -> None:
        self._sending.append(frame)
        if not flags & zmq.SNDMORE:
            routing_id, *frames = self._sending
            self.sent.setdefault(routing_id, []).append(frames)
            self._sending = []


class _Peer:
    """An honest party."""

    def __init__(self, ports: _Ports, side: Side, number: int) -> None:
        self.ports = ports
        self.side = side
        self.routing_id = bytes([number]) * 16
        self.sequence = 0

    def say(self, type_: MessageType, id_: bytes, *bodies: Any, flags: int = 0) -> None:
        raw = [body if isinstance(body, bytes) else codec.encode(body) for body in bodies]
        head = header.encode(type_, id_, self.sequence, flags)
        self.sequence += 1
        self.ports.put(self.side, self.routing_id, [head, *raw])

    def heard(self, type_: MessageType) -> list[Frames]:
        mail = self.ports.sockets[self.side].sent.get(self.routing_id, [])
        return [frames for frames in mail if frames[0][3] == type_]


class _Ports:
    """A broker's loop over two such sockets; only `pass_time` moves the clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        config = Config(client_liveness=1000, worker_liveness=1000)
        self.core = BrokerCore(config, generator=random.Random(1), now_s=self.now_s)
        self.sockets = {side: _Socket() for side in Side}
        front, back = self.sockets[Side.FRONT], self.sockets[Side.BACK]
        self.loop = broker_loop.BrokerLoop(
            config,
            self.core,
            front,
            back,
            _no_log,
            clock=lambda: self.now_s,  # type: ignore[arg-type]
        )
        self.client, self.worker = _Peer(self, Side.FRONT, 1), _Peer(self, Side.BACK, 2)

    def close(self) -> None:
        self.loop._signals.close()

    def put(self, side: Side, routing_id: bytes, frames: Frames) -> None:
        self.sockets[side].put(routing_id, frames)
        drain = self.loop._drain_front if side is Side.FRONT else self.loop._drain_back
        while not drain(self.now_s):
            pass
        self.core.invariants()

    def pass_time(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.core.deadline_s() <= until_s:
            self.now_s = max(self.now_s, self.core.deadline_s())
            self.loop._feed(Tick(), self.now_s)
        self.now_s = until_s
        self.core.invariants()


def _no_log(*_: object) -> None:
    pass


def ports_take(raw: bytes) -> None:
    """Whatever strangers send, the honest stream is complete."""
    data = atheris.FuzzedDataProvider(raw)
    ports = _Ports()
    try:
        _honest_and_strangers(data, ports)
    finally:
        ports.close()


def _honest_and_strangers(data: Any, ports: _Ports) -> None:
    client, worker = ports.client, ports.worker
    models = [m.ModelInfo(name="honest")]
    hello = m.Hello(role="worker", name="worker", models=models, capacity=1)
    worker.say(MessageType.HELLO, header.NO_ID, hello)
    worker.say(MessageType.CREDIT, header.NO_ID, m.Credit(granted=1))
    client.say(MessageType.HELLO, header.NO_ID, m.Hello(role="client", name="client"))
    request_id = HONEST
    body = m.Request(model="honest", kind=m.Kind.COMPLETE, prompt="x", window=9)
    client.say(MessageType.REQUEST, request_id, body)
    ((_, assign_body, *_),) = worker.heard(MessageType.ASSIGN)
    route = codec.decode(m.Assign, assign_body, limits.MAX_CONTROL_BYTES).reply_to
    sequences: dict[tuple[Side, bytes], int] = {}
    for offset in range(4):
        for _ in range(data.ConsumeIntInRange(0, 4)):
            _stranger(data, ports, sequences)
        event = m.TokensEvent(request_id, 0, offset, [offset], "x")
        worker.say(MessageType.OUTPUT, route, codec.encode_events([event]))
    end = m.EndEvent(request_id, 0, 4, m.FinishReason.STOP, "", m.Usage(), m.Timings())
    ledger = m.Ledger(2, [m.Finished(request_id, "stop", 1, 4)])
    bodies = codec.encode_events([end]), codec.encode(ledger)
    worker.say(MessageType.OUTPUT, route, *bodies, flags=Flag.LEDGER)
    events = [
        event
        for frames in client.heard(MessageType.OUTPUT)
        for event in codec.decode_events(frames[1], limits.MAX_OUTPUT_BYTES)
    ]
    assert [event.offset for event in events] == [0, 1, 2, 3, 4], events
    mail = ports.sockets[Side.FRONT].sent[client.routing_id]
    numbers = [header.decode(frames[0]).sequence for frames in mail]
    assert numbers == list(range(len(mail))), "the client's sequence goes on"


def _stranger(data: Any, ports: _Ports, sequences: dict[tuple[Side, bytes], int]) -> None:
    """One message from one of several strangers, usually with a valid header."""
    if data.ConsumeProbability() < 0.1:
        ports.pass_time(data.ConsumeIntInRange(0, 200) / 10)
    side = Side.FRONT if data.ConsumeBool() else Side.BACK
    routing_id = bytes([0x90 + data.ConsumeIntInRange(0, 2)]) * 16
    sequence = sequences.get((side, routing_id), 0)
    frames = list(_SEEDS[data.ConsumeIntInRange(0, len(_SEEDS) - 1)])
    kind = data.ConsumeIntInRange(0, 5)
    if kind == 0:
        role = "client" if side is Side.FRONT else "worker"
        models = [m.ModelInfo(name="theirs")]
        frames = [frames[0], codec.encode(m.Hello(role=role, name="x", models=models, capacity=2))]
        frames[0] = header.encode(MessageType.HELLO, header.NO_ID, 0)
        sequence = 0
    elif kind == 1 and len(frames) > 1:
        frames[1] = data.ConsumeBytes(data.ConsumeIntInRange(0, 200))
    elif kind == 2:
        count = data.ConsumeIntInRange(0, 25)
        frames = frames[:1] + [
            data.ConsumeBytes(data.ConsumeIntInRange(0, 40)) for _ in range(count)
        ]
    elif kind == 3:
        frames = [data.ConsumeBytes(data.ConsumeIntInRange(0, 40))]
    if frames and len(frames[0]) == limits.HEADER_BYTES and kind != 3:
        old = header.decode(frames[0])
        ids = _known_ids(ports, side, routing_id, old.id)
        id_ = ids[data.ConsumeIntInRange(0, len(ids) - 1)]
        type_ = old.type
        if data.ConsumeProbability() < 0.3:
            type_ = data.PickValueInList(list(MessageType))
        flags = old.flags if data.ConsumeProbability() < 0.9 else data.ConsumeIntInRange(0, 1)
        frames[0] = header.encode(type_, id_ if kind else header.NO_ID, sequence, flags)
        sequences[side, routing_id] = sequence + 1
    ports.put(side, routing_id, frames)


def _known_ids(ports: _Ports, side: Side, routing_id: bytes, other: bytes) -> list[bytes]:
    """Ids that this stranger can know, and one other."""
    core = ports.core
    table: Any = core.clients if side is Side.FRONT else core.workers
    sessions = [table[routing_id].id] if routing_id in table else []
    routes = [route.id for route in core.routes.values() if route.worker.routing_id == routing_id]
    requests = [id_ for id_ in core.requests if id_ != HONEST]
    return [other, *sessions, *routes, *requests]


# --- running --------------------------------------------------------------------------------------


def _write_seeds(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate({frame for frames in _SEEDS for frame in frames}):
        (folder / str(number)).write_bytes(frame)


def main() -> None:
    if sys.argv[1:2] == ["seeds"] and len(sys.argv) == 3:
        _write_seeds(Path(sys.argv[2]))
        return
    target = {"codec": codec_takes, "ports": ports_take}.get(sys.argv[1] if sys.argv[1:] else "")
    if target is None:
        sys.exit(__doc__)
    broker_loop._sender = lambda socket: socket.send  # type: ignore[assignment, return-value]
    atheris.Setup([sys.argv[0], *sys.argv[2:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
