"""Our client as a subject of the kit: it reads the script and reports what it sees.

README.md describes the lines that it reads and writes. Each answer has a thread, as in a program
that uses the library.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from typing import Any

from client import BusError, Client, ClientClosed, End, Tokens

_WRITING = threading.Lock()


def say(**line: Any) -> None:
    """Write a line that says what was seen."""
    with _WRITING:
        print(json.dumps(line), flush=True)


class Asked(threading.Thread):
    """One answer."""

    def __init__(self, client: Client, order: dict[str, Any]) -> None:
        super().__init__()
        self.name_ = order["name"]
        options: dict[str, Any] = {"max_tokens": order["max_tokens"], "seed": order["seed"]}
        if "image" in order:
            options["images"] = [base64.b64decode(order["image"])]
        self._stream = client.generate(
            order["prompt"], model=order["model"], stream=True, **options
        )
        self._cancelled = False

    def run(self) -> None:
        try:
            for event in self._stream:
                text = event.text if isinstance(event, Tokens | End) else ""
                if text:
                    say(name=self.name_, text=text)
                if isinstance(event, End):
                    say(name=self.name_, end=event.finish_reason.value)
        except ClientClosed:
            say(name=self.name_, fail="closed")
        except BusError as error:
            if not self._cancelled:
                say(name=self.name_, fail=error.code)

    def cancel(self) -> None:
        """The application cancels the answer."""
        self._cancelled = True
        self._stream.close()
        say(name=self.name_, end="cancelled")


def main() -> int:
    """Run until the script and all answers have ended."""
    asked: dict[str, Asked] = {}
    with Client(os.environ["KIT_BROKER"], name="driver") as client:
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "ask":
                asked[order["name"]] = Asked(client, order)
                asked[order["name"]].start()
            elif order["do"] == "cancel":
                asked[order["name"]].cancel()
        for thread in asked.values():
            thread.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
