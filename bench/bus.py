"""The bus as the benchmarks use it: its processes, and raw peers.

Raw peers do without the client library, so that the load generator is cheap and only the broker is
measured.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.common import ONE_THREAD, ROOT, STOP_S
from client.cli.local_bus import ANYWHERE, LocalBus
from tests.support.plain_peer import RawPeer, Watch

__all__ = ["LOG", "QUIET", "RawPeer", "Watch", "running"]

LOG = ("--log-level", "warning")
QUIET = ("--worker-heartbeat-s", "3600", "--client-heartbeat-s", "3600")
"""No heartbeats: the load generator counts bytes and must not receive any."""


@contextlib.contextmanager
def running(
    *broker_options: str, transport: str = "tcp", keys: bool = False, path: str = ""
) -> Iterator[LocalBus]:
    """A broker on new endpoints, `tcp` (loopback) or `ipc`; the caller starts the workers.

    `path`: an additional folder to search for engines.
    """
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), path)))}
    # Socket paths are limited to 107 bytes, so do not use a deep working directory.
    with tempfile.TemporaryDirectory(prefix="tb-") as folder:
        front, back = ANYWHERE, ANYWHERE
        if transport == "ipc":
            front, back = f"ipc://{folder}/f", f"ipc://{folder}/b"
        with LocalBus(
            Path(folder),
            *LOG,
            *broker_options,
            front=front,
            back=back,
            keys=keys,
            environment={**ONE_THREAD, **environment},
            stop_s=STOP_S,
        ) as bus:
            bus.start_broker()
            yield bus
