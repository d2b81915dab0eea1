"""What a run of the tests saw, and the table of it. Pure: text in, text out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree


@dataclass(frozen=True)
class Deprecation:
    """A call of ours that a library deprecates; `site` is `path:line`."""

    library: str
    site: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """One run of the tests. `failed` are the names of the tests that failed or did not start."""

    passed: int
    failed: tuple[str, ...]
    versions: Mapping[str, str]
    deprecations: tuple[Deprecation, ...] = field(default=())


def read_junit(xml: str) -> tuple[int, tuple[str, ...]]:
    """How many tests passed, and which failed, of a JUnit report; skipped ones are neither."""
    passed, failed = 0, []
    for case in ElementTree.fromstring(xml).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is None:
            passed += 1
    return passed, tuple(dict.fromkeys(failed))


def read_deprecations(lines: Iterable[str]) -> tuple[Deprecation, ...]:
    """The different ones among the lines that `watch` wrote, in order of library and site."""
    # A process that was killed while it wrote leaves half a line.
    whole = {Deprecation(**json.loads(line)) for line in lines if line.endswith("}\n")}
    return tuple(sorted(whole, key=lambda one: (one.library, one.site, one.text)))


def render(runs: Iterable[tuple[tuple[str, ...], Outcome]]) -> str:
    """The table of several runs, each with the libraries that it is about, and what to look at."""
    rows, notes = [], []
    for names, outcome in runs:
        for name in names:
            ours = [one for one in outcome.deprecations if one.library == module_of(name)]
            rows.append(
                (
                    name,
                    outcome.versions.get(name, "absent"),
                    str(outcome.passed),
                    str(len(outcome.failed)),
                    str(len(ours)),
                )
            )
        notes += [f"failed with {_about(names, outcome)}: {test}" for test in outcome.failed]
        notes += [f"{one.library}, {one.site}: {one.text}" for one in outcome.deprecations]
    head = ("library", "version", "passed", "failed", "deprecations of our calls")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = [_line(head, widths), _line(tuple("-" * width for width in widths), widths)]
    lines += [_line(row, widths) for row in rows]
    return "\n".join([*lines, *([""] if notes else []), *dict.fromkeys(notes)])


def module_of(name: str) -> str:
    """The module that a distribution is imported as."""
    return {"pyzmq": "zmq", "pillow": "PIL", "pyyaml": "yaml"}.get(name, name.replace("-", "_"))


def _about(names: tuple[str, ...], outcome: Outcome) -> str:
    if len(names) == 1:
        return f"{names[0]} {outcome.versions.get(names[0], 'absent')}"
    return "these"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"
