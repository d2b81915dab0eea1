"""Refreshes `requirements.lock`, the tested set.

It is a constraints file, not a `pylock.toml`. Every pip since 7 reads it, the extras keep their
meaning (a client on a laptop still installs three wheels), and it names no registry. Of the
`pylock.toml`: pip reads one only since 26.1, as an experiment; `pip lock` writes one for the
running platform alone; and each file in it has the address of the registry that it came from.
Hashes are left out, since pip refuses them beside the project itself in editable mode.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.releases.pins import moved
from tests.releases.tools import PLATFORMS, PYTHONS, ROOT, Unresolved, make_uv, resolve

LOCK = ROOT / "requirements.lock"
EXTRAS = ("all", "test", "traces", "bench")
"""What the lock covers. The engines beside transformers pin their own torch and transformers."""

_PYTHONS = f"{PYTHONS[0]} to {PYTHONS[-1]}"
HEAD = f"""\
# The tested set: one release of everything that tokenbus[{",".join(EXTRAS)}] brings, for CPython
# {_PYTHONS} on Linux (x86_64, aarch64; glibc 2.31) and macOS (arm64; 14), or newer.
# A constraints file: it pins what is installed and installs nothing by itself.
#
#     pip install -e '.[all,test]' -c requirements.lock
#
# Written by .ci/lock: the newest releases that pyproject.toml allows; it says what moved.
"""


def refresh() -> int:
    """Write the lock anew and print what moved; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="tokenbus-lock-") as folder:
        uv = make_uv(Path(folder) / "uv")
        pins = resolve(uv, EXTRAS, "--universal", "--python-version", PYTHONS[0])
        checked = Path(folder) / "requirements.lock"
        checked.write_text(HEAD + pins)
        try:
            check(uv, checked)
        except Unresolved as error:
            print(f"{LOCK.name} is as it was: {error}")
            return 1
    before = LOCK.read_text() if LOCK.exists() else ""
    LOCK.write_text(HEAD + pins)
    print("\n".join(moved(before, pins)) or "nothing moved")
    return 0


def check(uv: Path, lock: Path) -> None:
    """See that every Python on every platform finds a wheel for each pin.

    Raises Unresolved for the first that does not.
    """
    for python in PYTHONS:
        for platform in PLATFORMS:
            try:
                resolve(
                    *(uv, EXTRAS, "--constraint", str(lock), "--only-binary", ":all:"),
                    *("--python-version", python, "--python-platform", platform),
                )
            except Unresolved as error:
                raise Unresolved(f"Python {python} on {platform}: {error}") from error
