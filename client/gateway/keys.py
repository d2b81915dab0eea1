"""API keys: a file of hashes with limits, re-read when it changes; rate and concurrency per key.

A key is 256 random bits, so a single SHA-256 is as good as a slow hash: guessing is hopeless. The
key itself is shown once, when it is made, and is in no file and no log.

    # keys.toml                                  python -m client.gateway keys add alice
    [keys.alice]
    hash = "sha256:..."
    rate_per_minute = 60        # requests; left out: no limit
    concurrency = 4             # requests at once; left out: no limit
    tokens_per_day = 1000000    # in and out, with `--usage FILE`; left out: no limit
    tokens_per_month = 9000000
    max_priority = 0            # highest `priority` that its requests may have
    operator = false            # may drain workers and see the operator's view
    many_users = false          # a front end for several people: fair sharing by its `user` field
    models = ["llava"]          # left out: every model
    expires = 2027-01-31        # left out: never
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import hmac
import logging
import math
import re
import secrets
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from broker.protocol.errors import ErrorCode
from broker.protocol.keyfiles import locked, replace_file
from client.gateway.errors import GatewayError

__all__ = ["ANYBODY", "Key", "KeyFile", "KeyFileError", "Usage", "add_key", "remove_key"]

log = logging.getLogger("tokenbus.gateway")

_PREFIX = "tb-"
_NAME = re.compile(r"^[A-Za-z0-9_-]{1,64}$")


class KeyFileError(Exception):
    """The key file cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True)
class Key:
    """A caller and its permissions."""

    name: str
    digest: bytes = b""
    rate_per_minute: float | None = None
    concurrency: int | None = None
    max_priority: int = 0
    operator: bool = False
    many_users: bool = False
    models: frozenset[str] | None = None
    expires: datetime.date | None = None
    #: Budgets of tokens, prompts and answers together.
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None

    @property
    def has_budget(self) -> bool:
        """Whether its tokens are limited."""
        return self.tokens_per_day is not None or self.tokens_per_month is not None

    def may_use(self, model: str) -> bool:
        """Whether the key may use the model: it has no list of models, or this one is on it."""
        return self.models is None or model in self.models


#: The key of a gateway without a key file.
ANYBODY = Key("", max_priority=100, operator=True, many_users=True)


@dataclass(slots=True)
class Usage:
    """Requests in flight of one key, and what is left of its rate: a bucket of one
    minute's requests."""

    running: int = 0
    #: Requests allowed right now; refilled at rate_per_minute / 60 per second.
    left: float = math.inf
    at_s: float = 0.0

    def admit(self, key: Key, now_s: float) -> None:
        """Count a request. Raises GatewayError(quota). `finished` must follow."""
        if key.concurrency is not None and self.running >= key.concurrency:
            raise GatewayError(
                ErrorCode.QUOTA,
                f"Key {key.name!r} has {self.running} requests running, which is its limit; wait "
                "until one has ended.",
                retryable=True,
                retry_after_ms=1000,
                details={"concurrency": key.concurrency},
            )
        if key.rate_per_minute is not None:
            per_s = key.rate_per_minute / 60
            burst = max(1.0, key.rate_per_minute)
            self.left = min(burst, min(self.left, burst) + (now_s - self.at_s) * per_s)
            self.at_s = now_s
            if self.left < 1:
                wait_ms = math.ceil((1 - self.left) / per_s * 1000)
                raise GatewayError(
                    ErrorCode.QUOTA,
                    f"Key {key.name!r} has used up its {key.rate_per_minute:g} requests per "
                    "minute; come "
                    f"back in {wait_ms / 1000:.1f} s.",
                    retryable=True,
                    retry_after_ms=wait_ms,
                    details={"rate_per_minute": key.rate_per_minute},
                )
            self.left -= 1
        self.running += 1

    def finished(self) -> None:
        """The request that `admit` counted is over."""
        self.running -= 1

    def uncount(self) -> None:
        """As if `admit` had not counted the request."""
        self.running -= 1
        self.left += 1

    def recount(self) -> None:
        """The request that `uncount` took back counts after all."""
        self.running += 1
        self.left -= 1


@dataclass(slots=True)
class KeyFile:
    """The keys of a file, re-read when it changes; if it cannot be used, the old
    keys stay valid."""

    path: Path
    #: Whether tokens are counted, without which a budget cannot be kept.
    counted: bool = True
    _keys: dict[bytes, Key] = field(default_factory=dict)
    _usage: dict[str, Usage] = field(default_factory=dict)
    #: Identity of the file when last checked; None while it does not exist.
    _version: tuple[int, ...] | None = None
    _try_again: bool = False
    #: Why the current version of the file was not accepted; empty if it was.
    problem: str = ""

    def __post_init__(self) -> None:
        self._look()
        if self.problem:
            raise KeyFileError(self.problem)

    def refresh(self) -> None:
        """Read the file again if it changed. Each version that cannot be used is logged once, and
        so is the version that repairs it."""
        version, problem = self._version, self.problem
        self._look()
        if self.problem and (self._version, self.problem) != (version, problem):
            # The file's content is escaped, so that it cannot forge a log line.
            told = ascii(self.problem)
            log.error("the key file cannot be used, the previous keys stay valid: %s", told)
        elif problem and not self.problem:
            log.info("the key file %s can be used again", self.path)

    def _look(self) -> None:
        try:
            status = self.path.stat()
            version = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
            if version == self._version and not self._try_again:
                return
            self._version, self._try_again = version, False
            keys = {key.digest: key for key in _read(self.path).values()}
            limited = [key.name for key in keys.values() if key.has_budget]
            if limited and not self.counted:
                raise KeyFileError(
                    f"{self.path}: key {limited[0]!r} has a budget of tokens, and none are "
                    "counted: start the gateway with --usage FILE"
                )
            self._keys = keys
            self.problem = ""
        except FileNotFoundError:
            self._version = None
            self.problem = f"{self.path} does not exist; make keys with `keys add NAME --file FILE`"
        except OSError as error:
            # The cause may be the machine (no descriptors left) and not the file.
            self._try_again = True
            self.problem = f"{self.path}: {error.strerror}"
        except KeyFileError as error:
            self.problem = str(error)

    def find(self, presented: str | None, today: datetime.date) -> Key:
        """The key presented. Raises GatewayError(unauthenticated)."""
        self.refresh()
        if not presented:
            raise GatewayError(
                ErrorCode.UNAUTHENTICATED,
                "No API key. Send it as `Authorization: Bearer KEY`.",
            )
        digest = hashlib.sha256(presented.encode()).digest()
        key = self._keys.get(digest)
        if key is None or not hmac.compare_digest(key.digest, digest):
            raise GatewayError(ErrorCode.UNAUTHENTICATED, "Unknown API key; ask for a new one.")
        if key.expires is not None and today > key.expires:
            raise GatewayError(
                ErrorCode.UNAUTHENTICATED, f"Key {key.name!r} expired on {key.expires}."
            )
        return key

    def named(self, name: str) -> Key | None:
        """The key of that name now, for what it began earlier."""
        self.refresh()
        return next((key for key in self._keys.values() if key.name == name), None)

    def usage(self, key: Key) -> Usage:
        """The usage of a key; it survives edits of the file."""
        return self._usage.setdefault(key.name, Usage())

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())


def _read(path: Path) -> dict[str, Key]:
    return _parse(path, _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise KeyFileError(f"{path}: {error}") from None


def _parse(path: Path, text: str) -> dict[str, Key]:
    """The keys of a file with this text. Raises KeyFileError."""
    try:
        tables = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise KeyFileError(f"{path}: {error}") from None
    unknown = set(tables) - {"keys"}
    if unknown:
        raise KeyFileError(f"{path}: {sorted(unknown)[0]!r} is not known; write [keys.NAME] tables")
    keys = tables.get("keys", {})
    if not isinstance(keys, dict):
        raise KeyFileError(f"{path}: write [keys.NAME] tables")
    found = {}
    for name, values in keys.items():
        found[name] = _key(path, name, values)
    return found


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "hash": str,
    "rate_per_minute": (int, float),
    "concurrency": int,
    "max_priority": int,
    "operator": bool,
    "many_users": bool,
    "models": list,
    "expires": datetime.date,
    "tokens_per_day": int,
    "tokens_per_month": int,
}


def _key(path: Path, name: str, values: Any) -> Key:
    where = f"{path}: [keys.{name}]"
    if not isinstance(values, dict):
        raise KeyFileError(f"{where} must be a table")
    for item, value in values.items():
        kinds = _FIELDS.get(item)
        if kinds is None:
            raise KeyFileError(f"{where}: {item!r} is not known")
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise KeyFileError(f"{where}: {item} has a wrong type")
    for item in ("rate_per_minute", "concurrency", "tokens_per_day", "tokens_per_month"):
        if item in values and not 0 < values[item] < math.inf:
            raise KeyFileError(f"{where}: {item} must be above 0; leave it out for no limit")
    scheme, _, digits = str(values.get("hash", "")).partition(":")
    try:
        digest = bytes.fromhex(digits)
    except ValueError:
        digest = b""
    if scheme != "sha256" or len(digest) != 32:
        raise KeyFileError(
            f"{where}: hash must be sha256: and 64 hex digits, as `keys add` makes it"
        )
    return Key(
        name=name,
        digest=digest,
        rate_per_minute=values.get("rate_per_minute"),
        concurrency=values.get("concurrency"),
        max_priority=values.get("max_priority", 0),
        operator=values.get("operator", False),
        many_users=values.get("many_users", False),
        models=frozenset(map(str, values["models"])) if "models" in values else None,
        expires=values.get("expires"),
        tokens_per_day=values.get("tokens_per_day"),
        tokens_per_month=values.get("tokens_per_month"),
    )


def add_key(
    path: Path,
    name: str,
    *,
    rate_per_minute: float | None = None,
    concurrency: int | None = None,
    max_priority: int = 0,
    operator: bool = False,
    many_users: bool = False,
    models: list[str] | None = None,
    tokens_per_day: int | None = None,
    tokens_per_month: int | None = None,
) -> str:
    """Append a new key to the file and return it; it cannot be seen again later."""
    if not _NAME.match(name):
        raise KeyFileError(
            f"{name!r} is not a name for a key: letters, digits, - and _, at most 64"
        )
    presented = _PREFIX + secrets.token_urlsafe(32)
    lines = [
        f"[keys.{name}]",
        f'hash = "sha256:{hashlib.sha256(presented.encode()).hexdigest()}"',
    ]
    if rate_per_minute is not None:
        lines.append(f"rate_per_minute = {rate_per_minute:g}")
    if concurrency is not None:
        lines.append(f"concurrency = {concurrency}")
    if tokens_per_day is not None:
        lines.append(f"tokens_per_day = {tokens_per_day}")
    if tokens_per_month is not None:
        lines.append(f"tokens_per_month = {tokens_per_month}")
    if max_priority:
        lines.append(f"max_priority = {max_priority}")
    if operator:
        lines.append("operator = true")
    if many_users:
        lines.append("many_users = true")
    if models:
        lines.append(f"models = [{', '.join(_toml_string(model) for model in models)}]")
    with _changing(path, may_be_new=True):
        old = _text(path) if path.exists() else ""
        if name in _parse(path, old):
            raise KeyFileError(f"{path} already has a key {name!r}; remove it first")
        text = f"{old.rstrip()}\n\n{chr(10).join(lines)}\n".lstrip()
        _parse(path, text)  # what could not be read again would be no file of keys at all
        replace_file(path, text)
    return presented


def remove_key(path: Path, name: str) -> None:
    """Remove a key from the file; gateways using the file refuse it from the next request on."""
    with _changing(path):
        old = _text(path)
        if name not in _parse(path, old):
            raise KeyFileError(f"{path} has no key {name!r}")
        kept: list[str] = []
        inside = False
        for line in old.splitlines():
            if line.lstrip().startswith("["):
                inside = line.strip().split("#")[0].strip() == f"[keys.{name}]"
            if not inside:
                kept.append(line)
        text = "\n".join(kept).strip() + "\n"
        if name in tomllib.loads(text).get("keys", {}):
            raise KeyFileError(f"{path}: remove the table of {name!r} by hand")
        replace_file(path, text.lstrip())


@contextlib.contextmanager
def _changing(path: Path, *, may_be_new: bool = False) -> Iterator[None]:
    """Nobody else changes the file meanwhile. Raises `KeyFileError`, also where the file cannot be
    read or written inside."""
    try:
        if may_be_new:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            path.stat()
        with locked(path.with_name(f".{path.name}.lock")):
            yield
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror or error}") from None


def _toml_string(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
