"""Sources that may know when this machine or job ends: Slurm, clouds' metadata services, a command.

A source is asked again and again, from a thread of its own (`watch`), and answers with a time or
None. It may wait for seconds and may raise; it must never touch the bus.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Final, Protocol

from worker.ending import times

ANSWER_S: Final = 5.0
"""Time limit for one answer of a metadata service or command, which are on this machine."""
SLURM_S: Final = 60.0
"""Interval between looks at the job's limit, which an administrator may change. Not shorter, since
the controller serves the whole cluster."""
NOTICE_S: Final = 5.0
"""Interval between looks for a spot notice, as AWS recommends; the shortest notice is 30 s."""
GOOGLE_NOTICE_S: Final = 30.0
_NO_END: Final = ("", "N/A", "NONE", "UNLIMITED", "UNKNOWN")


@dataclass(frozen=True, slots=True)
class Ending:
    """When this machine or job will be gone (Unix time), and why, for people."""

    at: float
    why: str


class Source(Protocol):
    """A source that may know the end."""

    @property
    def name(self) -> str:
        """Its name in the log."""

    @property
    def every_s(self) -> float:
        """Interval between two questions."""

    def ask(self) -> Ending | None:
        """What it knows now. Raises SourceError if it cannot be asked."""


class SourceError(Exception):
    """A source did not answer as it should; the message says what it did instead."""


class Fixed:
    """An end that an option gives."""

    every_s = float("inf")

    def __init__(self, at: float, why: str) -> None:
        self.name = why
        self._ending = Ending(at, why)

    def ask(self) -> Ending | None:
        return self._ending


# --- Slurm ----------------------------------------------------------------------------------------


class Slurm:
    """The time limit of the job in which this process runs."""

    name = "slurm"
    every_s = SLURM_S

    def __init__(self, job: str, end_time: str = "") -> None:
        """`end_time`: SLURM_JOB_END_TIME, which releases before 22.11 do not set."""
        self._why = f"Slurm job {job}"
        self._job = job
        self._given = float(end_time) if end_time.isdigit() else None
        self._asked = False

    def ask(self) -> Ending | None:
        at = self._given
        if shutil.which("squeue"):
            try:
                said = _run(["squeue", "-h", "-j", self._job, "-o", "%e"]).strip()
                at = None if said in _NO_END else datetime.fromisoformat(said).timestamp()
                self._asked = True
            except (SourceError, ValueError) as error:
                # The limit may have been changed since the job began: what squeue said counts.
                if self._asked or self._given is None:
                    raise SourceError(f"squeue does not say when the job ends: {error}") from None
        return None if at is None else Ending(at, self._why)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SourceError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise SourceError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[:200]}")
    return done.stdout


# --- clouds ---------------------------------------------------------------------------------------


class _Metadata:
    """A cloud's metadata service: plain HTTP to a link-local address, never through a proxy."""

    every_s = NOTICE_S

    def __init__(self, address: str) -> None:
        self._address = address
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def _get(self, path: str, headers: dict[str, str], method: str = "GET") -> str | None:
        """The answer's text; None for 404, which means "nothing of that kind"."""
        request = urllib.request.Request(self._address + path, headers=headers, method=method)
        try:
            with self._open(request, timeout=ANSWER_S) as answer:
                return str(answer.read(1 << 20).decode())
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise SourceError(f"{path} answered {error.code}") from None
        except (OSError, ValueError, HTTPException) as error:
            cause = str(error) or type(error).__name__
            raise SourceError(f"{self._address} does not answer: {cause}") from None


class Aws(_Metadata):
    """EC2 Spot: `spot/instance-action` gives the time, two minutes ahead (IMDSv2)."""

    name = "aws"

    def __init__(self, address: str = "http://169.254.169.254") -> None:
        super().__init__(address)

    def ask(self) -> Ending | None:
        token = self._get(
            "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT"
        )
        if not token:
            raise SourceError("the metadata service returns no token")
        said = self._get(
            "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}
        )
        if said is None:
            return None
        try:
            notice = json.loads(said)
            at = datetime.fromisoformat(notice["time"]).timestamp()
            return Ending(at, f"spot notice: {notice['action']}")
        except (ValueError, KeyError, TypeError) as error:
            raise SourceError(f"unreadable notice: {said[:200]!r} ({error})") from None


class Gcp(_Metadata):
    """Compute Engine: `preempted` turns TRUE, and the machine is stopped 30 s later."""

    name = "gcp"
    every_s = 1.0  # the notice is 30 s long, and none of it should be lost

    def __init__(self, address: str = "http://metadata.google.internal") -> None:
        super().__init__(address)
        self._since: float | None = None

    def ask(self) -> Ending | None:
        said = self._get("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        if said is None or said.strip() not in ("TRUE", "FALSE"):
            raise SourceError(f"instance/preempted says {said!r}")
        if said.strip() == "FALSE":
            self._since = None
            return None
        if self._since is None:
            self._since = time.time()
        return Ending(self._since + GOOGLE_NOTICE_S, "spot notice: preempted")


class Azure(_Metadata):
    """Scheduled Events: Preempt (30 s before), Terminate, Reboot, Redeploy of this machine."""

    name = "azure"
    _ENDS: Final = frozenset(("Preempt", "Terminate", "Reboot", "Redeploy"))
    _HEADERS: Final = {"Metadata": "true"}

    def __init__(self, address: str = "http://169.254.169.254") -> None:
        super().__init__(address)
        self._machine: str | None = None
        self._started: dict[str, float] = {}

    def ask(self) -> Ending | None:
        if self._machine is None:
            path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._machine = (self._get(path, self._HEADERS) or "").strip()
        said = self._get("/metadata/scheduledevents?api-version=2020-07-01", self._HEADERS)
        try:
            events = json.loads(said or "{}").get("Events", [])
            ends = [
                Ending(self._time(event), f"spot notice: {event['EventType']}")
                for event in events
                if event["EventType"] in self._ENDS
                and (not self._machine or self._machine in event.get("Resources", ()))
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceError(f"unreadable events: {str(said)[:200]!r} ({error})") from None
        return min(ends, key=lambda ending: ending.at, default=None)

    def _time(self, event: dict[str, str]) -> float:
        """When an event takes place, Unix time. One that has started names no time, and may take
        effect at once."""
        if event.get("NotBefore"):
            at = parsedate_to_datetime(event["NotBefore"])
            return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        return self._started.setdefault(event["EventId"], time.time())


CLOUDS: Final[Mapping[str, Callable[[], Source]]] = {"aws": Aws, "gcp": Gcp, "azure": Azure}


# --- anything else --------------------------------------------------------------------------------


class Command:
    """A command of the operator's that prints a time, the seconds left, or nothing."""

    name = "notice command"
    every_s = NOTICE_S

    def __init__(self, command: str) -> None:
        """`command`: split into words as by a shell, but run without one."""
        self._command = shlex.split(command)
        self._said = ""
        self._at = 0.0

    def ask(self) -> Ending | None:
        said = _run(self._command).strip()
        if not said:
            self._said = ""
            return None
        if said != self._said:
            # A command that still prints "30" five seconds later only repeats its notice.
            try:
                self._at = times.either(said, datetime.now())
            except ValueError as error:
                raise SourceError(f"{self._command[0]} says {error}") from None
            self._said = said
        return Ending(self._at, "notice")


def chosen(
    ends_at: float | None,
    clouds: tuple[str, ...],
    command: str | None,
    *,
    slurm: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> list[Source]:
    """The sources that options and environment ask for. `ends_at`: Unix time."""
    found: list[Source] = []
    if ends_at is not None:
        found.append(Fixed(ends_at, "the time set by its options"))
    job = environment.get("SLURM_JOB_ID", "")
    if slurm and job:
        found.append(Slurm(job, environment.get("SLURM_JOB_END_TIME", "")))
    found += [CLOUDS[cloud]() for cloud in clouds]
    if command:
        found.append(Command(command))
    return found
