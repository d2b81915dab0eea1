"""An invitation: one line with all that a worker or client needs to join a bus with CURVE on.

`python -m broker invite` prints it, `--join` takes it. It holds a secret key: whoever has the line
can act as that peer until the key is removed from the broker's list or its time is over. Pure, but
for `read`, which reads a file.
"""

from __future__ import annotations

import base64
import binascii
import time
import zlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import msgspec

from broker.protocol.keyfiles import exposed

PREFIX: Final = "tokenbus1."
_CHECK_BYTES: Final = 4
_Z85 = Annotated[str, msgspec.Meta(min_length=40, max_length=40)]


class InvitationError(ValueError):
    """The text is no invitation that can be used here; the message says why and what to do."""


class Invitation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the line says."""

    #: client, worker or operator; the last two say at which of the broker's addresses.
    role: str
    name: str
    #: Addresses of the broker, or of several with the same keys.
    brokers: list[str]
    #: Z85: the broker's public key, and the pair of the peer.
    server: _Z85
    public: _Z85
    secret: _Z85
    #: Unix time; None: until it is revoked.
    until: float | None = None


def line(invitation: Invitation) -> str:
    """The invitation as one word without characters that a shell treats specially."""
    body = msgspec.json.encode(invitation)
    check = zlib.crc32(body).to_bytes(_CHECK_BYTES, "big")
    return PREFIX + base64.urlsafe_b64encode(check + body).decode("ascii").rstrip("=")


def parse(text: str) -> Invitation:
    """The invitation that a line holds. Raises `InvitationError`."""
    text = "".join(text.split())  # mail programs break long lines
    if not text.startswith(PREFIX):
        raise InvitationError(
            f"not an invitation: it begins with {PREFIX} (`python -m broker invite` prints one)"
        )
    data = text.removeprefix(PREFIX)
    try:
        raw = base64.b64decode(data + "=" * (-len(data) % 4), altchars=b"-_", validate=True)
        body = raw[_CHECK_BYTES:]
        if zlib.crc32(body).to_bytes(_CHECK_BYTES, "big") != raw[:_CHECK_BYTES]:
            raise ValueError
    except (binascii.Error, ValueError):
        raise InvitationError("the invitation is cut short or mistyped: copy all of it") from None
    try:
        return msgspec.json.decode(body, type=Invitation)
    except msgspec.ValidationError as error:
        raise InvitationError(f"the invitation is of another version: {error}") from None


def read(given: str, *roles: str, now: float | None = None) -> Invitation:
    """The invitation in a line, or in a file that holds one, for one of these roles. Raises
    `InvitationError`."""
    text = given if given.strip().startswith(PREFIX) else _from_file(Path(given))
    invitation = parse(text)
    if invitation.role not in roles:
        where = "worker" if invitation.role == "worker" else "client"
        raise InvitationError(
            f"the invitation is one for a {invitation.role}: python -m {where} --join takes it"
        )
    now = time.time() if now is None else now
    if invitation.until is not None and now >= invitation.until:
        ended = datetime.fromtimestamp(invitation.until).isoformat(" ", "minutes")
        raise InvitationError(f"the invitation ended on {ended}: ask for a new one")
    return invitation


def _from_file(path: Path) -> str:
    try:
        if why := exposed(path):
            raise InvitationError(why)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvitationError(
            f"{str(path)[:60]}: neither an invitation ({PREFIX}...) nor a file of one: {reason}"
        ) from None
