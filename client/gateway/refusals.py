"""Wrong keys wait for their refusal, longer and longer for each address; nobody else waits.

A waiting refusal holds a connection, so only some wait at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Final

from broker.protocol.refusals import WrongKeys

LONGEST_S: Final = 8.0
"""Below the ten seconds after which many clients give up: they must be told what is wrong."""
MAX_WAITING: Final = 256
"""Beyond it the one that has waited longest is refused early."""


class Refusals:
    """Of one gateway."""

    def __init__(self) -> None:
        self._wrong = WrongKeys(LONGEST_S)
        self._waiting: deque[asyncio.Event] = deque()

    async def wait(self, address: str) -> None:
        """Returns when a wrong key from this address is to be refused."""
        early = asyncio.Event()
        self._waiting.append(early)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft().set()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wrong.wait_s(address, time.monotonic())):
                    await early.wait()
        finally:
            if not early.is_set():
                self._waiting.remove(early)
