"""CURVE: key files, allow-lists, and the gate that every connection must pass (ZeroMQ RFC 26, 27).

A folder made by `python -m broker keys` holds the broker's key pair, key pairs to hand out, and one
allow-list for each kind of peer. Files use pyzmq's certificate format. The gate runs inside the
broker's loop, not in a thread of its own, so it cannot die unnoticed. Secret keys are never logged.
Import it only where keys are used: pyzmq's certificates load asyncio.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import zmq
import zmq.auth
from zmq.utils import z85

from broker.config import StartError
from broker.core.events import AccessChanged, Side
from broker.log import Logger
from broker.protocol.keyfiles import exposed, locked, replace_file
from broker.protocol.refusals import WrongKeys

ROLES: Final = ("client", "worker", "operator")
DOMAINS: Final = {Side.FRONT: b"front", Side.BACK: b"back"}
"""One ZAP domain for each socket. Without a domain, libzmq never asks the gate."""
ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
ZAP_VERSION: Final = b"1.0"
UNTIL: Final = "until="
"""Before the end of an entry of an allow-list."""
LOOK_S: Final = 1.0
"""Between two looks whether a list has changed; it is read once it has stayed the same for one."""
LOGGED_A_SECOND: Final = 10
"""More refusals than this are only counted: a stranger must not fill the disk."""
GATE_BATCH: Final = 64
LONGEST_REFUSAL_S: Final = 4.0
"""Longest delay before a wrong key is answered: below the 5 s that a handshake may take, so that
the peer hears the reason."""
MAX_DELAYED: Final = 1024
"""Refusals that may wait at once; with more, the oldest is answered early."""


class KeyFileError(StartError):
    """Keys or allow-lists cannot be used; the message says which file, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of an allow-list."""

    name: str
    #: Unix time; infinity: until somebody removes it.
    until: float = math.inf


@dataclass(frozen=True, slots=True)
class AllowLists:
    """The entries of Z85 public keys."""

    clients: dict[str, Entry]
    workers: dict[str, Entry]
    operators: dict[str, Entry]

    @property
    def next_end(self) -> float:
        """Unix time at which the next entry ends."""
        tables = self.clients, self.workers, self.operators
        return min((entry.until for table in tables for entry in table.values()), default=math.inf)

    def without_ended(self, now: float) -> AllowLists:
        """Without the entries that have ended by a Unix time."""
        clients, workers, operators = (
            {key: entry for key, entry in table.items() if entry.until > now}
            for table in (self.clients, self.workers, self.operators)
        )
        return AllowLists(clients, workers, operators)

    def admit(self, key: str, side: Side, now: float) -> bool:
        """Whether a key may connect at a socket; operators come in at the front."""
        tables = (self.workers,) if side is Side.BACK else (self.clients, self.operators)
        return any(key in table and table[key].until > now for table in tables)

    def as_event(self) -> AccessChanged:
        """What the core needs to know."""
        return AccessChanged(
            clients=frozenset(self.clients | self.operators),
            workers=frozenset(self.workers),
            operators=frozenset(self.operators),
        )


def load_broker_key(folder: Path) -> tuple[bytes, bytes]:
    """Public and secret key of the broker. Raises `KeyFileError`."""
    path = folder / "broker.key_secret"
    try:
        if why := exposed(path):
            raise KeyFileError(why)
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise KeyFileError(f"{path}: {reason}; make keys: python -m broker keys {folder}") from None
    except ValueError as error:
        raise KeyFileError(f"{path} is not a key file: {error}") from None
    if secret is None:
        raise KeyFileError(f"{path} holds no secret key; make keys: python -m broker keys {folder}")
    return public, secret


def fresh_pair() -> tuple[str, str]:
    """Public and secret key, in Z85, of a peer that this process starts itself."""
    public, secret = zmq.curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


def load_allow_lists(folder: Path) -> AllowLists:
    """All three lists, without entries that have ended. Raises `KeyFileError`."""
    clients, workers, operators = (_load_list(_list_of(folder, role)) for role in ROLES)
    return AllowLists(clients, workers, operators).without_ended(time.time())


def _list_of(folder: Path, role: str) -> Path:
    return folder / f"{role}s.allow"


def _load_list(path: Path) -> dict[str, Entry]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = error.strerror or str(error)
        raise KeyFileError(
            f"{path}: {reason}; make lists: python -m broker keys {path.parent}"
        ) from None
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: {error}") from None
    allowed = {}
    for number, line in enumerate(lines, 1):
        key, _, about = line.strip().partition(" ")
        # Z85 uses "#" too, so a comment is a line that begins with it and is not a key.
        if not key or (key.startswith("#") and len(key) != 40):
            continue
        if len(key) != 40:
            raise KeyFileError(f"{path} line {number}: a public key has 40 characters of Z85")
        try:
            allowed[key] = _entry(about.strip())
        except ValueError as error:
            raise KeyFileError(f"{path} line {number}: {error}") from None
    return allowed


def _entry(about: str) -> Entry:
    """What follows a key: the owner's name, and when the entry ends if it does."""
    name, mark, end = about.rpartition(UNTIL)
    if not mark:
        return Entry(about)
    try:
        until = datetime.fromisoformat(end).timestamp()
    except ValueError:
        raise ValueError(f"{UNTIL}{end}: not a date such as 2026-12-31T18:00:00Z") from None
    return Entry(name.strip(), until)


def names(folder: Path) -> dict[str, tuple[str, float | None]]:
    """Role and end of everybody on the lists, by name. Raises `KeyFileError`."""
    found: dict[str, tuple[str, float | None]] = {}
    for role in ROLES:
        for entry in _load_list(_list_of(folder, role)).values():
            found[entry.name] = role, None if entry.until == math.inf else entry.until
    return found


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Nobody else changes the files of a key folder meanwhile. Raises `KeyFileError`, also where a
    file cannot be read or written inside."""
    try:
        with locked(folder / ".lock"):
            yield
    except OSError as error:
        raise KeyFileError(f"{error.filename or folder}: {error.strerror or error}") from None


def allow(folder: Path, role: str, public: str, name: str, until: float | None) -> None:
    """Add a key to a list, until a Unix time. The caller is `changing` the folder. Raises
    OSError."""
    path = _list_of(folder, role)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if old and not old.endswith("\n"):
        old += "\n"
    end = (
        "" if until is None else f" {UNTIL}{datetime.fromtimestamp(until, UTC):%Y-%m-%dT%H:%M:%SZ}"
    )
    replace_file(path, f"{old}{public} {name}{end}\n")


def forbid(folder: Path, name: str) -> list[str]:
    """Remove all keys of this name; returns the names of the lists that had one. The caller is
    `changing` the folder. Raises OSError and `KeyFileError`."""
    changed = []
    for role in ROLES:
        path = _list_of(folder, role)
        gone = {key for key, entry in _load_list(path).items() if entry.name == name}
        if gone:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if line.strip().partition(" ")[0] not in gone]
            replace_file(path, "".join(f"{line}\n" for line in kept))
            changed.append(path.name)
    return changed


def protect(socket: zmq.Socket[bytes], side: Side, secret: bytes) -> None:
    """Require CURVE and the gate's consent for every peer. Must be called before `bind`."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAINS[side])
    # Without this, a missing gate would let everyone in.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


class Gate:
    """Answers ZAP requests from the allow-lists. Make it before the sockets are bound."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        folder: Path,
        log: Logger,
        relay_key: str | None = None,
    ) -> None:
        """`relay_key`: public key of this broker's own relay, a client that is on no list.
        Raises `KeyFileError`."""
        self._folder = folder
        self._log = log
        self._relay = {relay_key: Entry("this broker's relay")} if relay_key else {}
        self._read = self._seen = self._signature()
        self._allowed = self._load()
        #: Why the lists could not be read last time; empty if they could.
        self._problem = ""
        #: Keys were added that the core has not been told of.
        self._added = False
        #: When `look` is due next.
        self.look_s = -math.inf
        #: Polled by the loop, which calls `answer` when it is readable. Not a REP socket: there,
        #: one delayed refusal would hold up everybody else.
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ENDPOINT)
        self.refused = 0
        self._wrong = WrongKeys(LONGEST_REFUSAL_S)
        #: Refusals, with the time at which they go out and a number; a heap.
        self._delayed: list[tuple[float, int, list[bytes]]] = []
        self._numbers = itertools.count()
        self._second = 0
        self._logged = 0

    def _load(self) -> AllowLists:
        lists = load_allow_lists(self._folder)
        return replace(lists, clients=lists.clients | self._relay)

    def event(self) -> AccessChanged:
        """The lists as they are now."""
        return self._allowed.as_event()

    def reload(self) -> AccessChanged | None:
        """Read the lists again. If they are broken, the old ones stay in force until each entry
        ends. Returns None if nothing has changed."""
        self._problem = ""
        return self._reload()

    def _reload(self) -> AccessChanged | None:
        self._read = self._signature()
        try:
            self._allowed = self._load()
        except KeyFileError as error:
            if str(error) != self._problem:
                self._problem = str(error)
                fields = {"why": self._problem, "meanwhile": "the entries read before count"}
                self._log("warning", "allow-lists not reloaded", fields)
            return self._expire()
        self._problem = ""
        allowed = self._allowed
        counts = {f"{role}s": len(getattr(allowed, f"{role}s")) for role in ROLES}
        self._log("info", "allow-lists reloaded", counts)
        return allowed.as_event()

    def _expire(self) -> AccessChanged | None:
        """Apply the ends of entries, for which no file is read: whatever state it is in."""
        now = time.time()
        if now < self._allowed.next_end:
            return None
        self._allowed = self._allowed.without_ended(now)
        self._log("info", "entries of the allow-lists have ended")
        return self.event()

    def _is_new(self, key: str, side: Side) -> bool:
        """Whether a key was added since the lists were read: whoever is invited may come at once.
        What else has changed waits for `look`."""
        if self._signature() == self._read:
            return False
        try:
            fresh = self._load()
        except KeyFileError:
            return False
        if not fresh.admit(key, side, time.time()):
            return False
        old = self._allowed
        self._allowed = AllowLists(
            old.clients | fresh.clients,
            old.workers | fresh.workers,
            old.operators | fresh.operators,
        )
        self._added, self.look_s = True, -math.inf
        return True

    def look(self, now_s: float) -> AccessChanged | None:
        """Whether the lists have changed, or an entry has ended; what may connect now."""
        self.look_s = now_s + LOOK_S
        seen, before = self._signature(), self._seen
        self._seen = seen
        ended = self._expire()
        if self._added:
            self._added = False
            return self.event()
        # An editor may empty a file before it writes it: not the first sight of a change counts.
        # Broken lists are read again: the cause may be the machine (no descriptors left).
        if seen == before and (seen != self._read or self._problem):
            return self._reload() or ended
        return ended

    def _signature(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_version(_list_of(self._folder, role)) for role in ROLES)

    @property
    def due_s(self) -> float:
        """When `answer` must be called even if the socket is not readable."""
        return self._delayed[0][0] if self._delayed else math.inf

    def answer(self, now_s: float) -> None:
        """Answer a bounded number of requests: permitted keys at once, refusals after a delay."""
        while self._delayed and (
            self._delayed[0][0] <= now_s or len(self._delayed) > MAX_DELAYED - GATE_BATCH
        ):
            self.socket.send_multipart(heapq.heappop(self._delayed)[2])
        for _ in range(GATE_BATCH):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            route, request = frames[:2], frames[2:]  # with the empty frame that a REQ expects
            verdict = self._decide(request)
            answer = [*route, *verdict]
            if verdict[2] == b"200":
                self.socket.send_multipart(answer)
            else:
                address = request[3].decode("utf-8", "replace") if len(request) > 3 else ""
                due_s = now_s + self._wrong.wait_s(address, now_s)
                heapq.heappush(self._delayed, (due_s, next(self._numbers), answer))

    def _decide(self, frames: Sequence[bytes]) -> list[bytes]:
        if len(frames) < 6 or frames[0] != ZAP_VERSION:
            request_id = frames[1] if len(frames) > 1 else b""
            return [ZAP_VERSION, request_id, b"500", b"not ZAP 1.0", b"", b""]
        request_id, domain, address, _, mechanism = frames[1:6]
        side = next((side for side, name in DOMAINS.items() if name == domain), None)
        if side is None or mechanism != b"CURVE" or len(frames) != 7 or len(frames[6]) != 32:
            return [ZAP_VERSION, request_id, b"400", b"CURVE is needed here", b"", b""]
        key = z85.encode(frames[6]).decode("ascii")
        if self._allowed.admit(key, side, time.time()) or self._is_new(key, side):
            return [ZAP_VERSION, request_id, b"200", b"welcome", key.encode(), b""]
        self._log_refusal(side, address.decode("utf-8", "replace"), key)
        return [ZAP_VERSION, request_id, b"400", b"key is not on the allow-list", b"", b""]

    def _log_refusal(self, side: Side, address: str, key: str) -> None:
        self.refused += 1
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._logged = second, 0
        self._logged += 1
        if self._logged > LOGGED_A_SECOND:
            return
        allow_list = "workers.allow" if side is Side.BACK else "clients.allow"
        fields = {"side": side.value, "address": address, "key": key, "add_to": allow_list}
        self._log("warning", "key refused", fields)


def _version(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the file does; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# --- python -m broker keys ------------------------------------------------------------------------


def keys_command(arguments: Sequence[str], *, program: str) -> str:
    """Make the missing files of a key folder, or add a peer. Returns a message for the user.
    Raises `KeyFileError`."""
    parser = _keys_parser(program)
    options = parser.parse_args(arguments)
    if options.name and not options.add:
        parser.error("--name needs --add: client, worker or operator")
    folder = Path(options.folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise KeyFileError(f"{folder}: {error.strerror or error}") from None
    with changing(folder):
        if options.add:
            name = options.name or options.add
            check_name(name)
            if not (folder / "broker.key").exists():
                raise KeyFileError(f"{folder} holds no broker key; first run: {program} {folder}")
            created = [_add_peer(folder, options.add, name)]
        else:
            created = _make_all(folder)
    if not created:
        return f"{folder} is complete; nothing was changed. --add ROLE --name NAME adds a peer."
    lines = [f"  {line}" for line in created]
    start = f"start the broker:  python -m broker --keys {folder}"
    if options.add:
        start += "   (one that runs already reads the lists by itself)"
    return "\n".join(
        [
            f"made in {folder} (readable by you alone):",
            *lines,
            start,
            "hand out:          broker.key, and to each peer its own .key_secret file",
        ]
    )


_A = {"client": "a client", "worker": "a worker", "operator": "an operator"}


def _keys_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Make CURVE keys and allow-lists for a broker and its peers, or add a peer. "
        "What exists is never overwritten. A running broker reads the lists again when they "
        "change, on SIGHUP, and on the operator's bus.reload.",
    )
    parser.add_argument("folder", help="folder for the keys; created if missing")
    parser.add_argument("--add", choices=ROLES, help="make one more key pair of this kind")
    parser.add_argument("--name", help="name of the new peer and of its files")
    return parser


def check_name(name: str) -> None:
    """Raises `KeyFileError` for a name that files cannot have."""
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum() or name[0] == ".":
        raise KeyFileError(f"{name!r}: a name is letters, digits, dots, dashes and underscores")


def _make_all(folder: Path) -> list[str]:
    created = []
    if not (folder / "broker.key_secret").exists():
        _make_pair(folder, "broker")
        created.append("broker.key_secret     the broker's own; never leaves this machine")
        created.append("broker.key            the broker's public key; every peer needs it")
    for role in ROLES:
        path = folder / f"{role}s.allow"
        if not path.exists():
            replace_file(path, f"# public keys of {role}s, one per line: KEY NAME\n")
            created.append(f"{path.name.ljust(21)} allow-list of {role}s")
            if not (folder / f"{role}.key_secret").exists():
                created.append(_add_peer(folder, role, role))
    return created


def _add_peer(folder: Path, role: str, name: str) -> str:
    if (folder / f"{name}.key_secret").exists():
        raise KeyFileError(f"{folder / name}.key_secret exists; choose another --name")
    public = _make_pair(folder, name)
    allow(folder, role, public, name, None)
    path = _list_of(folder, role)
    return f"{(name + '.key_secret').ljust(21)} for {_A[role]}; on the list {path.name}"


def _make_pair(folder: Path, name: str) -> str:
    old_mask = os.umask(0o077)
    try:
        public_file, secret_file = zmq.auth.create_certificates(folder, name)
    finally:
        os.umask(old_mask)
    for file in (public_file, secret_file):
        Path(file).chmod(0o600)
    public: Any = zmq.auth.load_certificate(public_file)[0]
    return str(public.decode("ascii"))
