"""Reads requirements: what `pyproject.toml` asks for, what a lock pins, and what moved between two.

Pure: text in, values out. Only the standard library, since it runs before anything is installed.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass

PROJECT = "tokenbus"

_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;]+)(?:\s*;\s*(?P<marker>.+))?")
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(?:\[(?P<extras>[^\]]*)\])?\s*(?P<versions>[^;]*)"
)


@dataclass(frozen=True)
class Pin:
    """One line of a lock. The marker says for which machines it counts; empty means for all."""

    name: str
    version: str
    marker: str = ""


def canonical(name: str) -> str:
    """The one spelling of a distribution's name: `Jinja2` is `jinja2`, `a_b` is `a-b`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_lock(text: str) -> list[Pin]:
    """The pins of a constraints file; comments and empty lines do not count.

    Raises ValueError with the line when one is not a pin.
    """
    pins = []
    for line in text.splitlines():
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _PIN.fullmatch(words)
        if match is None:
            raise ValueError(f"not a pin: {line}")
        pins.append(
            Pin(canonical(match["name"]), match["version"], (match["marker"] or "").strip())
        )
    return pins


def moved(before: str, after: str) -> list[str]:
    """What differs between two locks, a line for each distribution: `name old -> new`."""
    old, new = _versions(before), _versions(after)
    return [
        f"{name} {old.get(name, 'absent')} -> {new.get(name, 'absent')}"
        for name in sorted(old | new)
        if old.get(name) != new.get(name)
    ]


def requirements(pyproject: str, extras: Iterable[str]) -> dict[str, str]:
    """What the project asks for with these extras: name to range (`torch` to `>=2.6,<2.14`).

    Extras that name other extras of the project are followed. Raises KeyError for an unknown one.
    """
    project = tomllib.loads(pyproject)["project"]
    wanted = dict[str, str]()
    seen = set[str]()

    def add(lines: Iterable[str]) -> None:
        for line in lines:
            match = _REQUIREMENT.match(line)
            assert match is not None, line
            if canonical(match["name"]) != PROJECT:
                wanted[canonical(match["name"])] = match["versions"].strip()
                continue
            follow(part.strip() for part in match["extras"].split(","))

    def follow(names: Iterable[str]) -> None:
        for name in names:
            if name not in seen:
                seen.add(name)
                add(project["optional-dependencies"][name])

    add(project["dependencies"])
    follow(extras)
    return dict(sorted(wanted.items()))


def _versions(lock: str) -> dict[str, str]:
    """Name to its version, or versions where they differ from machine to machine."""
    found = dict[str, list[str]]()
    for pin in read_lock(lock):
        versions = found.setdefault(pin.name, [])
        if pin.version not in versions:
            versions.append(pin.version)
    return {name: ", ".join(versions) for name, versions in found.items()}
