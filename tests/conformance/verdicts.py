"""Cases and their verdicts, which are reported as lines for people and as JUnit XML."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal
from xml.etree import ElementTree

PAGE: Final = Path(__file__).parents[2] / "broker" / "protocol" / "SPEC.md"
Party = Literal["client", "worker", "broker"]


class Broken(Exception):
    """The subject broke a rule."""

    def __init__(self, rule: str, what: str) -> None:
        super().__init__(f"[{rule}] {what}")
        self.rule = rule
        self.what = what


class CannotStart(Exception):
    """The command cannot be judged: it was not found, exited at once, or says nothing."""


class Skipped(Exception):
    """The case cannot be tried with this subject; the message says why."""


@dataclass(frozen=True, slots=True)
class Case:
    """One sequence of events, and the rules that it judges."""

    name: str
    party: Party
    rules: tuple[str, ...]
    play: Callable[[Any], None]
    #: What happens in it, in one line.
    course: str
    #: It stops its subject, so it needs one of its own.
    alone: bool = False


CASES: Final[list[Case]] = []


def case(
    party: Party, *rules: str, alone: bool = False
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Register a case. A failure that names no rule counts as a breach of its first rule."""

    def enter(play: Callable[[Any], None]) -> Callable[[Any], None]:
        course = " ".join((play.__doc__ or "").split())
        name = play.__name__.removeprefix(f"{party}_")
        CASES.append(Case(name, party, rules, play, course, alone))
        return play

    return enter


@dataclass(slots=True)
class Verdict:
    """The outcome of a case."""

    case: Case
    seconds: float
    #: Number of the rule that was broken; empty if none was.
    rule: str = ""
    #: What was seen instead, or why it was skipped.
    what: str = ""
    skipped: bool = False

    @property
    def passed(self) -> bool:
        """Whether no rule was broken; a skipped case has neither passed nor failed."""
        return not self.rule and not self.skipped

    def line(self) -> str:
        """The verdict as a line for people."""
        word = "skipped" if self.skipped else "WRONG" if self.rule else "ok"
        broken = f" [{self.rule}]" if self.rule else ""
        seen = f"{broken} {self.what}" if self.what else ""
        return f"{word:<8}{self.case.name:<34}{' '.join(self.case.rules)}{seen and ':' + seen}"


@dataclass(slots=True)
class Report:
    """All verdicts about one subject."""

    party: Party
    command: str
    seed: int
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def failed(self) -> list[Verdict]:
        """The verdicts of cases in which a rule was broken."""
        return [verdict for verdict in self.verdicts if verdict.rule]

    def summary(self) -> str:
        """The counts, and the text of each broken rule."""
        passed = sum(verdict.passed for verdict in self.verdicts)
        skipped = sum(verdict.skipped for verdict in self.verdicts)
        broken = sorted({verdict.rule for verdict in self.failed}, key=_by_number)
        judged = {
            rule for verdict in self.verdicts if verdict.passed for rule in verdict.case.rules
        }
        lines = [
            f"{passed} passed, {len(self.failed)} wrong, {skipped} skipped; "
            f"{len(judged)} rules seen to be kept; seed {self.seed}"
        ]
        lines += [f"[{rule}] {rule_text(rule)}" for rule in broken]
        return "\n".join(lines)

    def junit(self) -> str:
        """The report as JUnit XML: a test case for each case, the rules as properties."""
        suite = ElementTree.Element(
            "testsuite",
            name=f"tokenbus-{self.party}",
            tests=str(len(self.verdicts)),
            failures=str(len(self.failed)),
            errors="0",
            skipped=str(sum(verdict.skipped for verdict in self.verdicts)),
            time=f"{sum(verdict.seconds for verdict in self.verdicts):.3f}",
        )
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in (("command", self.command), ("seed", str(self.seed))):
            ElementTree.SubElement(properties, "property", name=name, value=value)
        for verdict in self.verdicts:
            element = ElementTree.SubElement(
                suite,
                "testcase",
                classname=f"tokenbus.{self.party}",
                name=verdict.case.name,
                time=f"{verdict.seconds:.3f}",
            )
            rules = ElementTree.SubElement(element, "properties")
            for rule in verdict.case.rules:
                ElementTree.SubElement(rules, "property", name="rule", value=rule)
            if verdict.skipped:
                ElementTree.SubElement(element, "skipped", message=verdict.what)
            elif verdict.rule:
                wrong = ElementTree.SubElement(
                    element, "failure", type=verdict.rule, message=verdict.what
                )
                wrong.text = f"{verdict.case.course}\n{rule_text(verdict.rule)}"
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def _by_number(rule: str) -> tuple[str, int]:
    return rule[0], int(rule[1:]) if rule[1:].isdigit() else 0


def rules() -> dict[str, str]:
    """Every rule of SPEC.md by its number: the text up to the next number or paragraph."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(
        r"\[([A-Z]\d+)\]\s+(.*?)(?=\s\[[A-Z]\d+\]\s|\n\s*\n|\n\* |\n#|\Z)", text, re.S
    )
    return {number: " ".join(words.split()) for number, words in found}


KIT_RULE: Final = "kit"
"""What a subject breaks that does not do what tests/conformance/README.md asks of it."""


def rule_text(number: str) -> str:
    """The text of a rule in SPEC.md, on one line."""
    if number == KIT_RULE:
        return "what the kit asks of a subject: tests/conformance/README.md"
    return rules().get(number, "")


def judged_by(cases: Iterable[Case]) -> dict[str, list[str]]:
    """Each rule with the names of the cases that judge it."""
    table: dict[str, list[str]] = {}
    for entry in cases:
        for rule in entry.rules:
            table.setdefault(rule, []).append(f"{entry.party} {entry.name}")
    return table
