"""Tokens in and out per key, model and day, in a SQLite file that several gateways may share; and
the budgets of keys, which are refused by it.

What was counted is written every second and when the gateway stops, in another thread. A budget is
compared with the file, at most a second old, and with what is not written yet; a request that
begins within it is finished. Days and months are those of UTC. Must never stop an answer: a file
that cannot be written is told in the log, and what was counted waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.protocol.errors import ErrorCode
from client.gateway.config import ConfigError
from client.gateway.errors import SPENT, GatewayError
from client.gateway.keys import Key

__all__ = ["Accounts", "AccountsError", "next_month", "today"]

log = logging.getLogger("tokenbus.gateway")

WRITE_S: Final = 1.0
"""How long a count may wait to be written, and a budget's count from the file may be used."""

#: For another gateway that writes.
_BUSY_S: Final = 10.0

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS usage (
    key TEXT NOT NULL, day TEXT NOT NULL, model TEXT NOT NULL,
    requests INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    PRIMARY KEY (key, day, model)
) WITHOUT ROWID
"""
_ADD: Final = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (key, day, model) DO UPDATE SET requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens
"""
_ROWS: Final = """
SELECT key, day, model, requests, prompt_tokens, completion_tokens FROM usage
WHERE (:key IS NULL OR key = :key) AND day >= :since ORDER BY day DESC, key, model
"""
_SUMS: Final = """
SELECT COALESCE(SUM(CASE WHEN day = :day THEN prompt_tokens + completion_tokens END), 0),
    COALESCE(SUM(prompt_tokens + completion_tokens), 0)
FROM usage WHERE key = :key AND day >= :month AND day <= :day
"""


class AccountsError(ConfigError):
    """The file cannot be used; the message says where and why."""


def next_month(day: datetime.date) -> datetime.date:
    """The first day of the month after."""
    return (day.replace(day=28) + datetime.timedelta(days=4)).replace(day=1)


def today() -> datetime.date:
    """The day that is counted for."""
    return datetime.datetime.now(datetime.UTC).date()


@dataclass(slots=True)
class _Known:
    """Tokens of one key as of the last look into the file, with what was counted here since."""

    looked_s: float
    day: datetime.date
    of_day: int
    of_month: int


_Place = tuple[str, str, str]


class Accounts:
    """The accounts of one gateway."""

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.monotonic,
        day: Callable[[], datetime.date] = today,
        busy_s: float = _BUSY_S,
    ) -> None:
        """Raises AccountsError. `clock`: seconds; `day`: the day that is counted for; `busy_s`: how
        long another gateway that writes is waited for."""
        self._path, self._clock, self._day = path, clock, day
        #: Not written yet: requests, prompt tokens and completion tokens by key, day and model.
        self._pending: dict[_Place, list[int]] = {}
        self._known: dict[str, _Known] = {}
        #: One thread at a time uses the connection.
        self._lock = asyncio.Lock()
        self._broken = False
        try:
            self._file = sqlite3.connect(path, timeout=busy_s, check_same_thread=False)
            with contextlib.ExitStack() as failed:
                failed.callback(self._file.close)
                with self._file:
                    self._file.execute(_TABLE)
                failed.pop_all()
        except sqlite3.Error as error:
            raise AccountsError(f"{path}: {error}") from None

    def count(self, key: str, model: str, prompt_tokens: int, completion_tokens: int) -> None:
        """Count a request that is over."""
        day = self._day()
        amounts = self._pending.setdefault((key, day.isoformat(), model), [0, 0, 0])
        for place, amount in enumerate((1, prompt_tokens, completion_tokens)):
            amounts[place] += amount
        known = self._known.get(key)
        if known is not None and known.day == day:
            known.of_day += prompt_tokens + completion_tokens
            known.of_month += prompt_tokens + completion_tokens

    async def admit(self, key: Key) -> None:
        """Raises GatewayError(quota) for a key whose budget is used up."""
        if key.tokens_per_day is None and key.tokens_per_month is None:
            return
        of_day, of_month = await self.used(key.name)
        day = self._day()
        tomorrow = day + datetime.timedelta(days=1)
        for span, used, budget, again in (
            ("month", of_month, key.tokens_per_month, next_month(day)),
            ("day", of_day, key.tokens_per_day, tomorrow),
        ):
            if budget is not None and used >= budget:
                raise GatewayError(
                    ErrorCode.QUOTA,
                    f"Key {key.name!r} has used {used:,} tokens of its {budget:,} for this {span}; "
                    f"the next {span} begins on {again} at 00:00 UTC.",
                    openai_code=SPENT,
                    details={
                        f"tokens_per_{span}": budget,
                        "used": used,
                        "resets_at": f"{again}T00:00:00Z",
                    },
                )

    async def used(self, key: str) -> tuple[int, int]:
        """The key's tokens of this day and of this month. Raises GatewayError(overloaded) where the
        file cannot be read and never was."""
        day = self._day()
        known = self._known.get(key)
        if known is None or known.day != day or self._clock() - known.looked_s >= WRITE_S:
            try:
                known = await self._look(key, day)
            except sqlite3.Error as error:
                self._tell(error)
                if known is None or known.day != day:
                    raise GatewayError(
                        ErrorCode.OVERLOADED,
                        "The tokens that this key has used cannot be read now; try again.",
                        retryable=True,
                    ) from None
        return known.of_day, known.of_month

    async def _look(self, key: str, day: datetime.date) -> _Known:
        async with self._lock:
            month = day.replace(day=1).isoformat()
            of_day, of_month = await asyncio.to_thread(
                self._one, _SUMS, {"key": key, "day": day.isoformat(), "month": month}
            )
            # What is not written yet; a write waits for the lock.
            for (name, of, _), (_, prompt, completion) in self._pending.items():
                if name == key and month <= of <= day.isoformat():
                    of_month += prompt + completion
                    of_day += prompt + completion if of == day.isoformat() else 0
            known = self._known[key] = _Known(self._clock(), day, of_day, of_month)
            return known

    def _one(self, query: str, values: dict[str, str]) -> Any:
        return self._file.execute(query, values).fetchone()

    async def rows(self, key: str | None, since: datetime.date) -> list[dict[str, Any]]:
        """What was counted since a day, the newest first; of all keys where None."""
        await self.write()
        async with self._lock:
            found = await asyncio.to_thread(
                lambda: self._file.execute(
                    _ROWS, {"key": key, "since": since.isoformat()}
                ).fetchall()
            )
        names = ("key", "day", "model", "requests", "prompt_tokens", "completion_tokens")
        return [dict(zip(names, row, strict=True)) for row in found]

    async def write(self) -> None:
        """Write what was counted; what cannot be written waits."""
        async with self._lock:
            writing, self._pending = self._pending, {}
            if not writing:
                return
            try:
                await asyncio.to_thread(self._add, writing)
            except sqlite3.Error as error:
                self._tell(error)
                for place, amounts in writing.items():
                    late = self._pending.setdefault(place, [0, 0, 0])
                    late[:] = [a + b for a, b in zip(late, amounts, strict=True)]
            else:
                self._broken = False

    def _add(self, amounts: dict[_Place, list[int]]) -> None:
        with self._file:
            self._file.executemany(_ADD, [(*place, *three) for place, three in amounts.items()])

    def _tell(self, error: sqlite3.Error) -> None:
        """Once until the file can be written again."""
        if not self._broken:
            self._broken = True
            log.error("the usage file %s cannot be used, counts wait: %s", self._path, error)

    async def write_loop(self) -> None:
        """Write every second until cancelled."""
        while True:
            await asyncio.sleep(WRITE_S)
            await self.write()

    async def close(self) -> None:
        """Write what is left."""
        with contextlib.suppress(GatewayError):
            await self.write()
        if self._pending:
            log.error("the usage of %d keys and models is lost", len(self._pending))
        self.shut()

    def shut(self) -> None:
        """Close the file."""
        self._file.close()
