"""CURVE keys of whoever dials out, from the files that `python -m broker keys` writes.

Must never load zmq.auth where CURVE is off: it is slow to load.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from broker.protocol.keyfiles import exposed

if TYPE_CHECKING:
    from broker.protocol.invitation import Invitation

__all__ = ["KeyFileError", "Keys", "key_pair", "public_key"]


class KeyFileError(Exception):
    """A key file cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Keys:
    """CURVE keys, as ZeroMQ wants them (Z85 text)."""

    #: The broker's public key.
    server: bytes
    public: bytes
    secret: bytes

    @classmethod
    def load(cls, server_key: Path, key: Path) -> Keys:
        """Read the broker's public key and the own pair. Raises `KeyFileError`."""
        return cls(public_key(server_key), *key_pair(key))

    @classmethod
    def invited(cls, invitation: Invitation) -> Keys:
        """Those of an invitation."""
        texts = (invitation.server, invitation.public, invitation.secret)
        return cls(*(text.encode("ascii") for text in texts))

    @classmethod
    def fresh(cls, server: bytes) -> Keys:
        """A new pair, for a broker that lets any key in."""
        return cls(server, *zmq.curve_keypair())


def public_key(path: str | os.PathLike[str]) -> bytes:
    """The public key in a certificate. Raises `KeyFileError`."""
    return _certificate(path)[0]


def key_pair(path: Path) -> tuple[bytes, bytes]:
    """Public and secret key of a certificate. Raises `KeyFileError` for one that holds no secret
    key, or that others can read."""
    public, secret = _certificate(path)
    if secret is None:
        raise KeyFileError(
            f"key file {path} holds no secret key; give the file that ends in .key_secret"
        )
    if why := exposed(path):
        raise KeyFileError(f"key file {why}")
    return public, secret


def _certificate(path: str | os.PathLike[str]) -> tuple[bytes, bytes | None]:
    from zmq import auth

    if not Path(path).exists():
        raise KeyFileError(f"key file {path} does not exist; `python -m broker keys` makes it")
    try:
        return auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise KeyFileError(f"key file {path} cannot be read: {error}") from None
