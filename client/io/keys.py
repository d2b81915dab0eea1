"""The CURVE keys of a client, as its `Connection` gives them: files, text, or none at all."""

from __future__ import annotations

import os

from broker.peer.keys import KeyFileError, Keys, key_pair, public_key
from client.errors import InvalidRequest
from client.options import Connection

__all__ = ["keys_of", "server_key_of"]


def keys_of(connection: Connection) -> Keys | None:
    """The keys that a socket needs; None without CURVE. If the client has no key of its own, the
    broker accepts any, so a fresh one is made.

    Raises `InvalidRequest` for a file that holds no secret key, or that others can read.
    """
    if connection.server_key is None:
        return None
    server = connection.server_key.encode("ascii")
    if connection.key_pair is not None:
        public, secret = connection.key_pair
        return Keys(server, public.encode("ascii"), secret.encode("ascii"))
    if connection.key_file is None:
        return Keys.fresh(server)
    try:
        return Keys(server, *key_pair(connection.key_file))
    except KeyFileError as error:
        raise InvalidRequest(str(error)) from None


def server_key_of(given: str) -> str:
    """A broker's public key: 40 characters of Z85, or a path to its `.key` file.

    Raises `InvalidRequest` for anything else.
    """
    if len(given) == 40 and not os.path.exists(given):  # noqa: PTH110  # 40 characters may be no path
        return given
    try:
        return public_key(given).decode("ascii")
    except KeyFileError as error:
        raise InvalidRequest(
            f"server_key {given!r} is neither 40 characters of Z85 nor a .key file: {error}"
        ) from None
