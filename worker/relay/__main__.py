"""`python -m worker.relay`: serve a whole bus as a worker of another one.

Started by `python -m broker --upstream`, which keeps it running; not meant to be started by hand.
Its options arrive as one JSON line on the file descriptor given as its argument, because they
contain keys. The end of that pipe means that its broker is gone: it then accepts nothing more, and
running requests are resumed with the broker that replaces it. Exit status as for
`python -m worker`.
"""

from __future__ import annotations

from broker.protocol import early  # noqa: F401  # must be first: handles signals from here on

# isort: split

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import msgspec

from broker.peer.keys import KeyFileError, Keys
from broker.protocol import logs
from broker.protocol.limits import ID_BYTES
from client.options import Connection
from worker import config as options
from worker.core.session import WorkerCore
from worker.core.settings import Settings
from worker.loop import WORKER, Link
from worker.relay.core import RelayCore, RelaySettings
from worker.relay.port import LowerBus

log = logging.getLogger("worker.relay")

#: A relay gets its options through those of its broker.
RELAY: Final = replace(WORKER, server_key="--upstream-server-key", key="--upstream-key")


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a relay, as its broker writes them."""

    #: Unique names of the lower broker's process and of this relay.
    mark: str
    name: str
    #: Front address of the lower broker, and its limit on requests of one client.
    lower: str
    inflight: int
    #: Back addresses of the brokers above.
    upstream: tuple[str, ...]
    drain_s: float
    speed: float = 1.0
    #: CURVE on the upper bus: files with the brokers' public key and the relay's own key pair.
    server_key: str = ""
    key: str = ""
    #: CURVE on the lower bus, in Z85: the broker's public key, and the key pair that it made for
    #: this relay.
    lower_server_key: str = ""
    lower_keys: tuple[str, str] | None = None
    log_format: str = "auto"
    log_level: str = "info"


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            break
        line += byte
    return line


def main(arguments: list[str]) -> int:
    """Entry point; the argument is the file descriptor of the pipe."""
    try:
        descriptor = int(arguments[0])
        told = msgspec.json.decode(_read_line(descriptor), type=Told)
    except (IndexError, ValueError, OSError, msgspec.MsgspecError) as error:
        print(
            f"worker.relay is started by `python -m broker --upstream ADDRESS`: {error}",
            file=sys.stderr,
        )
        return 2
    logs.configure(told.log_level, told.log_format, None)
    keys = None
    if told.server_key:
        try:
            keys = Keys.load(Path(told.server_key), Path(told.key))
        except KeyFileError as error:
            print(f"worker.relay: {error}", file=sys.stderr)
            return 2
    end = _link(told, keys, descriptor).run()
    fields: dict[str, Any] = {"status": end.code}
    if end.message:
        fields["cause"] = end.message
    log.log(
        logging.ERROR if end.code else logging.INFO,
        "relay ends",
        extra={"fields": fields},
    )
    return end.code


def _link(told: Told, keys: Keys | None, descriptor: int) -> Link:
    software = options.software()
    settings = Settings(
        name=told.name,
        brokers=told.upstream,
        instance=os.urandom(ID_BYTES),
        software=software,
        speed=told.speed,
        engine="bus",
        device=told.lower,
        drain_s=told.drain_s,
        relay=True,
    )
    connection = Connection(
        brokers=(told.lower,),
        name=told.name,
        server_key=told.lower_server_key or None,
        key_pair=told.lower_keys,
    )
    core = RelayCore(RelaySettings(told.mark, told.lower, told.inflight))
    return Link(
        WorkerCore(settings, time.monotonic()),
        LowerBus(core, connection, software, descriptor),
        told.upstream,
        keys,
        party=RELAY,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
