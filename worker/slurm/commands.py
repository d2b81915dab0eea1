"""Slurm's commands sbatch, squeue and scancel. All raise `SlurmError` with what a command said."""

from __future__ import annotations

import getpass
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from worker.slurm.core import Job

ANSWER_S: Final = 30.0
_FORMAT: Final = "%i|%T|%r"


class SlurmError(Exception):
    """A command failed; the message says which and why."""


def _run(command: Sequence[str], *, text: str | None = None) -> str:
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, timeout=ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{command[0]} is not installed here: run this on a node of the cluster that may "
            "submit jobs"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise SlurmError(f"{command[0]} ended with {done.returncode}: {said[:500]}")
    return done.stdout


def script(prefix: str, worker_options: Sequence[str], workdir: Path, environment: str) -> str:
    """The job's script. With `exec`, Slurm's signals reach the worker, which drains on SIGTERM."""
    command = shlex.join([sys.executable, "-m", "worker", *worker_options])
    lines = ["#!/bin/bash", f"cd {shlex.quote(str(workdir))}"]
    if environment:
        lines.append(environment)
    lines.append(f'exec {command} --worker-id "{prefix}-$SLURM_JOB_ID"')
    return "\n".join(lines) + "\n"


def submit(name: str, options: Sequence[str], text: str) -> str:
    """Submit a job; returns its id."""
    said = _run(["sbatch", "--parsable", f"--job-name={name}", *options], text=text)
    return said.strip().partition(";")[0]


def jobs(name: str) -> list[Job]:
    """The user's jobs of that name."""
    command = ["squeue", "-h", "-u", getpass.getuser(), f"--name={name}", "-o", _FORMAT]
    found = []
    for line in _run(command).splitlines():
        id_, state, reason = (*line.strip().split("|", 2), "", "")[:3]
        found.append(Job(id_, state, "" if reason == "None" else reason))
    return found


def cancel(ids: Sequence[str]) -> None:
    """Cancel jobs."""
    if ids:
        _run(["scancel", *ids])
