"""What every public suite has in common: what is run, against what, and how its failures count.

A suite is fetched in the release that it names and not changed. Each test that fails has to be in
the suite's file of reasons; one that is not makes the run fail.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import tempfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from tests.gateway.conftest import running_gateway
from tests.harness import Bus

HERE = Path(__file__).parent
#: Workers that a part may ask for, by name, and how each is started.
MODELS: Mapping[str, tuple[str | None, tuple[str, ...]]] = {
    "echo": ("echo", ("--model-name", "echo")),
    "demo": (None, ()),
    "demo-tools": (None, ("--model-path", "demo-tools")),
    # Random weights, which seldom end an answer, and a context of 256 tokens.
    "tiny": (None, ("--model-path", "{folder}/tiny", "--model-name", "tiny")),
}


class Outcome(StrEnum):
    """What a suite says of a test."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class Verdict(StrEnum):
    """Why a test fails."""

    FAULT = "our fault"
    LACK = "we lack it"
    FOREIGN = "does not apply"
    UNKNOWN = "no reason given"


@dataclass(frozen=True, slots=True)
class Test:
    """One test of a suite, and the last words of one that failed."""

    id: str
    outcome: Outcome
    words: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """Tests of a suite that want the same server."""

    #: What the suite's runner is told to run: files or test ids; empty for all.
    tests: tuple[str, ...] = ()
    #: Of `MODELS`.
    models: tuple[str, ...] = ("demo",)
    #: Options of the gateway.
    options: tuple[str, ...] = ()
    #: The only key that the gateway takes; empty: it needs none.
    key: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part runs."""

    #: The gateway's, without a slash at its end.
    url: str
    #: For environments and the suite itself: kept.
    folder: Path
    #: A checkout that the caller brings along, for a suite that is in no registry.
    checkout: Path | None = None

    @property
    def environments(self) -> Path:
        """For `environment` and `node_packages`."""
        return self.folder / "environments"


@dataclass(frozen=True, slots=True)
class Suite:
    """A public suite. `run` runs a part to its end and tells what became of each test."""

    name: str
    release: str
    run: Callable[[Place, Part], Sequence[Test]]
    parts: tuple[Part, ...] = (Part(),)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why tests fail; `tests` are patterns, as of a shell, of their ids."""

    verdict: Verdict
    why: str
    tests: tuple[str, ...]


def reasons(name: str) -> list[Reason]:
    """What `NAME.toml` says. Raises KeyError, ValueError and TypeError where it is malformed."""
    file = HERE / f"{name}.toml"
    if not file.exists():
        return []
    told = tomllib.loads(file.read_text(encoding="utf-8"))
    return [
        Reason(Verdict(row["verdict"]), row["why"], tuple(row["tests"])) for row in told["reason"]
    ]


@dataclass(slots=True)
class Tally:
    """The figures of a run."""

    counts: Counter[str] = field(default_factory=Counter)
    #: Failures without a reason.
    unknown: list[Test] = field(default_factory=list)
    #: Patterns that fit no failure: what they excused has been mended, or was renamed.
    stale: list[str] = field(default_factory=list)

    @property
    def row(self) -> str:
        """The row of the table in README.md: run, pass, fault, lack, does not apply, skipped."""
        keys = (Outcome.PASSED, Verdict.FAULT, Verdict.LACK, Verdict.FOREIGN, Outcome.SKIPPED)
        return " | ".join(str(n) for n in (self.counts.total(), *(self.counts[k] for k in keys)))


def tally(tests: Sequence[Test], known: Sequence[Reason]) -> Tally:
    """Count each test once; the first reason that fits a failure counts."""
    result, used = Tally(), set[str]()
    for test in tests:
        if test.outcome is not Outcome.FAILED:
            result.counts[test.outcome] += 1
            continue
        verdict = Verdict.UNKNOWN
        for reason in known:
            if pattern := next((p for p in reason.tests if fits(test.id, p)), None):
                verdict = reason.verdict
                used.add(pattern)
                break
        else:
            result.unknown.append(test)
        result.counts[verdict] += 1
    result.stale = [p for reason in known for p in reason.tests if p not in used]
    return result


def fits(test: str, pattern: str) -> bool:
    """Whether a test's id is meant: `*` stands for anything, brackets for themselves."""
    return fnmatch.fnmatchcase(test, pattern.replace("[", "[[]"))


@contextlib.contextmanager
def served(part: Part) -> Iterator[str]:
    """A bus of its own with what the part wants: the gateway's URL."""
    with tempfile.TemporaryDirectory(prefix="tokenbus-suites-") as name:
        bus = Bus(Path(name))
        try:
            bus.start_broker()
            for model in part.models:
                engine, options = MODELS[model]
                if model == "tiny":
                    _save_tiny(Path(name) / "tiny")
                words = (word.replace("{folder}", name) for word in options)
                bus.start_worker(model, *words, engine=engine)
            bus.wait_ready(len(part.models))
            options = ("--batch-folder", str(Path(name) / "batches"))
            if part.key:
                keys = Path(name) / "keys.toml"
                digest = hashlib.sha256(part.key.encode()).hexdigest()
                keys.write_text(f'[keys.suite]\nhash = "sha256:{digest}"\n')
                options += ("--keys", str(keys))
            with running_gateway(bus, *options, *part.options) as gateway:
                yield gateway.url
        finally:
            bus.stop()


def _save_tiny(folder: Path) -> None:
    # Only now: it loads torch.
    from tests.engines import tiny

    tiny.llama(context=256).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
