"""Every bound of the wire, in one place, each with its reason (SPEC.md section 9).

A limit protects the receiver; the sender checks it first, so that its user reads a clear error
instead of seeing a connection cut by the peer.
"""

from typing import Final

PROTOCOL_VERSION: Final = 1

ID_BYTES: Final = 16
"""Request, session and route ids: 128 random bits, never reused, not guessable."""

HEADER_BYTES: Final = 32
"""Exactly; anything else is refused before a decoder sees it."""

MAX_CONTROL_BYTES: Final = 64 * 1024
"""Body of every message except REQUEST, RESUME, ASSIGN, OUTPUT and ANSWER; real ones are
below 2 KiB."""

MAX_HELLO_BYTES: Final = 4 * 1024 * 1024
"""HELLO: a worker lists the requests that it holds, about 60 bytes each."""

MAX_REQUEST_BYTES: Final = 8 * 1024 * 1024
"""A conversation of one million tokens as ids is about 5 MiB."""

MAX_OUTPUT_BYTES: Final = 1024 * 1024
"""One engine step for one client's requests; a worker splits larger ones."""

MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
"""`bus.workers` of a thousand workers is under 1 MiB."""

MAX_ATTACHMENTS: Final = 16
MAX_ATTACHMENT_BYTES: Final = 16 * 1024 * 1024
"""A 24-megapixel photograph as JPEG is about 10 MiB."""
MAX_ATTACHMENTS_BYTES: Final = 64 * 1024 * 1024
"""All attachments of one message."""

MAX_FRAMES: Final = 4 + MAX_ATTACHMENTS
"""Routing id, header, up to two bodies, attachments. libzmq itself has no limit: it
accepted 200,000 frames."""

MAX_NESTING: Final = 32
"""Nesting of free-form values (a tool's JSON schema, error details). Real schemas stay
under 12 levels."""
MAX_ARRAY_ITEMS: Final = 1 << 20
MAX_MAP_ITEMS: Final = 1 << 17
"""logit_bias may name every token of a large vocabulary."""

MAX_NAME_BYTES: Final = 256
"""Names of models, workers, clients."""
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARACTERS: Final = 1024
MAX_KEPT_SPECIALS: Final = 64
"""The gateway's formats for tool calls and reasoning together use fewer than 30 markers."""
MAX_TOP_LOGPROBS: Final = 20
MAX_QUESTIONS: Final = 64
"""Of one decide request, as in the System One API that its servers have in common."""
MAX_HELD_REQUESTS: Final = 65_536

MAX_INTEGER: Final = (1 << 53) - 1
"""SPEC.md [E3]: beyond it, languages without 64-bit integers lose digits."""
MAX_MILLISECONDS: Final = 1 << 40
"""35 years."""
MAX_SECONDS: Final = 1e9
"""Of an option: as milliseconds it is below that bound, whatever is added on the way."""
MAX_WINDOW_TOKENS: Final = 1 << 31
"""Of WELCOME."""
MAX_SPEED: Final = 1e9

DEFAULT_WINDOW_TOKENS: Final = 4096
"""How many tokens a worker may run ahead of what the client's application has read."""
