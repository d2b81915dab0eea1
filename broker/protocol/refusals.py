"""How long a wrong key waits for its refusal: longer and longer for whoever goes on guessing.

By the address that it came from, so that nobody else waits, and forgotten with time. Takes the time
as an argument; holds no socket and no clock.
"""

from __future__ import annotations

import ipaddress
import math
from collections import OrderedDict
from typing import Final

FIRST_S: Final = 1.0
FORGIVE_S: Final = 60.0
"""A time without a wrong key after which the next waits half as long."""
MAX_SOURCES: Final = 4096
"""Addresses that are remembered, about a megabyte; beyond it the one heard of longest ago goes."""


class WrongKeys:
    """Counts wrong keys by source."""

    def __init__(self, longest_s: float) -> None:
        """`longest_s`: no refusal waits longer."""
        self._longest_s = longest_s
        #: The last wait of a source, and when its key came.
        self._waits: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, address: str, now_s: float) -> float:
        """Seconds until a wrong key from this address is to be refused: a second, and twice the
        last wait for each further one."""
        source = _source(address)
        last_s, at_s = self._waits.pop(source, (0.0, now_s))
        halvings = int((now_s - at_s) // FORGIVE_S)
        wait_s = min(max(FIRST_S, math.ldexp(last_s, 1 - halvings)), self._longest_s)
        self._waits[source] = (wait_s, now_s)
        if len(self._waits) > MAX_SOURCES:
            self._waits.popitem(last=False)
        return wait_s

    def __len__(self) -> int:
        """Sources that are remembered."""
        return len(self._waits)


def _source(address: str) -> str:
    """Whoever has one IPv6 address has the 2^64 of its network."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped or ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)
