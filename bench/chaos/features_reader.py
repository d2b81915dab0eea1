"""The client process of `bench.chaos` that reads answers of `bench.chaos.features` from gateways.

A stream that breaks off is resumed at the next gateway, from the last event that was read. A
request that is not streamed ends with its gateway, so it is sent again. Like
`tests.support.reader`, this prints `running` once every lane has part of its answer, and one JSON
line at the end. It judges nothing.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Final
from urllib.parse import urlsplit

from bench.chaos.features import ENDS, Heard, request_of
from tests.support.reader import Got

LIMIT_S: Final = 240.0
"""Time limit of one answer, so that one that hangs is counted as an error."""
SILENCE_S: Final = 60.0
"""Longest wait for a line of a stream; a gateway writes a comment every 15 s."""
BEGUN_CHUNKS: Final = 10
RETRIED: Final = frozenset((429, 502, 503, 504))


class Interrupted(Exception):
    """A stream that can be resumed."""


class Refused(Exception):
    """A request that was answered with an error."""


def ask(
    gateways: Sequence[str], path: str, body: dict[str, Any], got: Got
) -> Generator[Heard, None, None]:
    """Read one answer into `got`, resuming where needed; yield the answer so far after each chunk.

    `got.error` is the error that ended it.
    """
    heard, last_id = Heard(), ""
    until_s = time.monotonic() + LIMIT_S
    for attempt in range(1 << 30):
        try:
            gateway = gateways[attempt % len(gateways)]
            for event_id, chunk in _events(gateway, path, body, last_id):
                last_id = event_id
                heard.add(chunk)
                got.arrived_s.append(time.monotonic())
                yield heard
        except (OSError, http.client.HTTPException, Interrupted) as error:
            got.causes.append(f"{type(error).__name__}: {error}"[:200])
            got.resumed += 1
            if time.monotonic() > until_s:
                got.error, got.message = "given_up", got.causes[-1]
                break
            time.sleep(random.uniform(0.02, 0.2))
        except (Refused, ValueError) as error:
            got.error, got.message = "refused", str(error)
            break
        else:
            break
    got.token_ids, got.text, got.logprobs = heard.token_ids, heard.text(), heard.logprobs


def _events(
    gateway: str, path: str, body: dict[str, Any], last_id: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Ids and data of the events of one connection, from the event after `last_id` to the end.

    For a request that is not streamed, the whole answer.
    """
    connection = http.client.HTTPConnection(urlsplit(gateway).netloc, timeout=SILENCE_S)
    headers = {"content-type": "application/json"}
    if last_id:
        headers["last-event-id"] = last_id
    try:
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            message = f"{answer.status}: {answer.read(2000).decode(errors='replace')}"
            raise (Interrupted if answer.status in RETRIED else Refused)(message)
        if not body["stream"]:
            yield "", json.loads(answer.read())
            return
        for line in answer:
            if line.startswith(b"id: "):
                last_id = line[4:].decode().strip()
            elif line.startswith(b"data: "):
                data = line[6:].decode().strip()
                if data == "[DONE]":
                    return
                if '"draining"' in data and '"error"' in data:
                    raise Interrupted(data)
                chunk = json.loads(data)
                yield last_id, chunk
                if str(chunk.get("type")).removeprefix("response.") in ENDS:
                    return
        raise Interrupted("the stream ended before its answer")
    finally:
        connection.close()


class _Lanes:
    """All lanes of this process, one thread each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._late = set(options.lanes)
        self._lock = threading.Lock()

    def read(self) -> list[Got]:
        gots = [Got(lane) for lane in self._options.lanes]
        threads = [threading.Thread(target=self._lane, args=(got,)) for got in gots]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return gots

    def _lane(self, got: Got) -> None:
        options = self._options
        gateways = options.gateways[got.lane % 2 :] + options.gateways[: got.lane % 2]
        path, body = request_of(got.lane, options.tokens)
        if not body["stream"]:
            self._begun(got.lane)  # nothing of it arrives before its end
        for heard in ask(gateways, path, body, got):
            if heard.chunks == BEGUN_CHUNKS:
                self._begun(got.lane)
        self._begun(got.lane)

    def _begun(self, lane: int) -> None:
        with self._lock:
            if lane in self._late:
                self._late.discard(lane)
                if not self._late:
                    print("running", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Read and report; the exit status does not depend on the streams."""
    parser = argparse.ArgumentParser(description="Reader of bench.chaos, with every feature.")
    parser.add_argument("--gateways", type=lambda text: text.split(","), required=True)
    parser.add_argument("--lanes", type=lambda text: range(*map(int, text.split(":"))))
    parser.add_argument("--tokens", type=int, required=True, help="tokens of each choice")
    gots = _Lanes(parser.parse_args(argv)).read()
    print(json.dumps({"streams": [asdict(got) for got in gots]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
