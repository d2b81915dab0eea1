"""What `encrypted_content` holds: a thought or a summary, for clients that send back nothing else
of it. It is no secret from who asked for it, so it is only packed. Must never fail on what a client
sends back.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

__all__ = ["SUMMARY", "sealed", "unsealed"]

_SEAL: Final = "tokenbus1."

#: Begins what a model is shown of a summary.
SUMMARY: Final = "Summary of our conversation so far:\n\n"


def sealed(text: str) -> str:
    """A text as `encrypted_content`."""
    return _SEAL + base64.urlsafe_b64encode(text.encode()).decode()


def unsealed(given: str) -> str:
    """The text again; empty where another server sealed it, or a client cut it."""
    if not given.startswith(_SEAL):
        return ""
    try:
        return base64.urlsafe_b64decode(given.removeprefix(_SEAL)).decode()
    except (binascii.Error, ValueError):
        return ""
