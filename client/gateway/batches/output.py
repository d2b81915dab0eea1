"""A file of answers to the lines of a batch, one JSON object per line, only ever appended to.

The answers are the only record of what is done: a line is there completely or not at all, whatever
ended the process that wrote it. Must never lose an answer that was written, nor hold a file in
memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from client import InvalidRequest
from client.closing import Closing

__all__ = ["Output", "Tally"]

_BLOCK_BYTES: Final = 1 << 16


class _Usage(Struct):
    """Of a chat, a completion, an embedding or a response; each names it in its way."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Details(Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Body(Struct):
    usage: _Usage | None = None


class _Written(Struct):
    """The status of a line; everything else in it is skipped."""

    custom_id: str
    response: _Response | None = None
    error: Any = None

    @property
    def failed(self) -> bool:
        return self.response is None or self.response.status_code != 200


class _Response(Struct):
    status_code: int = 0
    body: msgspec.Raw = msgspec.Raw(b"null")  # immutable


_WRITTEN: Final = msgspec.json.Decoder(_Written)
_BODY: Final = msgspec.json.Decoder(_Body)


@dataclass(slots=True)
class Tally:
    """Lines and their tokens."""

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def count(self, written: _Written) -> None:
        """Count a line."""
        self.failed += written.failed
        self.completed += not written.failed
        if written.failed or written.response is None:
            return
        try:
            usage = _BODY.decode(written.response.body).usage
        except (msgspec.DecodeError, UnicodeDecodeError):
            return  # not one of our answers
        if usage is None:
            return
        self.prompt_tokens += usage.prompt_tokens or usage.input_tokens
        self.completion_tokens += usage.completion_tokens or usage.output_tokens
        for of_prompt in (usage.prompt_tokens_details, usage.input_tokens_details):
            if of_prompt is not None:
                self.cached_tokens += of_prompt.cached_tokens or 0
        for of_answer in (usage.completion_tokens_details, usage.output_tokens_details):
            if of_answer is not None:
                self.reasoning_tokens += of_answer.reasoning_tokens or 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, n) + getattr(other, n) for n in self.__slots__))


class Output(Closing):
    """The file, locked while open. An incomplete last line, left by a run that was killed, is
    removed."""

    def __init__(self, path: Path, *, retry_failed: bool = False, own: bool = False) -> None:
        """Raises `InvalidRequest`. `retry_failed`: remove the lines of failed requests. `own`:
        nobody else writes there, so whatever follows a broken line is what a power failure left,
        and is removed too; otherwise such a file is left alone."""
        self.path = path
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise InvalidRequest(f"{path}: {error.strerror}") from None
        #: Length of what was removed at the end, bytes.
        self.torn_bytes = 0
        #: Ids that are answered.
        self.done: set[str] = set()
        #: What was there, and what was written since.
        self.before, self.written = Tally(), Tally()
        #: A line may be there in part.
        self._is_torn = False
        try:
            self._lock()
            self._mend()
            self._read(own=own)
            if retry_failed and self.before.failed:
                self._drop_failed()
        except BaseException:
            self._file.close()
            raise

    @property
    def tally(self) -> Tally:
        """All lines."""
        return self.before + self.written

    def write(self, answer: dict[str, Any]) -> None:
        """Add a line. Raises OSError; the file must then be opened anew."""
        self._check()
        data = msgspec.json.encode(answer)
        self._is_torn = True
        self._file.write(data + b"\n")
        # From here on the operating system has the answer, whatever ends this process.
        self._file.flush()
        self._is_torn = False
        line = _WRITTEN.decode(data)
        self.done.add(line.custom_id)
        self.written.count(line)

    def sync(self) -> None:
        """Returns when the disk has the answers, which then outlive the machine too. Raises
        OSError."""
        self._check()
        os.fsync(self._file.fileno())

    def _check(self) -> None:
        """Nothing may follow a line that is written in part."""
        if self._is_torn:
            raise OSError(errno.EIO, "a line was written in part; open the file anew")

    def close(self) -> None:
        """Close the file. Idempotent."""
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
            self._cut(whole, size)
        else:
            self._file.write(b"\n")
            self._file.flush()

    def _cut(self, at: int, size: int) -> None:
        self.torn_bytes += size - at
        self._file.truncate(at)

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

    def _read(self, *, own: bool) -> None:
        at = 0
        for number, data, written in self._lines():
            if written is None:
                if not own:
                    raise InvalidRequest(
                        f"{self.path}, line {number}, is not a batch answer; give another file"
                    )
                self._cut(at, self._file.seek(0, os.SEEK_END))
                return
            at += len(data)
            self.done.add(written.custom_id)
            self.before.count(written)

    def _lines(self) -> Iterator[tuple[int, bytes, _Written | None]]:
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
            for _, data, written in self._lines():
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
        self.before.failed = 0
