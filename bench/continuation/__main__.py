"""Do streams survive a kill unaltered? `python -m bench.continuation --help`."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.continuation.answers import Outcome
from bench.continuation.deployments import NAMES, Missing, started
from bench.continuation.features import FEATURES
from bench.continuation.measure import Row, Settings, first_model, measure, wait_served

DESCRIPTION = """Asks a deployment of OpenAI's API for streams, kills a part of it in the middle of
them, and counts the answers that were lost, doubled or altered, compared with the undisturbed
answer to the same request. The client is an ordinary one: it never reconnects."""
EPILOG = """outcomes of the answers that ran when something was killed:
  whole     the same as the undisturbed answer, to the last logprob
  lost      it broke off, or ended with an error
  doubled   a part of it came twice
  altered   it ended as if nothing had happened, but is another answer or a part of one

A feature whose undisturbed answer differs from run to run is not counted; the table says so.

exit status: 0 all are whole, 1 some are not, 2 the deployment cannot be measured

examples:
  python -m bench.continuation --deployment ours
  python -m bench.continuation --deployment smg --features greedy,seed --json -
  python -m bench.continuation --base-url http://127.0.0.1:8000/v1 \\
      --kill 'docker kill vllm-1' --restore 'docker start vllm-1' --settle 60"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m bench.continuation",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--base-url", metavar="URL", help="address of any deployment, up to /v1")
    which.add_argument("--deployment", choices=NAMES, help="a deployment that is started here")
    made.add_argument("--kill", metavar="COMMAND", help="shell command that kills, with --base-url")
    made.add_argument("--restore", metavar="COMMAND", help="shell command that starts it again")
    made.add_argument(
        "--settle",
        type=float,
        default=60.0,
        metavar="S",
        help="longest wait until it serves again [60 s]",
    )
    made.add_argument("--model", help="model to ask [the first that the deployment lists]")
    made.add_argument("--api-key", default="", metavar="KEY")
    made.add_argument(
        "--features",
        default=",".join(FEATURES),
        metavar="LIST",
        help=f"some of {', '.join(FEATURES)} [all]",
    )
    made.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="kills for each feature [3]"
    )
    made.add_argument("--streams", type=int, default=4, metavar="N", help="streams at a time [4]")
    made.add_argument(
        "--tokens", type=int, default=160, metavar="N", help="tokens of an answer [160]"
    )
    made.add_argument(
        "--seed", type=int, default=1, metavar="N", help="seed of requests and kills [1]"
    )
    made.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="longest silence of a stream [120 s]",
    )
    made.add_argument(
        "--extra",
        type=json.loads,
        metavar="JSON",
        help="more fields for requests of open length, such as "
        '{"ignore_eos": true} [with --deployment: min_tokens]',
    )
    made.add_argument(
        "--json", metavar="FILE", help="write a line for each feature; - for standard output"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    options = parser().parse_args(arguments)
    features = [name.strip() for name in options.features.split(",") if name.strip()]
    if unknown := set(features) - FEATURES.keys():
        parser().error(f"no such features: {', '.join(sorted(unknown))}")
    if options.base_url and not options.kill:
        parser().error("--base-url needs --kill: without a kill there is nothing to measure")
    with ExitStack() as stack:
        try:
            settings, kill, restore = _prepared(options, stack)
        except (Missing, TimeoutError, OSError, LookupError, ValueError) as error:
            print(f"cannot measure: {error}", file=sys.stderr)
            return 2
        name = options.deployment or options.base_url
        rows = []
        for feature in features:
            row = measure(settings, feature, kill, restore)
            rows.append(row)
            print(f"{feature}: {row.skipped or dict(row.outcomes)}", file=sys.stderr, flush=True)
    lines = [row.as_json(name) for row in rows]
    if options.json == "-":
        print("\n".join(lines))
    elif options.json:
        Path(options.json).write_text("\n".join(lines) + "\n", encoding="utf-8")
    if options.json != "-":
        print(table(name, rows))
    counted = [row for row in rows if not row.skipped]
    if not counted:
        return 2
    return 1 if any(row.outcomes[Outcome.WHOLE] != row.struck for row in counted) else 0


def _prepared(
    options: Any, stack: ExitStack
) -> tuple[Settings, Callable[[], None], Callable[[], None]]:
    common = {
        "key": options.api_key,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "streams": options.streams,
        "seed": options.seed,
        "timeout_s": options.timeout,
    }
    if options.deployment:
        running = stack.enter_context(started(options.deployment))
        extra = {"min_tokens": options.tokens} if options.extra is None else options.extra
        settings = Settings(running.base_url, running.model, extra=extra, **common)
        wait_served(settings, 180.0)

        def restore() -> None:
            running.restore()
            wait_served(settings, 180.0)

        return settings, running.kill, restore
    model = options.model or first_model(options.base_url, options.api_key)
    settings = Settings(options.base_url, model, extra=options.extra or {}, **common)

    def kill() -> None:
        subprocess.run(options.kill, shell=True, check=True)

    def restore_by_command() -> None:
        if options.restore:
            subprocess.run(options.restore, shell=True, check=True)
        time.sleep(1.0)
        wait_served(settings, options.settle)

    return settings, kill, restore_by_command


def table(name: str, rows: Sequence[Row]) -> str:
    """The results as a Markdown table."""
    head = ["feature", "struck", *(outcome.value for outcome in Outcome), "what was seen"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        counts = ["–"] * 5 if row.skipped else [str(row.struck)]
        counts += [] if row.skipped else [str(row.outcomes[outcome]) for outcome in Outcome]
        seen = row.skipped or "; ".join(row.seen[:1])
        lines.append(f"| {' | '.join([row.feature, *counts, seen.replace('|', '/')[:160]])} |")
    return f"{name}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    # Unwind on SIGTERM, so that all processes are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
