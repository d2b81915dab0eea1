"""`--upstream`: runs and supervises the relay, the process that makes this broker a
worker of others.

The relay is a client of this broker and a worker of the brokers above. It is built from two
packages that a broker must not import, so here it is only started, watched, restarted when it dies,
and told to drain when this broker stops. A pipe carries its options (including keys) to it; when
the pipe closes, the relay knows that the broker is gone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from broker.config import Config, ConfigError
from broker.log import Logger
from broker.protocol.limits import MAX_NAME_BYTES
from broker.sockets import BindError, check_address

LOOK_S: Final = 0.2
FIRST_RESTART_S: Final = 0.5
LONGEST_RESTART_S: Final = 30.0
PROVEN_S: Final = 30.0
"""A relay that ran this long was not broken from the start."""
_MARK_BYTES: Final = MAX_NAME_BYTES - 40
"""Of the broker's name in its relays' names, which are longer."""
CLOSE_S: Final = 1.0
"""For its last messages, once there is nothing else to wait for."""


def check(config: Config) -> None:
    """Raises `ConfigError` for options with which no relay could work."""
    if bool(config.upstream_server_key) != bool(config.upstream_key):
        raise ConfigError("--upstream-server-key and --upstream-key: give both, or neither")
    if config.upstream_key and not config.upstream:
        raise ConfigError("--upstream-key without --upstream: say for which broker")
    for address in config.upstream:
        try:
            check_address(address)
        except BindError as error:
            raise ConfigError(f"--upstream: {error}") from None
        if "*" in address or address.startswith("tcp://0.0.0.0:"):
            raise ConfigError(f"--upstream {address}: one broker's back address is needed")


class Upstream:
    """The relay, as seen by the broker. Never blocks, except in `close`."""

    def __init__(
        self,
        config: Config,
        front: str,
        log: Logger,
        *,
        server_key: str = "",
        keys: tuple[str, str] | None = None,
    ) -> None:
        """`front`: the address where this broker listens; with CURVE, also its public key and the
        relay's key pair."""
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._life: int | None = None
        self._draining = False
        self._starts = 0
        self._started_s = -math.inf
        self._look_s = self._start_s = -math.inf
        self._wait_s = FIRST_RESTART_S
        #: Identifies this broker, even among others of the same name, if brokers form a loop.
        name = config.broker_name.encode()[:_MARK_BYTES].decode(errors="ignore")
        self._mark = f"{name}-{secrets.token_hex(3)}"
        self._options: dict[str, Any] = {
            "mark": self._mark,
            "lower": _reachable(front),
            "inflight": config.inflight,
            "upstream": config.upstream,
            "drain_s": config.shutdown_grace_s,
            "server_key": config.upstream_server_key,
            "key": config.upstream_key,
            "lower_server_key": server_key,
            "lower_keys": keys,
            "log_format": config.log_format,
            "log_level": config.log_level,
        }

    def look(self, now_s: float, *, stopping: bool) -> None:
        """Start or restart the relay; drain it once when the broker is `stopping`."""
        if now_s < self._look_s:
            return
        self._look_s = now_s + LOOK_S
        process = self._process
        if process is not None and process.poll() is not None:
            self._ended(process.returncode, now_s)
        elif process is not None and stopping:
            self._drain()
        elif process is None and not stopping and now_s >= self._start_s:
            self._start(now_s)

    def _start(self, now_s: float) -> None:
        self._starts += 1
        name = f"{self._mark}.{self._starts}"
        self._draining = False
        try:
            process, life = self._spawn()
        except OSError as error:
            # The machine has no room for a process now; the broker itself serves on.
            self._start_later("relay not started", {"why": str(error)}, now_s)
            return
        self._process, self._life, self._started_s = process, life, now_s
        with contextlib.suppress(BrokenPipeError):
            os.write(life, json.dumps({**self._options, "name": name}).encode() + b"\n")
        fields = {
            "relay": name,
            "upstream": ", ".join(self._options["upstream"]),
            "pid": process.pid,
        }
        self._log("info", "relay starts", fields)

    def _spawn(self) -> tuple[subprocess.Popen[bytes], int]:
        """The process, and the end of the pipe by which it knows that the broker lives."""
        paths = [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
        life_read, life = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.relay", str(life_read)],
                stdin=subprocess.DEVNULL,
                pass_fds=(life_read,),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                # Ctrl-C in the terminal is handled by the broker.
                process_group=0,
            )
        except OSError:
            os.close(life)
            raise
        finally:
            os.close(life_read)
        return process, life

    def _ended(self, status: int, now_s: float) -> None:
        self._forget()
        if now_s - self._started_s >= PROVEN_S:
            self._wait_s = FIRST_RESTART_S
        self._start_later("relay ended", {"status": status}, now_s)

    def _start_later(self, what: str, fields: dict[str, Any], now_s: float) -> None:
        self._start_s = now_s + self._wait_s
        self._log("warning", what, {**fields, "restart_in_s": self._wait_s})
        self._wait_s = min(LONGEST_RESTART_S, 2 * self._wait_s)

    def _drain(self) -> None:
        if self._process is not None and not self._draining:
            self._draining = True
            self._process.send_signal(signal.SIGTERM)

    def _forget(self) -> None:
        self._process = None
        if self._life is not None:
            os.close(self._life)
            self._life = None

    def close(self) -> None:
        """End the relay: it says goodbye to the brokers above, and requests that it still ran
        continue elsewhere."""
        process = self._process
        if process is None:
            return
        self._drain()
        for ask_again in (process.terminate, process.kill, None):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE_S)
                break
            if ask_again is not None:
                ask_again()  # a second SIGTERM does not wait for running requests
        self._log("info", "relay ended", {"status": process.poll()})
        self._forget()


def _reachable(front: str) -> str:
    """The address to connect to, for a bound address."""
    for everywhere, here in (
        ("tcp://0.0.0.0:", "tcp://127.0.0.1:"),
        ("tcp://[::]:", "tcp://[::1]:"),
    ):
        if front.startswith(everywhere):
            return here + front.removeprefix(everywhere)
    return front
