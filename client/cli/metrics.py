"""`metrics`: metrics of broker and workers in Prometheus' text format, once or over HTTP.

The HTTP side is a process of its own beside the broker, so that no scrape can disturb its loop.
"""

from __future__ import annotations

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from client import BusError, Client
from client.cli import arguments as flags
from client.cli.terminal import Terminal, cause

#: By default, Prometheus gives up a scrape after 10 s.
_SCRAPE_S: Final = 5.0
_IDLE_S: Final = 30.0


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "metrics",
        help="metrics of broker and workers for Prometheus",
        description="Prints them once, or serves them at http://HOST:PORT/metrics.",
    )
    parser.add_argument(
        "--serve",
        type=_address,
        metavar="HOST:PORT",
        help="serve over HTTP until stopped; there is no authentication, so loopback is best",
    )
    flags.add_connection(parser)
    parser.set_defaults(run=run)


def _address(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or not port.isdecimal() or int(port) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT, such as 127.0.0.1:9464")
    return host.strip("[]") or "127.0.0.1", int(port)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print once, or serve until Ctrl-C."""
    with flags.connect(arguments) as client:
        if arguments.serve is None:
            terminal.piece(client.query("bus.metrics")["text"])
            return 0
        try:
            server = _Server(arguments.serve, client)
        except OSError as error:
            where = ":".join(map(str, arguments.serve))
            terminal.error(f"cannot listen at {where}: {cause(error)}; choose another HOST:PORT")
            return 1
        with server:
            host, port = server.server_address[:2]
            terminal.notice(f"figures at http://{host!s}:{port}/metrics, until Ctrl-C")
            server.serve_forever(poll_interval=0.2)
    return 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], client: Client) -> None:
        self.client = client
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _IDLE_S
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """A scrape."""
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, "text/plain", b"the figures are at /metrics\n")
            return
        try:
            found = self.server.client.query("bus.metrics", timeout=_SCRAPE_S)
        except BusError as error:
            self._answer(503, "text/plain", f"{error.message}\n".encode())
            return
        self._answer(200, found["content_type"], found["text"].encode())

    def _answer(self, status: int, media_type: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is not worth a line."""
