"""The folder of files and batches: a small SQLite file about them, and one file for each.

    FOLDER/batches.db        what is known of files and batches
    FOLDER/files/file-ID     an input, or the answers of a batch, from their first line on
    FOLDER/uploads/          files that arrive, and parts of files
    FOLDER/lock              held by the gateway that runs the batches

A file is in the folder, whole and on the disk, before the database names it, and out of the
database before it is deleted: whatever ends a gateway leaves at most a file that nobody names,
which is removed a day later. Several gateways on one machine may share a folder. Paths are made
from ids that the database knows, never from what a caller sent. Must never be used by two threads
at once; `Batches` sees to that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from client.gateway.batches.records import MAX_PARTS, OPEN, FileObject, Job, PartObject, Sent
from client.gateway.config import ConfigError

__all__ = ["Folder", "FolderError", "NotHere"]

T = TypeVar("T")

_VERSION: Final = 1
#: For another gateway that writes.
_BUSY_S: Final = 10.0
#: A file that nobody names may be one that another gateway is about to name. An upload is known
#: for as long after its end, so that who asks is told what became of it.
_ABANDONED_S: Final = 24 * 3600

_TABLES: Final = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, expires_at INTEGER, shown BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL,
    status TEXT NOT NULL, input TEXT NOT NULL, output TEXT NOT NULL, error TEXT NOT NULL,
    expires_at INTEGER NOT NULL, job BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status);
CREATE TABLE IF NOT EXISTS uploads (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, status TEXT NOT NULL, expires_at INTEGER NOT NULL,
    sent BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS parts (
    id TEXT PRIMARY KEY, upload TEXT NOT NULL, bytes INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS parts_by_upload ON parts (upload);
"""
_ARE_OPEN: Final = f"status IN ({', '.join(map(repr, OPEN))})"

_JOB: Final = msgspec.json.Decoder(Job)
_FILE: Final = msgspec.json.Decoder(FileObject)
_SENT: Final = msgspec.json.Decoder(Sent)


class FolderError(ConfigError):
    """The folder cannot be used; the message says where and why."""


class NotHere(Exception):
    """No file, upload or batch of that id, for that key."""


class Folder:
    """One gateway's view of the folder."""

    def __init__(self, path: Path) -> None:
        """Raises FolderError."""
        self.path = path
        try:
            for one in (path, path / "files", path / "uploads"):
                one.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._database = sqlite3.connect(
                path / "batches.db",
                timeout=_BUSY_S,
                check_same_thread=False,
                isolation_level=None,
            )
            with contextlib.ExitStack() as failed:
                failed.callback(self._database.close)
                with self._writing() as cursor:
                    [(version,)] = cursor.execute("PRAGMA user_version")
                    if version > _VERSION:
                        raise FolderError(
                            f"--batch-folder {path} was written by a newer release (version "
                            f"{version})"
                        )
                    for table in _TABLES.split(";"):
                        cursor.execute(table)
                    cursor.execute(f"PRAGMA user_version = {_VERSION}")
                failed.pop_all()
        except OSError as error:
            raise FolderError(f"--batch-folder {path}: {error.strerror}") from None
        except sqlite3.Error as error:
            raise FolderError(f"--batch-folder {path}: {error}") from None

    def shut(self) -> None:
        """Close the database."""
        self._database.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Cursor]:
        """A transaction, which sees what others wrote and lets nobody write beside it."""
        cursor = self._database.cursor()
        cursor.execute("BEGIN IMMEDIATE")
        try:
            yield cursor
        except BaseException:
            cursor.execute("ROLLBACK")
            raise
        cursor.execute("COMMIT")

    def _rows(self, query: str, *values: Any) -> list[Any]:
        return self._database.execute(query, values).fetchall()

    # --- the lock ---

    def lock(self) -> Callable[[], None] | None:
        """Become the one that runs the batches; returns what ends that, or None if another gateway
        does it. A process that ends gives it up, however it ends."""
        file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        return lambda: os.close(file)

    # --- files ---

    def path_of(self, id_: str) -> Path:
        """Where a file is, by an id of this folder."""
        return self.path / "files" / id_

    def upload_path(self, id_: str) -> Path:
        """Where a file is while it arrives, and a part of one until the file is whole."""
        return self.path / "uploads" / id_

    def used_bytes(self) -> int:
        """Of all files and parts."""
        [(used,)] = self._rows(
            "SELECT COALESCE(SUM(bytes), 0) FROM "
            "(SELECT bytes FROM files UNION ALL SELECT bytes FROM parts)"
        )
        return int(used)

    def add_file(self, file: FileObject, owner: str) -> None:
        """Keep what arrived whole at `upload_path`."""
        arrived = self.upload_path(file.id)
        _sync(arrived)
        arrived.rename(self.path_of(file.id))
        self.sync_names()
        with self._writing() as cursor:
            _insert_file(cursor, file, owner)

    def file(self, id_: str, owner: str, now: int) -> FileObject:
        """A file of this key. Raises NotHere."""
        rows = self._rows(
            "SELECT shown FROM files WHERE id = ? AND owner = ? "
            "AND (expires_at IS NULL OR expires_at > ?)",
            *(id_, owner, now),
        )
        if not rows:
            raise NotHere
        return _FILE.decode(rows[0][0])

    def files(
        self,
        owner: str,
        now: int,
        *,
        after: str | None,
        limit: int,
        newest_first: bool,
        purpose: str | None,
    ) -> list[FileObject]:
        """Files of this key behind `after`. Raises NotHere if `after` is not one of them."""
        rows = self._page(
            "files",
            "shown",
            owner,
            after,
            limit,
            newest_first,
            "(expires_at IS NULL OR expires_at > ?) AND (? IS NULL OR purpose = ?)",
            (now, purpose, purpose),
        )
        return [_FILE.decode(row) for row in rows]

    def _page(
        self,
        table: str,
        column: str,
        owner: str,
        after: str | None,
        limit: int,
        newest_first: bool,
        condition: str = "1",
        values: Sequence[Any] = (),
    ) -> list[bytes]:
        behind, order = ("<", "DESC") if newest_first else (">", "ASC")
        place = None
        if after is not None:
            found = self._rows(
                f"SELECT seq FROM {table} WHERE id = ? AND owner = ?", *(after, owner)
            )
            if not found:
                raise NotHere
            place = found[0][0]
        rows = self._rows(
            f"SELECT {column} FROM {table} WHERE owner = ? AND (? IS NULL OR seq {behind} ?) "
            f"AND {condition} ORDER BY seq {order} LIMIT ?",
            *(owner, place, place, *values, limit),
        )
        return [row[0] for row in rows]

    def delete_file(self, id_: str, owner: str) -> str | None:
        """Delete a file of this key, unless a batch that is not over reads it: then its id is
        returned. Raises NotHere."""
        with self._writing() as cursor:
            found = cursor.execute(
                "SELECT 1 FROM files WHERE id = ? AND owner = ?", (id_, owner)
            ).fetchone()
            if found is None:
                raise NotHere
            in_use = cursor.execute(
                f"SELECT id FROM batches WHERE input = ? AND {_ARE_OPEN}", (id_,)
            ).fetchone()
            if in_use is not None:
                return str(in_use[0])
            cursor.execute("DELETE FROM files WHERE id = ?", (id_,))
        self.path_of(id_).unlink(missing_ok=True)
        return None

    def sync_names(self) -> None:
        """Returns when the disk has the names of all files."""
        _sync(self.path / "files")

    # --- uploads ---

    def add_upload(self, sent: Sent, owner: str, now: int, most_open: int) -> bool:
        """Keep a new upload; False if its key has so many that are pending."""
        with self._writing() as cursor:
            [(count,)] = cursor.execute(
                "SELECT COUNT(*) FROM uploads WHERE owner = ? AND status = 'pending' "
                "AND expires_at > ?",
                (owner, now),
            )
            if count >= most_open:
                return False
            upload = sent.upload
            cursor.execute(
                "INSERT INTO uploads (id, owner, status, expires_at, sent) VALUES (?, ?, ?, ?, ?)",
                (upload.id, owner, upload.status, upload.expires_at, msgspec.json.encode(sent)),
            )
        return True

    def upload(self, id_: str, owner: str) -> Sent:
        """An upload of this key. Raises NotHere."""
        return _sent(self._database.cursor(), id_, owner)

    def parts(self, upload_id: str) -> dict[str, int]:
        """Sizes in bytes by the ids of the parts."""
        return dict(self._rows("SELECT id, bytes FROM parts WHERE upload = ?", upload_id))

    def add_part(
        self, part: PartObject, owner: str, size_bytes: int, check: Callable[[Sent], None]
    ) -> bool:
        """Keep a part that arrived whole at `upload_path`; False if its upload has as many as it
        may have. `check` raises if the upload takes none any more. Raises NotHere."""
        _sync(self.upload_path(part.id))
        _sync(self.path / "uploads")
        with self._writing() as cursor:
            check(_sent(cursor, part.upload_id, owner))
            [(count,)] = cursor.execute(
                "SELECT COUNT(*) FROM parts WHERE upload = ?", (part.upload_id,)
            )
            if count >= MAX_PARTS:
                return False
            cursor.execute(
                "INSERT INTO parts (id, upload, bytes) VALUES (?, ?, ?)",
                (part.id, part.upload_id, size_bytes),
            )
        return True

    def end_upload(
        self, id_: str, owner: str, change: Callable[[Sent], None], file: FileObject | None = None
    ) -> Sent:
        """Change an upload as it is now to one that is over, and remove its parts. `file`: what it
        became, whole at `upload_path`. What `change` raises leaves everything as it was. Raises
        NotHere."""
        if file is not None:
            _sync(self.upload_path(file.id))
        with self._writing() as cursor:
            sent = _sent(cursor, id_, owner)
            change(sent)
            if file is not None:
                self.upload_path(file.id).rename(self.path_of(file.id))
                self.sync_names()
                _insert_file(cursor, file, owner)
            parts = _end(cursor, sent)
        self._remove(parts)
        return sent

    def _remove(self, parts: Sequence[str]) -> None:
        for part in parts:
            self.upload_path(part).unlink(missing_ok=True)

    # --- batches ---

    def add_job(self, job: Job, most_open: int) -> bool:
        """Keep a new batch; False if its key has so many that are not over. Raises NotHere if the
        input is gone."""
        batch = job.batch
        with self._writing() as cursor:
            found = cursor.execute(
                "SELECT 1 FROM files WHERE id = ? AND owner = ? AND purpose = 'batch'",
                (batch.input_file_id, job.owner),
            ).fetchone()
            if found is None:
                raise NotHere
            [(count,)] = cursor.execute(
                f"SELECT COUNT(*) FROM batches WHERE owner = ? AND {_ARE_OPEN}", (job.owner,)
            )
            if count >= most_open:
                return False
            cursor.execute(
                "INSERT INTO batches (id, owner, status, input, output, error, expires_at, job) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    *(batch.id, job.owner, batch.status, batch.input_file_id),
                    *(job.output_id, job.error_id, batch.expires_at, msgspec.json.encode(job)),
                ),
            )
        return True

    def job(self, id_: str, owner: str | None = None) -> Job:
        """A batch, of this key if one is given. Raises NotHere."""
        rows = self._rows(
            "SELECT job FROM batches WHERE id = ? AND (? IS NULL OR owner = ?)", id_, owner, owner
        )
        if not rows:
            raise NotHere
        return _JOB.decode(rows[0][0])

    def jobs(self, owner: str, *, after: str | None, limit: int) -> list[Job]:
        """Batches of this key behind `after`, the newest first. Raises NotHere for an `after` that
        is none of them."""
        rows = self._page("batches", "job", owner, after, limit, newest_first=True)
        return [_JOB.decode(row) for row in rows]

    def open_jobs(self) -> list[tuple[str, str, str, int]]:
        """Id, key, status and deadline of the batches that are not over, the oldest first."""
        return self._rows(
            f"SELECT id, owner, status, expires_at FROM batches WHERE {_ARE_OPEN} ORDER BY seq"
        )

    def change(
        self, id_: str, change: Callable[[Job], None], files: Sequence[FileObject] = ()
    ) -> Job:
        """Change a batch as it is now, and name `files` that are there, all or nothing. What
        `change` raises leaves everything as it was. Raises NotHere."""
        with self._writing() as cursor:
            row = cursor.execute("SELECT job FROM batches WHERE id = ?", (id_,)).fetchone()
            if row is None:
                raise NotHere
            job = _JOB.decode(row[0])
            change(job)
            cursor.execute(
                "UPDATE batches SET status = ?, job = ? WHERE id = ?",
                (job.batch.status, msgspec.json.encode(job), id_),
            )
            for file in files:
                _insert_file(cursor, file, job.owner)
        return job

    # --- tidying ---

    def tidy(self, now: int) -> None:
        """Delete files whose time is over, and those that nobody named for a day. Only for the
        gateway that holds the lock."""
        gone = self._rows(
            "SELECT id, owner FROM files WHERE expires_at IS NOT NULL AND expires_at <= ?", now
        )
        for id_, owner in gone:
            with contextlib.suppress(NotHere):
                self.delete_file(id_, owner)
        self._expire_uploads(now)
        named = {
            row[0] for row in self._rows("SELECT id FROM files UNION ALL SELECT id FROM parts")
        }
        for row in self._rows(f"SELECT output, error FROM batches WHERE {_ARE_OPEN}"):
            named.update(row)
        for folder in ("files", "uploads"):
            for path in (self.path / folder).iterdir():
                if path.name in named:
                    continue
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_S:
                        path.unlink()

    def _expire_uploads(self, now: int) -> None:
        with self._writing() as cursor:
            cursor.execute("DELETE FROM uploads WHERE expires_at <= ?", (now - _ABANDONED_S,))
            over = cursor.execute(
                "SELECT sent FROM uploads WHERE status = 'pending' AND expires_at <= ?", (now,)
            ).fetchall()
            parts: list[str] = []
            for row in over:
                sent = _SENT.decode(row[0])
                sent.upload.status = "expired"
                parts += _end(cursor, sent)
        self._remove(parts)


def _sent(cursor: sqlite3.Cursor, id_: str, owner: str) -> Sent:
    row = cursor.execute(
        "SELECT sent FROM uploads WHERE id = ? AND owner = ?", (id_, owner)
    ).fetchone()
    if row is None:
        raise NotHere
    return _SENT.decode(row[0])


def _end(cursor: sqlite3.Cursor, sent: Sent) -> list[str]:
    """Write an upload that is over; the ids of its parts, whose files are the caller's to
    remove."""
    id_ = sent.upload.id
    cursor.execute(
        "UPDATE uploads SET status = ?, sent = ? WHERE id = ?",
        (sent.upload.status, msgspec.json.encode(sent), id_),
    )
    parts = cursor.execute("SELECT id FROM parts WHERE upload = ?", (id_,)).fetchall()
    cursor.execute("DELETE FROM parts WHERE upload = ?", (id_,))
    return [row[0] for row in parts]


def _insert_file(cursor: sqlite3.Cursor, file: FileObject, owner: str) -> None:
    cursor.execute(
        "INSERT INTO files (id, owner, purpose, bytes, expires_at, shown) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (
            *(file.id, owner, file.purpose, file.bytes, file.expires_at),
            msgspec.json.encode(file),
        ),
    )


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
