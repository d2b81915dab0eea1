"""Memory that the C library retains is returned to the system."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from broker.peer.heap import EVERY_S, SHARE, HeapTrimmer

HOLES = """
import random, sys, time
from broker.peer.heap import EVERY_S, HeapTrimmer

def anonymous_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

trimmer = HeapTrimmer()
# Free every second block: this leaves holes of several pages, and the top of the heap in use.
blocks = [bytearray(20_000) for _ in range(4000)]
kept = blocks[1::2]
del blocks
before = anonymous_kib()
trimmer.tend(time.monotonic() + EVERY_S + 1)
print(before - anonymous_kib())
"""


def test_it_trims_once_a_minute_has_passed_and_not_before() -> None:
    time_s, trimmed = 100.0, []
    heap = HeapTrimmer(lambda kept: trimmed.append(kept) or 1, clock=lambda: time_s)
    heap.tend(100.0 + EVERY_S - 1)
    assert trimmed == []
    time_s = 100.0 + EVERY_S
    heap.tend(time_s)
    heap.tend(time_s + EVERY_S - 1)
    assert trimmed == [0]
    time_s += EVERY_S
    heap.tend(time_s)
    assert trimmed == [0, 0]


def test_a_heap_that_takes_long_to_trim_is_trimmed_less_often() -> None:
    time_s, times = 0.0, []

    def slow(_: int) -> int:
        nonlocal time_s
        times.append(time_s)
        time_s += 0.2
        return 1

    heap = HeapTrimmer(slow, clock=lambda: time_s)
    time_s = EVERY_S
    heap.tend(time_s)
    for _ in range(1000):
        time_s += 1.0
        heap.tend(time_s)
    gaps_s = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(times) > 3
    assert min(gaps_s) >= 0.2 / SHARE


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_holes_between_live_blocks_are_returned_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    # The holes are 40 MB in all, but their first and last pages are shared with live blocks.
    assert int(run.stdout) > 20_000
