"""The two files of a batch: OpenAI batch lines in, answer lines out, one JSON object per line.

The answers are the only record of what is done: a line is there completely or not at all. Must
never lose an answer that was written, nor hold either file in memory.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Self

import msgspec
from msgspec import Meta, Struct

from client import InvalidRequest

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]

_BLOCK_BYTES: Final = 1 << 16


class Line(Struct, forbid_unknown_fields=True, kw_only=True):
    """A line of the input."""

    custom_id: Annotated[str, Meta(min_length=1, max_length=512)]
    method: Literal["POST"]
    url: Endpoint
    #: Kept as bytes until the endpoint's own type decodes it.
    body: msgspec.Raw


class _Written(Struct):
    """The status of a line of the output; everything else in it is skipped."""

    custom_id: str
    response: _Response | None = None
    error: Any = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


class _Response(Struct):
    status_code: int = 0


_LINE: Final = msgspec.json.Decoder(Line)
_WRITTEN: Final = msgspec.json.Decoder(_Written)


def lines(path: Path) -> Iterator[Line]:
    """The lines of the input; empty ones are skipped. Raises `InvalidRequest` naming the line."""
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, 1):
                if data.strip():
                    yield _line(data, f"{path}, line {number}")
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None


def _line(data: bytes, where: str) -> Line:
    try:
        return _LINE.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f'{where}: {error}; a line is {{"custom_id": "a", "method": "POST", '
            '"url": "/v1/chat/completions", "body": {...}}'
        ) from None


def check(path: Path) -> set[str]:
    """The ids of the whole input. Raises `InvalidRequest` for any mistake, so that nothing of a
    faulty file is run."""
    ids: set[str] = set()
    for line in lines(path):
        if line.custom_id in ids:
            raise InvalidRequest(f"{path}: custom_id {line.custom_id!r} occurs twice")
        ids.add(line.custom_id)
    return ids


class Output:
    """The file of answers, locked while open. An incomplete last line, left by a run that was
    killed, is removed."""

    def __init__(self, path: Path, *, retry_failed: bool = False) -> None:
        """`retry_failed`: remove the lines of failed requests. Raises `InvalidRequest`."""
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror}") from None
        #: Length of the incomplete line that was removed, bytes.
        self.torn_bytes = 0
        #: Ids that are answered, and how many of them failed.
        self.done: set[str] = set()
        self.failed = 0
        try:
            self._lock()
            self._mend()
            self._read()
            if retry_failed and self.failed:
                self._drop_failed()
        except BaseException:
            self._file.close()
            raise

    def write(self, answer: dict[str, Any]) -> None:
        """Add a line."""
        self._file.write(msgspec.json.encode(answer) + b"\n")
        # From here on the operating system has the answer, whatever ends this process.
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidRequest(
                f"{self.path} is being written by another batch; wait for it or stop it"
            ) from None
        if os.fstat(self._file.fileno()).st_nlink == 0:
            raise InvalidRequest(f"{self.path} was replaced at this moment; try again")

    def _mend(self) -> None:
        """Remove an incomplete last line, unless only its line break is missing."""
        size = self._file.seek(0, os.SEEK_END)
        whole = self._end_of_last_line(size)
        if whole == size:
            return
        self._file.seek(whole)
        rest = self._file.read()
        try:
            _WRITTEN.decode(rest)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.torn_bytes = len(rest)
            self._file.truncate(whole)
        else:
            self._file.write(b"\n")
            self._file.flush()

    def _end_of_last_line(self, size: int) -> int:
        at = size
        while at > 0:
            start = max(0, at - _BLOCK_BYTES)
            self._file.seek(start)
            found = self._file.read(at - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            at = start
        return 0

    def _read(self) -> None:
        for number, _, written in self._written():
            if written is None:
                raise InvalidRequest(
                    f"{self.path}, line {number}, is not a batch answer; give another file"
                )
            self.done.add(written.custom_id)
            self.failed += written.failed

    def _written(self) -> Iterator[tuple[int, bytes, _Written | None]]:
        self._file.seek(0)
        for number, data in enumerate(self._file, 1):
            try:
                yield number, data, _WRITTEN.decode(data)
            except (msgspec.DecodeError, UnicodeDecodeError):
                yield number, data, None

    def _drop_failed(self) -> None:
        part = self.path.with_name(f".{self.path.name}.part")
        kept = part.open("w+b")
        try:
            fcntl.flock(kept, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for _, data, written in self._written():
                assert written is not None, "read before"
                if written.failed:
                    self.done.discard(written.custom_id)
                else:
                    kept.write(data)
            kept.flush()
            os.fsync(kept.fileno())
            part.replace(self.path)
        except BaseException:
            kept.close()
            raise
        self._file.close()
        self._file = kept
        self.failed = 0
