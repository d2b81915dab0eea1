"""Writes golden.json: the bytes of one message of every kind, as SPEC.md describes them; beside it
wrong.json (`wrong_messages`) and GOLDEN.md, which says of each what it shows.

The golden file is the contract with peers in other languages, so it is only ever extended:
`python -m tests.protocol.make_golden` refuses to change an existing entry unless `--force` is given
(a new protocol version).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from broker.protocol import codec, header
from tests.protocol.golden_examples import examples
from tests.protocol.golden_shows import PAGE_TEXT, SHOWS
from tests.protocol.wrong_base import MEANING
from tests.protocol.wrong_messages import WRONG, as_json, wrong_messages

GOLDEN = Path(__file__).with_name("golden.json")
PAGE = Path(__file__).with_name("GOLDEN.md")


def golden_bytes() -> dict[str, list[str]]:
    """name -> frames as hexadecimal text."""
    written = {}
    for name, (type_, id_, sequence, flags, bodies, attachments) in examples().items():
        frames = [header.encode(type_, id_, sequence, flags)]
        frames += [
            codec.encode_events(body) if isinstance(body, list) else codec.encode(body)
            for body in bodies
        ]
        written[name] = [frame.hex() for frame in [*frames, *attachments]]
    return written


def page() -> str:
    """The text of GOLDEN.md."""
    wrong = [
        (row.name, row.to, row.shows, row.does + (row.code and f", `{row.code}`"), row.rule)
        for row in wrong_messages()
    ]
    return PAGE_TEXT.format(
        golden=_rows((name, row[0].name, SHOWS[name]) for name, row in examples().items()),
        meaning=_rows(MEANING.items()),
        wrong=_rows(wrong),
    )


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    known: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    now = golden_bytes()
    changed = [name for name in now if name in known and known[name] != now[name]]
    if changed and "--force" not in sys.argv:
        sys.exit(f"these messages would change, which needs a new protocol version: {changed}")
    if silent := now.keys() - SHOWS.keys():
        sys.exit(f"say in golden_shows.py what these show, in one line each: {sorted(silent)}")
    GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
    WRONG.write_text(as_json())
    PAGE.write_text(page())
    print(f"{len(now)} messages, {len(now) - len(known)} new; {len(wrong_messages())} wrong ones")


if __name__ == "__main__":
    main()
