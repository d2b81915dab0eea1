"""The command: reads options, plays the cases, prints verdicts.

Cases run concurrently: each case of a client has a process of its own, those of a broker share one
broker, and those of a worker run in a few rows, each with a worker that is replaced when it breaks
a rule.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from tests.conformance import (
    broker_requests,
    broker_sessions,
    client_cases,
    worker_cases,
    worker_streams,
    wrong_cases,
)
from tests.conformance.broker_stage import BrokerStage
from tests.conformance.client_stage import ClientStage
from tests.conformance.verdicts import (
    CASES,
    Broken,
    CannotStart,
    Case,
    Party,
    Report,
    Skipped,
    Verdict,
    judged_by,
    rules,
)
from tests.conformance.worker_stage import WorkerStage

MODULES: Final = (
    broker_sessions,
    broker_requests,
    worker_cases,
    worker_streams,
    client_cases,
    wrong_cases,
)
"""Modules that register their cases when they are imported."""

Stage = BrokerStage | WorkerStage | ClientStage
STAGES: Final[dict[Party, Any]] = {
    "broker": BrokerStage,
    "worker": WorkerStage,
    "client": ClientStage,
}
DESCRIPTION: Final = """Judge a client, a worker or a broker, in any language, by the rules of
broker/protocol/SPEC.md. The kit plays the other side over loopback TCP, and gives each case a
verdict that cites a rule by its number."""
EPILOG: Final = """COMMAND starts the subject. The kit replaces {front}, {back} and {broker} in its
arguments by addresses, and sets them in the environment too:

  broker   binds {front} (KIT_FRONT) for clients and {back} (KIT_BACK) for workers. Short times make
           a short run: client heartbeat 0.25 s, liveness 12, orphan grace 1 s, model grace 0.
  worker   connects to {broker} (KIT_BROKER); serves a model with kind complete in at least two
           slots, and takes 2 ms or more for a token.
  client   connects to {broker} (KIT_BROKER); reads a script from standard input and reports what
           it sees on standard output, one JSON object a line: tests/conformance/README.md.

exit status: 0 no rule was broken, 1 some rule was broken, 2 the command cannot be started

examples:
  python -m tests.conformance client -- python -m tests.conformance.driver
  python -m tests.conformance worker -- python -m worker --engine echo --engine-arg mode=sampled \\
      --engine-arg step_delay_ms=3 --slots 2 --grace-s 5 --broker {broker}
  python -m tests.conformance broker -- python -m broker --front {front} --back {back} \\
      --client-heartbeat-s 0.25 --client-liveness 12 --orphan-grace-s 1 --model-grace-s 0
  python -m tests.conformance client --only window,S7 --junit verdict.xml -- node client.js
  python -m tests.conformance --rules                    which cases judge which rule"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description=DESCRIPTION,
        epilog=EPILOG,
        usage="%(prog)s client|worker|broker [OPTION ...] -- COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("party", nargs="?", choices=list(STAGES), metavar="client|worker|broker")
    made.add_argument(
        "--only", metavar="LIST", default="", help="cases or rules, separated by commas"
    )
    made.add_argument("--skip", metavar="LIST", default="", help="cases to leave out")
    made.add_argument(
        "--seed", type=int, metavar="N", help="seed of ids, prompts and tokens [random, printed]"
    )
    made.add_argument(
        "--junit", type=Path, metavar="FILE", help="also write the verdicts as JUnit XML"
    )
    made.add_argument(
        "--log",
        type=Path,
        metavar="FILE",
        help="where the subject's standard error goes [a temporary file]",
    )
    made.add_argument(
        "--patience",
        type=float,
        default=10.0,
        metavar="S",
        help="longest wait for an answer [%(default)g s]",
    )
    made.add_argument(
        "--jobs",
        type=int,
        default=4,
        metavar="N",
        help="cases that run at the same time [%(default)s]",
    )
    made.add_argument("--list", action="store_true", help="list the cases and what happens in them")
    made.add_argument(
        "--rules", action="store_true", help="list the rules, and the cases that judge them"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, command = words[:at], words[at + 1 :]
    options = parser().parse_args(words)
    if options.rules:
        _list_rules()
        return 0
    if options.list:
        for case in CASES:
            if options.party in (None, case.party):
                print(f"{case.party:<8}{case.name:<34}{' '.join(case.rules):<16}{case.course}")
        return 0
    if options.party is None or not command:
        parser().error("say client, worker or broker, then -- and the command that starts it")
    try:
        cases = _chosen(options.party, options.only, options.skip)
    except ValueError as error:
        parser().error(str(error))
    seed = random.SystemRandom().getrandbits(32) if options.seed is None else options.seed
    report = Report(options.party, shlex.join(command), seed)
    try:
        with _log(options.log) as log:
            for verdict in _play(cases, command, log, options, seed):
                report.verdicts.append(verdict)
                print(verdict.line(), flush=True)
    except CannotStart as error:
        print(f"cannot start the {options.party}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(report.summary())
    if options.junit is not None:
        options.junit.write_text(report.junit() + "\n", encoding="utf-8")
    return 1 if report.failed else 0


@contextlib.contextmanager
def _log(path: Path | None) -> Any:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        yield Path(folder) / "subject.log"


def _chosen(party: Party, only: str, skip: str) -> list[Case]:
    cases = [case for case in CASES if case.party == party]
    wanted, unwanted = _words(only), _words(skip)
    known = {case.name for case in cases} | {rule for case in cases for rule in case.rules}
    for word in (*wanted, *unwanted):
        if word not in known:
            raise ValueError(
                f"no case of a {party} has the name or the rule {word!r}; --list shows them all"
            )
    return [
        case
        for case in cases
        if (not wanted or wanted & {case.name, *case.rules}) and case.name not in unwanted
    ]


def _words(text: str) -> set[str]:
    return {word.strip() for word in text.split(",") if word.strip()}


def _play(
    cases: list[Case], command: list[str], log: Path, options: Any, seed: int
) -> Iterable[Verdict]:
    def stage() -> Stage:
        made: Stage = STAGES[options.party](command, log, options.patience)
        return made

    together = [case for case in cases if not case.alone]
    apart = [case for case in cases if case.alone]
    if options.party == "client":
        together, apart = [], cases
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        if options.party == "broker" and together:
            shared = stage()
            try:
                yield from pool.map(lambda case: _judge(case, shared, seed), together)
            finally:
                shared.stop()
        elif together:
            count = min(options.jobs, len(together))
            rows = [together[number::count] for number in range(count)]
            done = pool.map(lambda row: list(_in_turn(row, stage, seed)), rows)
            for verdicts in done:
                yield from verdicts
        yield from pool.map(lambda case: _alone(case, stage, seed), apart)


def _in_turn(cases: list[Case], stage: Any, seed: int) -> Iterable[Verdict]:
    """Play cases one after another; a subject is used until it breaks a rule."""
    shared: Stage | None = None
    try:
        for case in cases:
            shared = shared or stage()
            verdict = _judge(case, shared, seed)
            if verdict.rule:
                shared.stop()
                shared = None
            yield verdict
    finally:
        if shared is not None:
            shared.stop()


def _alone(case: Case, stage: Any, seed: int) -> Verdict:
    own = stage()
    try:
        return _judge(case, own, seed)
    finally:
        own.stop()


def _judge(case: Case, stage: Any, seed: int) -> Verdict:
    """Play one case."""
    begun_s = time.monotonic()
    rule = what = ""
    skipped = False
    scene = None
    try:
        scene = stage.scene(case.name, f"{seed} {case.name}")
        case.play(scene)
    except Broken as broken:
        rule, what = broken.rule if broken.rule != "?" else case.rules[0], broken.what
    except Skipped as skip:
        skipped, what = True, str(skip)
    finally:
        if scene is not None:
            try:
                scene.close()
            except Broken as broken:
                if not rule:
                    rule, what = broken.rule if broken.rule != "?" else case.rules[0], broken.what
    return Verdict(case, time.monotonic() - begun_s, rule, what, skipped)


def _list_rules() -> None:
    table = judged_by(CASES)
    texts = rules()
    for rule, text in texts.items():
        cases = ", ".join(table.get(rule, [])) or "-"
        print(f"{rule:<4} {cases}\n     {text[:150]}")
    print(f"{sum(rule in table for rule in texts)} of {len(texts)} rules are judged by a case")
