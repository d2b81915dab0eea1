"""Runs pip and uv: virtual environments, and which releases fit together."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Pythons and platforms of the lock, in uv's words. No Intel Macs: torch has no wheel for them.
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS = ("x86_64-manylinux_2_31", "aarch64-manylinux_2_31", "aarch64-apple-darwin")
OLDEST_MACOS = "14.0"


class Unresolved(Exception):
    """No set of releases satisfies what was asked; the words are the resolver's own."""


def make_environment(folder: Path) -> Path:
    """A fresh virtual environment of the running Python; returns its interpreter."""
    venv.create(folder, with_pip=True, clear=True)
    return folder / "bin" / "python"


def pip(python: Path, *arguments: str) -> None:
    """Run pip of that environment. Raises CalledProcessError when it fails."""
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([python, "-m", "pip", *arguments], check=True, cwd=ROOT, env=environment)


def make_uv(folder: Path) -> Path:
    """The newest uv, in an environment of its own; returns the program."""
    pip(make_environment(folder), "install", "-q", "uv")
    return folder / "bin" / "uv"


def resolve(uv: Path, extras: tuple[str, ...], *options: str) -> str:
    """The pins that satisfy `pyproject.toml` with these extras, as a requirements file.

    Reads metadata only; nothing is installed. Raises Unresolved.
    """
    wanted = [word for extra in extras for word in ("--extra", extra)]
    command = [
        *(str(uv), "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate"),
        *(*wanted, *options, "pyproject.toml"),
    ]
    environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": OLDEST_MACOS}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Unresolved(done.stderr.strip())
    return done.stdout


def this_python() -> str:
    """The running Python's version as uv wants it: `3.11`."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"
