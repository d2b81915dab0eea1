"""Signatures of thoughts: a thought that comes back in a conversation is the one that was given.

A signature is a keyed BLAKE2b of the thought. The key is `--signing-key`, the same for all gateways
of a bus; without it, one that everybody knows, which shows a thought that was changed by accident
but not one that was changed on purpose. A thought that is not shown travels inside its signature,
compressed and readable: it is kept from the page, not from the caller.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import zlib
from pathlib import Path
from typing import Final

from broker.protocol.limits import MAX_REQUEST_BYTES

__all__ = ["Signer"]

_VERSION: Final = "tb1"
_DIGEST_BYTES: Final = 32
#: Of BLAKE2b.
_MAX_KEY_BYTES: Final = 64
_EVERYBODYS: Final = b"tokenbus"


class Signer:
    """Signs and checks with one key."""

    def __init__(self, key: bytes = _EVERYBODYS) -> None:
        if len(key) > _MAX_KEY_BYTES:
            key = hashlib.blake2b(key).digest()
        self._key = key

    @classmethod
    def of(cls, path: Path | None) -> Signer:
        """With the key in a file, or everybody's. Raises OSError; ValueError for a short key."""
        if path is None:
            return cls()
        key = path.read_bytes().strip()
        if len(key) < 16:
            raise ValueError(f"{path} has {len(key)} bytes; a key has 16 or more")
        return cls(key)

    def sign(self, thought: str, *, carry: bool = False) -> str:
        """The signature of a thought. `carry`: it holds the thought as well."""
        parts = [_VERSION, _text(self._mac(thought))]
        if carry:
            parts.append(_text(zlib.compress(_bytes(thought))))
        return ".".join(parts)

    def read(self, thought: str, signature: str) -> str | None:
        """The thought as it was signed, also where the signature carries it; None if either was
        changed or the signature is not of this key."""
        version, _, rest = signature.partition(".")
        mac, carries, carried = rest.partition(".")
        if version != _VERSION:
            return None
        try:
            if carries and not thought:
                unpacking = zlib.decompressobj()
                unpacked = unpacking.decompress(_decoded(carried), MAX_REQUEST_BYTES)
                if not unpacking.eof:
                    return None
                thought = unpacked.decode("utf-8", "surrogatepass")
            signed = _decoded(mac)
        except (binascii.Error, ValueError, zlib.error):
            return None
        return thought if hmac.compare_digest(signed, self._mac(thought)) else None

    def _mac(self, thought: str) -> bytes:
        return hashlib.blake2b(
            _bytes(thought), digest_size=_DIGEST_BYTES, key=self._key, person=b"thought"
        ).digest()


def _bytes(text: str) -> bytes:
    # JSON may hold half of a surrogate pair.
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
