"""The subject: the command that is judged, started and stopped, told where the kit is.

`{front}`, `{back}` and `{broker}` in its arguments stand for addresses, which it also finds in its
environment as KIT_FRONT, KIT_BACK and KIT_BROKER. Only processes that were started here are ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.conformance.verdicts import Broken, CannotStart

STOP_S = 5.0


def free_port() -> int:
    """A port of the loopback that nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Subject:
    """One process of the command."""

    def __init__(
        self, command: Sequence[str], places: Mapping[str, str], log: Path, *, talks: bool = False
    ) -> None:
        """`talks`: it reads its script and writes what it saw, a line of JSON each."""
        words = list(command)
        for name, address in places.items():
            words = [word.replace("{" + name + "}", address) for word in words]
        environment = {**os.environ, **{f"KIT_{n.upper()}": a for n, a in places.items()}}
        self._log: IO[bytes] = log.open("ab")
        try:
            self.popen = subprocess.Popen(
                words,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else self._log,
                stderr=self._log,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            raise CannotStart(f"{words[0]}: {error.strerror}") from None
        self._lines: queue.Queue[str | None] = queue.Queue()
        if talks:
            threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(line.decode("utf-8", "replace"))
        self._lines.put(None)

    # --- a client's script ---

    def tell(self, **order: Any) -> None:
        """A line of the script."""
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.write(json.dumps(order).encode() + b"\n")
            self.popen.stdin.flush()

    def told_all(self) -> None:
        """The script is over."""
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def said(self, seconds: float) -> dict[str, Any] | None:
        """Its next line; None if it says nothing in this time, or never again."""
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        if line is None:
            self._lines.put(None)
            return None
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Broken(
                "kit", f"standard output has a line that is not a JSON object: {line[:100]!r}"
            )
        return said

    # --- life ---

    @property
    def running(self) -> bool:
        """It has not exited."""
        return self.popen.poll() is None

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it goes on."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        """To the command alone, not to what it started."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)

    def stop(self) -> None:
        """End it and whatever it started: its process group."""
        for number, wait_s in ((signal.SIGTERM, STOP_S), (signal.SIGKILL, STOP_S)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(wait_s)
                if number is signal.SIGKILL:
                    break
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()


def wait_for_port(port: int, subject: Subject, seconds: float) -> None:
    """Until somebody listens there. Raises `CannotStart`."""
    until_s = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if not subject.running:
            raise CannotStart(
                f"the command exited with status {subject.popen.returncode} at its start"
            )
        if time.monotonic() > until_s:
            raise CannotStart(f"nobody listens at 127.0.0.1:{port} after {seconds:g} s")
        time.sleep(0.02)
