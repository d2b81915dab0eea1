"""`python -m client.gateway`: serve the gateway, or manage its API keys.

Turns every failure to start into one line and an exit code: 2 for a wrong option, 1 for a failure.
"""

from __future__ import annotations

from broker.protocol import early  # noqa: F401  # first: it handles signals from here on

# isort: split

import argparse
import errno
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from broker.protocol import logs
from broker.protocol.install import install_hint
from client import BusError
from client.gateway.config import PREFIX, Config, ConfigError, misspelt_variables, parse_args
from client.gateway.keys import KeyFile, KeyFileError, add_key, remove_key
from client.io.keys import keys_of, server_key_of

PROGRAM = "python -m client.gateway"
GC_THRESHOLD: Final = 50_000
"""Allocations between two garbage collections."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m client.gateway`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["keys"]:
            return _keys(given[1:])
        return _serve(parse_args(given))
    except (ConfigError, KeyFileError) as error:
        return _complain(str(error), 2)
    except BusError as error:
        return _complain(error.message, 2)
    except KeyboardInterrupt:
        return 130


def _complain(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def _serve(config: Config) -> int:
    try:
        from client.gateway.app import create_app
        from client.gateway.server import Server
    except ModuleNotFoundError as error:
        return _complain(
            f"{error.name} is not installed; install it with: {install_hint('gateway')}", 1
        )
    try:
        logs.configure(config.log_level, config.log_format, config.log_file)
    except OSError as error:
        return _complain(f"--log-file {config.log_file}: {error.strerror}", 2)
    for line in misspelt_variables():
        logging.getLogger("tokenbus.gateway").warning("ignored: %s", line)
    connection = config.connection()
    if connection.server_key is not None:
        # The server reads them again, but a failure there would be a traceback.
        server_key_of(connection.server_key)
        keys_of(connection)
    app = create_app(config)
    try:
        listener = _listen(config)
    except OSError as error:
        reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
        return _complain(f"{config.host} port {config.port} {reason}; see --host and --port", 1)
    scheme = "https" if config.tls_cert is not None else "http"
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{scheme}://{host}:{listener.getsockname()[1]}"
    print(
        f"tokenbus gateway on {address} (web page), {address}/v1 (OpenAI base_url)"
        + ("" if config.keys is not None else "; no API keys required"),
        flush=True,
    )
    server = Server(app, config)
    # Objects of a stream die with their last reference, so collect rarely, and exclude
    # what was imported.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    # The server handles signals while it runs and raises them again afterwards; a requested stop is
    # a success. `early` handles SIGTERM.
    signal.signal(signal.SIGINT, lambda *_: None)
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _listen(config: Config) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.set_inheritable(True)
    except OSError:
        listener.close()
        raise
    return listener


def _keys(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} keys", description="Manage API keys.")
    default = Path(os.environ.get(f"{PREFIX}KEYS", "keys.toml"))
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and show it once")
    add.add_argument("name")
    add.add_argument("--rate-per-minute", type=float, help="requests a minute (no limit)")
    add.add_argument("--concurrency", type=int, help="requests at once (no limit)")
    add.add_argument("--tokens-per-day", type=int, help="tokens in and out a day (no limit)")
    add.add_argument("--tokens-per-month", type=int, help="the same a month (no limit)")
    add.add_argument("--max-priority", type=int, default=0, help="highest priority (0)")
    add.add_argument("--operator", action="store_true", help="may drain workers")
    add.add_argument(
        "--many-users", action="store_true", help="fair sharing by the request's `user` field"
    )
    add.add_argument("--model", action="append", help="may use only this model; repeatable")
    remove = commands.add_parser("remove", help="remove a key")
    remove.add_argument("name")
    show = commands.add_parser("list", help="list the names and limits of the keys")
    for command in (add, remove, show):
        command.add_argument("--file", type=Path, default=default, help=f"key file ({default})")
    given = parser.parse_args(arguments)
    if given.command == "add":
        print(
            add_key(
                given.file,
                given.name,
                rate_per_minute=given.rate_per_minute,
                concurrency=given.concurrency,
                max_priority=given.max_priority,
                operator=given.operator,
                many_users=given.many_users,
                models=given.model,
                tokens_per_day=given.tokens_per_day,
                tokens_per_month=given.tokens_per_month,
            )
        )
    elif given.command == "remove":
        remove_key(given.file, given.name)
    else:
        for key in KeyFile(given.file):
            rate = "" if key.rate_per_minute is None else f" {key.rate_per_minute:g}/min"
            running = "" if key.concurrency is None else f" {key.concurrency} at once"
            day = "" if key.tokens_per_day is None else f" {key.tokens_per_day} tokens/day"
            month = "" if key.tokens_per_month is None else f" {key.tokens_per_month} tokens/month"
            operator = " operator" if key.operator else ""
            print(f"{key.name}{rate}{running}{day}{month}{operator}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
