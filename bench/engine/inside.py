"""Engines in processes of their own, driven by lines of JSON (`bench.peers.engines.inside`).

A process has its own memory, so that engines can follow each other on one device, and its own
interpreter, so that a peer has its own libraries. Its CPU time includes its children.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from bench.common import ROOT, family_cpu_s, percentile
from bench.systems import Unavailable

__all__ = ["Inside", "inside"]


class Inside:
    """An engine in its own process."""

    def __init__(self, name: str, popen: subprocess.Popen[str], log: IO[str]) -> None:
        self.name = name
        self._popen = popen
        self._log = log

    def wait_ready(self) -> None:
        """Wait until it has loaded its model. Raises `Unavailable`."""
        if self._line() != "ready":
            raise Unavailable(self._ended())

    def run(self, prompts: Sequence[Sequence[int]], new: int) -> dict[str, float]:
        """Send all prompts at once; return the figures of the run.

        Raises `RuntimeError` with the engine's message if it fails, or if an answer has another
        length.
        """
        before = family_cpu_s(self._popen.pid)
        seen = self._ask({"prompts": prompts, "new": new})
        spent = family_cpu_s(self._popen.pid) - before
        started, at = seen["started"], seen["at"]
        if any(len(times) != new for times in at):
            raise RuntimeError(f"answers of {sorted({len(times) for times in at})}, not {new}")
        total = new * len(prompts)
        gaps = [later - sooner for times in at for sooner, later in itertools.pairwise(times)]
        figures = {
            "tokens_per_s": total / (max(times[-1] for times in at) - started),
            "ttft_ms": percentile([times[0] - started for times in at], 50) * 1e3,
            "last_ttft_ms": max(times[0] - started for times in at) * 1e3,
            "cpu_us_per_token": spent / total * 1e6,
        }
        if gaps:
            figures["gap_ms"] = percentile(gaps, 50) * 1e3
            figures["gap_p99_ms"] = percentile(gaps, 99) * 1e3
        return figures

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(question) + "\n")
        self._popen.stdin.flush()
        line = self._line()
        if not line:
            raise RuntimeError(self._ended())
        seen: dict[str, Any] = json.loads(line)
        if "error" in seen:
            raise RuntimeError(seen["error"])
        return seen

    def _ended(self) -> str:
        """How the process ended, with its last line, which says why."""
        status = self._popen.wait()
        self._log.seek(0)
        said = [line.strip() for line in self._log if line.strip()]
        return f"{self.name} ended with status {status}: {said[-1] if said else 'it wrote nothing'}"

    def _line(self) -> str:
        assert self._popen.stdout is not None
        return self._popen.stdout.readline().rstrip("\n")


@contextlib.contextmanager
def inside(
    interpreter: str, name: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> Iterator[Inside]:
    """Start `bench.peers.engines.inside_NAME`; its process ends with the block."""
    # Not a `Process`: its standard input and output are ours.
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            [interpreter, "-m", f"bench.peers.engines.inside_{name}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
            text=True,
            start_new_session=True,
        ) as popen,
    ):
        try:
            yield Inside(name, popen, log)
        finally:
            popen.kill()
