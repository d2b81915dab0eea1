"""`python -m client` (`tokenbus`): parse, run one command, turn errors into one line and a status.

Status: 0 success, 1 the bus refused or failed or the demo's answer is wrong, 2 wrong
usage, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from broker.protocol.options import OptionParser, misspelt
from client import BusError, InvalidRequest, TooLarge
from client.cli import (
    batch,
    bench,
    chat,
    classify,
    decide,
    demo,
    generate,
    metrics,
    tables,
    top,
    usage,
)
from client.cli.terminal import Terminal
from client.options import BROKER_VARIABLE
from client.version import version

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parsed = _parser().parse_args(_joined(sys.argv[1:] if arguments is None else arguments))
    run: Callable[[argparse.Namespace, Terminal], int] = parsed.run
    terminal = Terminal()
    for line in misspelt(os.environ, [BROKER_VARIABLE], near_only=True):
        terminal.notice(f"({line})")
    try:
        return run(parsed, terminal)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output is gone; the interpreter must not fail on it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (InvalidRequest, TooLarge, TypeError) as error:
        if isinstance(error, TypeError) and "parameter" not in str(error):
            raise  # ours, not the caller's
        terminal.error(str(error))
        return USAGE
    except BusError as error:
        terminal.error(f"{error} [{error.code}]")
        return FAILED


def _joined(arguments: Sequence[str]) -> list[str]:
    """`--join LINE` may stand before the command, and the command is then `chat` by default."""
    given = list(arguments)
    if given[:1] != ["--join"] or len(given) < 2:
        return given
    command = given[2:] or ["chat"]
    return [command[0], *given[:2], *command[1:]]


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = OptionParser(
        prog="python -m client",
        description="Talk to models behind a tokenbus broker.",
        epilog="`python -m client COMMAND --help` lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"tokenbus {version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo.add(commands)
    generate.add(commands)
    decide.add(commands)
    classify.add(commands)
    chat.add(commands)
    tables.add(commands)
    batch.add(commands)
    metrics.add(commands)
    top.add(commands)
    bench.add(commands)
    usage.add(commands)
    commands.add_parser("version", help="print the version").set_defaults(run=_version)
    return parser


def _version(_: argparse.Namespace, terminal: Terminal) -> int:
    terminal.line(f"tokenbus {version()}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
