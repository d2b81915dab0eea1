"""`usage`: tokens in and out by key, model and day, as a gateway counts them (`--usage FILE`).

Asks the gateway over HTTP, with the caller's key; every caller may see its own.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

from broker.protocol.options import count
from client import InvalidRequest
from client.cli import arguments as flags
from client.cli.terminal import Terminal, cause

KEY_VARIABLE: Final = "TOKENBUS_API_KEY"
_PATIENCE_S: Final = 30.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "usage",
        help="tokens that a key has used at a gateway",
        description="Tokens in and out by day and model, as a gateway with --usage counts them.",
    )
    parser.add_argument(
        "--gateway",
        default="http://127.0.0.1:8000",
        metavar="URL",
        help="the gateway [http://127.0.0.1:8000]",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"the key to ask with [${KEY_VARIABLE}, or none]"
    )
    parser.add_argument(
        "--of", metavar="NAME", help="of another key, or of all: '*'; for operators [your own]"
    )
    parser.add_argument("--days", type=count, default=31, metavar="N", help="of so many days [31]")
    flags.add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print what was used, and what is left."""
    query = {"days": str(arguments.days)}
    if arguments.of is not None:
        query["key"] = arguments.of
    told = _get(arguments, f"/v1/usage?{urllib.parse.urlencode(query)}")
    if arguments.json:
        for row in told["data"]:
            terminal.json(row)
        return 0
    rows = [
        (
            row["day"],
            row["key"] or "-",
            row["model"],
            *(f"{row[name]:,}" for name in ("requests", "prompt_tokens", "completion_tokens")),
        )
        for row in told["data"]
    ]
    terminal.table("usage", ("day", "key", "model", "requests", "in", "out"), rows)
    totals = told["totals"]
    terminal.line(
        f"since {told['since']}: {totals['requests']:,} requests, {totals['prompt_tokens']:,} "
        f"tokens in, {totals['completion_tokens']:,} out"
    )
    if arguments.of is None:
        for span, one in (_get(arguments, "/me")["tokens"] or {}).items():
            if one["budget"] is not None:
                terminal.line(
                    f"this {span}: {one['used']:,} of {one['budget']:,} tokens; "
                    f"{one['left']:,} left until {one['resets_at']}"
                )
    return 0


def _get(arguments: argparse.Namespace, path: str) -> Any:
    base = arguments.gateway.rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise InvalidRequest(f"--gateway {base!r} is not http://HOST:PORT")
    key = arguments.api_key or os.environ.get(KEY_VARIABLE)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    request = urllib.request.Request(base + path, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise InvalidRequest(f"{base}: {_words(error)}") from None
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"no gateway answers at {base}: {cause(error)}") from None


def _words(error: urllib.error.HTTPError) -> str:
    """What the gateway says is wrong."""
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {error.code}"
