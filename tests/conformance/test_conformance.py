"""Our client, worker and broker keep every rule that the kit judges, and wrong ones do not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conformance.cli import main
from tests.conformance.verdicts import CASES, Party, rules
from tests.conformance.wrong_ones import BUGS
from tests.harness import ROOT, WHOLE_RUN_S

#: Enough for a busy machine; a message that does come never takes this long.
PATIENCE = ("--patience", "60")
COMMANDS: dict[str, tuple[str, ...]] = {
    "client": ("tests.conformance.driver",),
    "worker": (
        *("worker", "--broker", "{broker}", "--engine", "echo", "--slots", "2", "--grace-s", "5"),
        *("--engine-arg", "mode=sampled", "--engine-arg", "step_delay_ms=3"),
    ),
    "broker": (
        *("broker", "--front", "{front}", "--back", "{back}"),
        *("--client-heartbeat-s", "0.25", "--client-liveness", "12"),
        *("--worker-heartbeat-s", "0.25", "--worker-liveness", "12"),
        *("--orphan-grace-s", "1", "--model-grace-s", "0", "--poison-wait-s", "1"),
    ),
}


def judge(party: str, *options: str, run: Sequence[str] = (sys.executable, "-m")) -> int:
    """The kit's exit status for our own party."""
    return main([party, *PATIENCE, *options, "--", *run, *COMMANDS[party]])


@pytest.mark.parametrize("party", list(COMMANDS))
def test_our_parties_keep_every_rule(
    party: Party, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = tmp_path / "verdicts.xml"
    status = judge(party, "--seed", "7", "--junit", str(verdicts))
    output = capsys.readouterr().out
    assert status == 0, output
    suite = ElementTree.parse(verdicts).getroot()
    names = [str(case.get("name")) for case in suite.iter("testcase")]
    assert sorted(names) == sorted(case.name for case in CASES if case.party == party)
    assert suite.get("failures") == "0" and not list(suite.iter("failure"))


CAUGHT_BY = {
    "client sends no heartbeats while it hears": ("beats_while_it_reads", "S7"),
    "client counts bytes as characters": ("interrupted", "M5"),
    "client believes any route": ("wrong_output_forged_route", "K3"),
    "worker sends one token past the window": ("window", "W1"),
    "worker does not answer CANCEL of an unknown request": ("cancel_unknown", "C4"),
    "worker resumes one token too far": ("attach", "O1"),
    "broker accepts a lower grant": ("lower_grant", "G1"),
    "broker accepts an older epoch": ("resume", "M4"),
    "broker blames a request for every death": ("interrupted", "M1"),
}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_faulty_party_is_caught_by_the_rule_that_it_breaks(
    bug: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = bug.name  # type: ignore[attr-defined]
    case, rule = CAUGHT_BY[name]
    verdicts = tmp_path / "verdicts.xml"
    run = (sys.executable, "-m", "tests.conformance.wrong_ones", name)
    options = ("--only", case, "--patience", "3", "--junit", str(verdicts))
    status = judge(name.split(" ")[0], *options, run=run)
    output = capsys.readouterr().out
    assert status == 1, output
    (failure,) = ElementTree.parse(verdicts).getroot().iter("failure")
    assert failure.get("type") == rule, output
    assert f"[{rule}]" in output


def test_each_case_judges_rules_of_the_specification_and_says_what_happens() -> None:
    known = rules()
    for case in CASES:
        assert case.rules and set(case.rules) <= known.keys(), case
        assert case.course, case
    judged = {rule for case in CASES for rule in case.rules}
    assert len(judged) >= 80, sorted(known.keys() - judged)


@pytest.mark.parametrize("party", list(COMMANDS))
@pytest.mark.parametrize("command", ["no-such-command-anywhere", "false"])
def test_a_command_that_cannot_be_started_is_reported_in_one_line(
    party: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([party, "--", command]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"cannot start the {party}: ") and errors.count("\n") == 1


def test_help_says_what_a_subject_must_do() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.conformance", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WHOLE_RUN_S,
    )
    assert ran.returncode == 0
    for word in ("{front}", "KIT_BROKER", "--junit", "exit status"):
        assert word in ran.stdout
