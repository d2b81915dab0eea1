"""Responses in a folder that several gateways share (`--response-folder`).

    FOLDER/ID.json      who asked, and what; once it is over, how it ended
    FOLDER/ID.events    of one in the background: its events, locked by the gateway that makes them

What is over is read, gone on from and deleted at any of them. An event is in the file before any
reader gets it: a gateway that finds the lock free finishes the response behind the last one, and
the numbers that readers know stay those of their events. When the folder is full, the oldest that
are over make room. Must never hold a response up: a folder that cannot be written is told in the
log, and the response is then its gateway's alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from client.gateway import requests as http
from client.gateway.config import ConfigError
from client.gateway.openai.responses_body import ResponseRequest

__all__ = ["Found", "Journal", "Record", "ResponseFolder"]

log = logging.getLogger("tokenbus.gateway")

_ID: Final = re.compile(r"resp_[0-9a-f]{40}")
KEPT_S: Final = 30 * 24 * 3600.0
"""How long a response is in the folder, as at OpenAI."""
TIDY_S: Final = 3600.0
_LOOK_S: Final = 10.0
#: Of its bound the folder is looked through again after so much was written here.
_LOOK_SHARE: Final = 64
#: And so much of it is free when room was made.
_FREE_SHARE: Final = 16


class Record(Struct, kw_only=True):
    """A response as the folder has it."""

    #: The key that asked; no other may see it.
    owner: str
    body: ResponseRequest
    #: With everything that was said before.
    chat: http.ChatRequest
    #: Of the request.
    size_bytes: int
    #: As it ended; None while it runs, or if its gateway was lost.
    final: dict[str, Any] | None = None


class _Ending(Struct):
    """Whether a record's response is over."""

    final: msgspec.Raw = msgspec.Raw(b"null")


_DECODER: Final = msgspec.json.Decoder(Record)
_ENDING: Final = msgspec.json.Decoder(_Ending)


class Journal:
    """The events of a response that this gateway makes."""

    def __init__(self, path: Path) -> None:
        """Raises OSError; BlockingIOError if another gateway makes it."""
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise
        self._broken = False

    def events(self) -> list[bytes]:
        """Those that are there; one that was cut is forgotten, for nobody has it."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n\n") + 2] if b"\n\n" in data else b""
        os.ftruncate(self._file, len(whole))
        return _events(whole)

    def add(self, events: Sequence[bytes]) -> None:
        """Write them, before a reader gets them."""
        if self._broken:
            return
        data = b"".join(events)
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            # Behind a gap no other gateway may go on.
            self._broken = True
            for path in (self._path.with_suffix(".json"), self._path):
                with contextlib.suppress(OSError):
                    path.unlink(missing_ok=True)
            log.error("--response-folder cannot be written: %s", error.strerror)

    def close(self) -> None:
        """Another gateway may go on."""
        os.close(self._file)


@dataclass(slots=True)
class Found:
    """A response that is not in this gateway's memory."""

    record: Record
    #: None: it was not in the background.
    events: list[bytes] | None
    #: Of one that is to be finished here.
    journal: Journal | None = None


@dataclass(slots=True)
class _Entry:
    """A response's files, as far as they are there."""

    id: str
    size_bytes: int = 0
    written_s: float = 0.0


@dataclass(slots=True)
class ResponseFolder:
    """The folder."""

    path: Path
    max_bytes: int
    #: While one is taken in, so that no two requests take the same.
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)
    #: Since it was looked through.
    _written_bytes: int = 0
    _told_full: bool = False

    def open(self) -> None:
        """Make it, and forget what is old. Raises ConfigError."""
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.tidy()
        except OSError as error:
            raise ConfigError(f"--response-folder {self.path}: {error.strerror}") from None

    def begin(self, id_: str, record: Record) -> Journal | None:
        """A response in the background begins; None if the folder cannot be written."""
        try:
            journal = Journal(self._events_of(id_))
        except OSError as error:
            log.error("--response-folder cannot be written: %s", error.strerror)
            return None
        self.keep(id_, record)
        return journal

    def keep(self, id_: str, record: Record) -> bool:
        """Write what is known of a response; whether that was possible."""
        place = self._record_of(id_)
        beside = place.with_suffix(f".{os.getpid()}")
        try:
            data = msgspec.json.encode(record)
            beside.touch(0o600)
            beside.write_bytes(data)
            beside.rename(place)
            with contextlib.suppress(FileNotFoundError):
                self._written_bytes += self._events_of(id_).stat().st_size
            self._written_bytes += len(data)
        except OSError as error:
            log.error("--response-folder cannot be written: %s", error.strerror)
            return False
        return True

    def has(self, id_: str) -> bool:
        """Whether it is (still) in the folder."""
        return self._record_of(id_).exists()

    def find(self, id_: str, owner: str) -> Found | None:
        """A response of this key that no other gateway is making."""
        if _ID.fullmatch(id_) is None:
            return None
        try:
            record = self._read(id_, owner)
            if record is None:
                return None
            if record.final is None:
                journal = Journal(self._events_of(id_))
                # It may have ended before the lock was free.
                record = self._read(id_, owner)
                if record is not None and record.final is None:
                    return Found(record, journal.events(), journal)
                journal.close()
        except BlockingIOError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            log.error("response %s cannot be read from --response-folder: %s", id_, error)
            return None
        if record is None:
            return None
        try:
            return Found(record, _events(self._events_of(id_).read_bytes()))
        except FileNotFoundError:
            return Found(record, None)

    def drop(self, id_: str) -> None:
        """Forget a response."""
        for path in (self._record_of(id_), self._events_of(id_)):
            path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Forget what is older than `KEPT_S`, and what is too much."""
        self._written_bytes = 0
        until_s, entries = time.time() - KEPT_S, dict[str, _Entry]()
        for path in self.path.iterdir():
            if _ID.fullmatch(path.stem) is None:
                continue
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                if found.st_mtime < until_s:
                    path.unlink()
                    continue
                entry = entries.setdefault(path.stem, _Entry(path.stem))
                entry.size_bytes += found.st_size
                entry.written_s = max(entry.written_s, found.st_mtime)
        used_bytes = sum(entry.size_bytes for entry in entries.values())
        if used_bytes > self.max_bytes:
            oldest_first = sorted(entries.values(), key=lambda entry: entry.written_s)
            self._make_room(oldest_first, used_bytes)

    def _make_room(self, entries: Sequence[_Entry], used_bytes: int) -> None:
        """Remove the oldest responses that are over; then those that nobody finished when their
        gateway was lost."""
        if not self._told_full:
            self._told_full = True
            log.warning(
                "--response-folder is full (%d of %d bytes, --response-bytes): the oldest "
                "responses make room from now on",
                used_bytes,
                self.max_bytes,
            )
        enough_bytes = self.max_bytes - self.max_bytes // _FREE_SHARE
        left = list(entries)
        for may_be_open in (False, True):
            kept: list[_Entry] = []
            for entry in left:
                if used_bytes > enough_bytes and self._remove(entry.id, may_be_open=may_be_open):
                    used_bytes -= entry.size_bytes
                else:
                    kept.append(entry)
            left = kept

    def _remove(self, id_: str, *, may_be_open: bool) -> bool:
        """Forget a response that no gateway makes; whether that is so. `may_be_open`: even if it is
        not over."""
        journal = None
        try:
            if self._events_of(id_).exists():
                journal = Journal(self._events_of(id_))
            if not (may_be_open or self._is_over(id_)):
                return False
            self.drop(id_)
            return True
        except OSError:  # being made, or gone
            return False
        finally:
            if journal is not None:
                journal.close()

    def _is_over(self, id_: str) -> bool:
        try:
            ending = _ENDING.decode(self._record_of(id_).read_bytes())
        except (FileNotFoundError, msgspec.DecodeError):
            return True  # of no use to anybody
        return bytes(ending.final) != b"null"

    async def tidy_loop(self) -> None:
        """Until cancelled."""
        tidied_s = time.monotonic()
        while True:
            await asyncio.sleep(_LOOK_S)
            due = time.monotonic() - tidied_s >= TIDY_S
            if not due and self._written_bytes < self.max_bytes // _LOOK_SHARE:
                continue
            tidied_s = time.monotonic()
            with contextlib.suppress(OSError):
                await asyncio.to_thread(self.tidy)

    def _read(self, id_: str, owner: str) -> Record | None:
        try:
            record = _DECODER.decode(self._record_of(id_).read_bytes())
        except FileNotFoundError:
            return None
        return record if record.owner == owner else None

    def _record_of(self, id_: str) -> Path:
        return self.path / f"{id_}.json"

    def _events_of(self, id_: str) -> Path:
        return self.path / f"{id_}.events"


def _events(data: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in data.split(b"\n\n")[:-1]]
