"""Every party reports the version of the installed distribution."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import metadata

import pytest

from tests.harness import ROOT, Bus

VERSION = metadata.version("tokenbus")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("broker", "--version"), f"tokenbus {VERSION}"),
        (("worker", "--version"), f"tokenbus-worker/{VERSION}"),
        (("client", "--version"), f"tokenbus {VERSION}"),
        (("client", "version"), f"tokenbus {VERSION}"),
    ],
    ids=" ".join,
)
def test_each_command_prints_its_version(command: tuple[str, ...], expected: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == expected


def test_the_parties_of_a_bus_exchange_their_versions(bus: Bus) -> None:
    with bus.client(name="asks") as client:
        assert client.query("bus.version")["software"] == f"tokenbus {VERSION}"
    joined = {}
    lines = [line for line in bus.broker.log().splitlines() if line.startswith("{")]
    for line in map(json.loads, lines):
        if line["event"].endswith(" joined"):
            joined[line["event"], line["peer"]] = line["software"]
    assert joined["client joined", "asks"] == f"tokenbus-python/{VERSION}"
    assert joined["worker joined", "w1"] == f"tokenbus-worker/{VERSION}"
