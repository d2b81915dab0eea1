"""`python -m broker invite` and `revoke`: let somebody in with one line, and out again by name.

Both change the allow-lists in a key folder, nothing else; a running broker reads them again within
some seconds. The secret key of an invitation is in the line alone and in no file here.
"""

from __future__ import annotations

import argparse
import math
import socket
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from broker import auth
from broker.protocol import invitation
from broker.protocol.options import OptionParser
from broker.sockets import BindError, check_address

_PORTS: Final = {"worker": 5556, "client": 5555, "operator": 5555}
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
NEVER: Final = "never"


def invite(arguments: Sequence[str], *, program: str) -> tuple[str, str]:
    """Add a peer to the lists. Returns the line for it, and what to say to the operator. Raises
    `KeyFileError`."""
    parser = OptionParser(
        prog=program,
        description="Print one line with which a worker or a client joins this bus, and put its "
        "key on the allow-list. The line holds a secret key: send it as you would a password. It "
        "works on any machine, and on several at once, until it ends or is revoked.",
    )
    parser.add_argument("folder", help="folder made by `python -m broker keys`")
    parser.add_argument("name", help="whom it is for; `revoke` takes this name")
    parser.add_argument("--role", choices=auth.ROLES, default="worker", help="[worker]")
    parser.add_argument(
        "--address",
        action="append",
        metavar="ADDRESS",
        help="under which the other machine reaches this broker, or a TCP proxy before it: its "
        "back address for a worker, its front address for others; repeatable "
        "[tcp://THIS-HOST:5556 or :5555]",
    )
    parser.add_argument(
        "--expires",
        type=_seconds,
        default="30d",
        metavar="TIME",
        help="such as 12h, 30d or never; the broker ends the session then [30d]",
    )
    options = parser.parse_args(arguments)
    folder, role = Path(options.folder), options.role
    auth.check_name(options.name)
    addresses = options.address or [f"tcp://{socket.getfqdn()}:{_PORTS[role]}"]
    for address in addresses:
        try:
            check_address(address)
        except BindError as error:
            raise auth.KeyFileError(f"--address: {error}") from None
    server, _ = auth.load_broker_key(folder)
    public, secret = auth.fresh_pair()
    # The list knows whole seconds; the line must say the same.
    until = None if options.expires is None else math.ceil(time.time() + options.expires)
    with auth.changing(folder):
        if options.name in auth.names(folder):
            raise auth.KeyFileError(
                f"{options.name} is on a list already: choose another name, or revoke it first"
            )
        auth.allow(folder, role, public, options.name, until)
    made = invitation.Invitation(
        role=role,
        name=options.name,
        brokers=addresses,
        server=server.decode("ascii"),
        public=public,
        secret=secret,
        until=until,
    )
    program_of = "worker" if role == "worker" else "client"
    ends = "until it is revoked" if until is None else f"until {_shown(until)}"
    told = (
        f"{options.name} may join as {role} at {', '.join(addresses)} {ends}.\n"
        "The line below holds a secret key: whoever has it can join. There:  "
        f"python -m {program_of} --join LINE   (or a file that holds it, mode 0600)\n"
        f"To end it:  python -m broker revoke {folder} {options.name}"
    )
    return invitation.line(made), told


def revoke(arguments: Sequence[str], *, program: str) -> str:
    """Take a name off all lists; without one, say who is on them. Raises `KeyFileError`."""
    parser = OptionParser(
        prog=program,
        description="Take a peer off the allow-lists by its name; a running broker ends its "
        "sessions within some seconds. Without a name: who may connect.",
    )
    parser.add_argument("folder", help="folder made by `python -m broker keys`")
    parser.add_argument("name", nargs="?", help="as `invite` and `keys --add` were told")
    options = parser.parse_args(arguments)
    folder = Path(options.folder)
    known = auth.names(folder)
    if options.name is None:
        rows = [
            f"{name}  {role}  {'' if until is None else 'until ' + _shown(until)}".rstrip()
            for name, (role, until) in sorted(known.items())
        ]
        return "\n".join(rows) or "nobody is on the lists"
    if options.name not in known:
        names = ", ".join(sorted(known)) or "nobody"
        raise auth.KeyFileError(f"no list names {options.name!r}; on the lists: {names}")
    with auth.changing(folder):
        lists = auth.forbid(folder, options.name)
    left = folder / f"{options.name}.key_secret"
    hint = f"; {left} is of no use any more" if left.exists() else ""
    return f"{options.name} is off {', '.join(lists)}: its sessions end within some seconds{hint}"


def _shown(until: float) -> str:
    return datetime.fromtimestamp(until, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _seconds(text: str) -> float | None:
    if text == NEVER:
        return None
    number, unit = text[:-1], _UNITS.get(text[-1:])
    try:
        value = float(number) * (unit or 0)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e10:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90m, 12h, 30d or never")
    return value
