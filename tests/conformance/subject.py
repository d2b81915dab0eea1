"""The subject: starts and stops the command that is judged, and tells it where the kit is.

`{front}`, `{back}` and `{broker}` in its arguments are replaced by addresses, which it also finds
in its environment as KIT_FRONT, KIT_BACK and KIT_BROKER. Only processes that were started here are
stopped.
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
    """A loopback port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Subject:
    """One process of the command."""

    def __init__(
        self, command: Sequence[str], places: Mapping[str, str], log: Path, *, talks: bool = False
    ) -> None:
        """`talks`: it reads a script from stdin and reports on stdout, in lines of JSON."""
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
        """Write a line of the script."""
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.write(json.dumps(order).encode() + b"\n")
            self.popen.stdin.flush()

    def end_script(self) -> None:
        """Close standard input: the script is over."""
        assert self.popen.stdin is not None
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def said(self, seconds: float) -> dict[str, Any] | None:
        """Its next line; None if none comes in this time, or it has closed standard output."""
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
        """Whether it has not exited."""
        return self.popen.poll() is None

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it still runs after this time."""
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def signal(self, number: signal.Signals) -> None:
        """Signal the command alone, not the processes that it started."""
        with contextlib.suppress(ProcessLookupError):
            self.popen.send_signal(number)

    def stop(self) -> None:
        """Stop its process group: the command and all that it started."""
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
    """Wait until the subject listens there. Raises `CannotStart`."""
    until_s = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        if not subject.running:
            raise CannotStart(
                f"the command exited with status {subject.popen.returncode} before it listened"
            )
        if time.monotonic() > until_s:
            raise CannotStart(f"nobody listens at 127.0.0.1:{port} after {seconds:g} s")
        time.sleep(0.02)
