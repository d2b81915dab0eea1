"""Decisions: questions per second, beside `transformers serve` on the same model.

    python -m bench.decide --quick
    python -m bench.decide --size 32m --questions 8,64 --only several,image

Our bus (client library) and our gateway (`/v1/systemone`) in front of one worker take turns with
`transformers serve`, which answers one question after another; all have the same model, dtype and
threads. Every request is new in every round, so that no system can reuse an earlier answer. The
peer gets only some of them: its rate does not depend on how many wait.

Cases (`--only` selects):

* several: each client asks its questions about a state of its own.
* same: all clients ask their own questions about one state.
* single: one question about a state of its own, which shows the gain of batching alone.
* image: like several, with an image in the state.

Answers are compared: *lost* questions have no answer, *altered* ones differ from the peer's by more
than rounding explains. The last column is the ratio.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import asyncio
import base64
import contextlib
import io
import json
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image, ImageDraw

from bench.common import (
    ROOT,
    Process,
    Report,
    Sample,
    free_port,
    integers,
    options,
    percentile,
    progress,
    python,
    repeats,
    short,
    wait_port,
)
from bench.engine.cases import KV_TOKENS, SIZES, build_vision, paired, spoken_tokenizer
from bench.engine.served import READY_S, Folder, save_folder, transformers_serve
from bench.systems import Unavailable, bus_servers

CASES = ("several", "same", "single", "image")
ROUNDING = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.02}
"""Largest difference of a probability that the order of additions explains, by dtype. The promise
is made for float32; the other values follow from the bits of the mantissa."""
ANSWER_S = 600.0
"""Longest wait for one answer: a peer that answers one by one keeps the last client waiting."""
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
SIDE = 640
"""Pixels of an image's longer side, as it is sent."""


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """One request."""

    state: str
    questions: dict[str, dict[str, Any]]
    #: PNG or JPEG files by the name that stands for them in the state.
    images: dict[str, bytes] = field(default_factory=dict)

    def body(self, model: str) -> dict[str, Any]:
        """The body of `/v1/systemone`."""
        assets = {
            name: {
                "type": "image",
                "format": "jpeg",
                "data_base64": base64.b64encode(data).decode(),
            }
            for name, data in self.images.items()
        }
        asked = {"model": model, "state": self.state, "questions": self.questions}
        return asked | ({"assets": assets} if assets else {})


class Writer:
    """Makes requests of English words, different for each seed."""

    def __init__(self, words: Sequence[str], state_words: int) -> None:
        self._words = words
        self._state_words = state_words

    def text(self, choose: random.Random, words: int) -> str:
        """Consecutive words of the documents."""
        start = choose.randrange(len(self._words) - words)
        return " ".join(self._words[start : start + words])

    def requests(self, case: str, count: int, questions: int, seed: int) -> list[Asked]:
        """`count` requests of a case."""
        choose = random.Random(f"{case} {seed}")
        common = self.text(choose, self._state_words)
        asked = []
        for number in range(count):
            state = common if case == "same" else self.text(choose, self._state_words)
            images = {}
            if case == "image":
                images = {"image-1": _image(choose)}
                state = f"image-1 {state}"
            asked_of = 1 if case == "single" else questions
            asked.append(
                Asked(
                    state,
                    {f"q{number}-{i}": self._question(choose, i) for i in range(asked_of)},
                    images,
                )
            )
        return asked

    def _question(self, choose: random.Random, number: int) -> dict[str, Any]:
        question: dict[str, Any] = {"instructions": f"{self.text(choose, 8)}?"}
        match number % 3:
            case 0:
                return question | {"type": "noul"}
            case 1:
                options = {self.text(choose, 1) + str(i): self.text(choose, 3) for i in range(3)}
                return question | {"type": "choice", "criteria": options}
            case _:
                levels = [self.text(choose, 2) for _ in range(3)]
                return question | {"type": "score", "criteria": levels}


def _image(choose: random.Random) -> bytes:
    image = Image.new("RGB", (SIDE, SIDE * 3 // 4), tuple(choose.randrange(256) for _ in "rgb"))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, top = choose.randrange(SIDE), choose.randrange(SIDE // 2)
        box = (left, top, left + choose.randrange(20, 200), top + choose.randrange(20, 200))
        draw.rectangle(box, fill=tuple(choose.randrange(256) for _ in "rgb"))
    data = io.BytesIO()
    image.save(data, "JPEG")
    return data.getvalue()


def documents() -> str:
    """English text that is always available: the guides of this project."""
    return "\n".join(path.read_text() for path in sorted(ROOT.rglob("*.md")))


LABELS = "Yes\nNo\n" * 1000
"""Repeated so often that the tokenizer learns each as one token, as labels must be."""


# --- systems --------------------------------------------------------------------------------------


Answers = dict[str, list[float]]
"""By question: the probability of true, or those of all allowed answers, in order."""


class System(Protocol):
    """Ours or the peer."""

    async def decide(self, asked: Asked) -> Answers: ...


class Bus:
    """The client library, one client for all."""

    def __init__(self, client: Any) -> None:
        self._client = client

    async def decide(self, asked: Asked) -> Answers:
        decided = await self._client.decide(
            "bench", asked.state, asked.questions, images=asked.images, timeout=ANSWER_S
        )
        return {
            name: [answer.noul] if answer.type == "noul" else [*answer.probabilities.values()]
            for name, answer in decided.items()
        }


class Http:
    """`POST /v1/systemone`, by the cheapest possible client."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._model = model

    async def decide(self, asked: Asked) -> Answers:
        body = json.dumps(asked.body(self._model)).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 22)
        writer.write(
            b"POST /v1/systemone HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        try:
            async with asyncio.timeout(ANSWER_S):
                head, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if b" 200 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(f"/v1/systemone: {(head + answer)[:500]!r}")
        return {
            name: [one["noul"]] if one["type"] == "noul" else [*one["probabilities"].values()]
            for name, one in json.loads(answer)["answers"].items()
        }


@contextlib.asynccontextmanager
async def opened(folder: Folder, arguments: argparse.Namespace) -> AsyncIterator[dict[str, System]]:
    """Bus, gateway and the peer, all running."""
    from client import AsyncClient

    dtype = arguments.dtype
    async with contextlib.AsyncExitStack() as stack:
        worker = ("--model-path", str(folder.path), "--model-name", "bench", "--dtype", dtype)
        front, _ = stack.enter_context(
            bus_servers(
                "transformers",
                folder.slots,
                *([f"kv_tokens={KV_TOKENS}"] if folder.device == "cpu" else []),
                options=(*worker, "--device", folder.device, "--threads", str(folder.threads)),
                ready_s=READY_S,
            )
        )
        systems: dict[str, System] = {
            "bus": Bus(await stack.enter_async_context(AsyncClient(front)))
        }
        port = free_port()
        command = python("-m", "client.gateway", "--broker", front, "--port", str(port))
        wait_port(port, stack.enter_context(Process(command)))
        systems["gateway"] = Http(port, "bench")
        if PEER not in arguments.without:
            port, _ = stack.enter_context(transformers_serve(folder, "--dtype", dtype))
            systems[PEER] = Http(port, str(folder.path))
        yield systems


PEER = "transformers_serve"


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The results of one system in one round."""

    questions_per_s: float
    latency_ms: float
    #: The answers of each request; None if it failed.
    answers: list[Answers | None]
    fault: str = ""


async def run(system: System, requests: Sequence[Asked], clients: int) -> Seen:
    """Send all requests from `clients` clients, each with one at a time."""
    answers: list[Answers | None] = [None] * len(requests)
    took_ms: list[float] = []
    faults: list[str] = []
    left = iter(range(len(requests)))

    async def client() -> None:
        for index in left:
            began = time.monotonic()
            try:
                answers[index] = await system.decide(requests[index])
            except Exception as error:
                faults.append(short(error))
            took_ms.append((time.monotonic() - began) * 1e3)

    began = time.monotonic()
    await asyncio.gather(*(client() for _ in range(clients)))
    took_s = time.monotonic() - began
    asked = sum(
        len(request.questions)
        for request, answer in zip(requests, answers, strict=True)
        if answer is not None
    )
    return Seen(asked / took_s, percentile(took_ms, 50), answers, faults[0] if faults else "")


def lost(requests: Sequence[Asked], seen: Seen) -> int:
    """Questions that have no answer."""
    return sum(
        len(asked.questions.keys() - (answer or {}).keys())
        for asked, answer in zip(requests, seen.answers, strict=True)
    )


def altered(own: Sequence[Answers | None], peer: Sequence[Answers | None], most: float) -> int:
    """Questions whose answers differ from the peer's by more than `most`, of the requests that
    both have answered."""
    pairs = (
        (one[name], other[name])
        for one, other in zip(own, peer, strict=False)
        if one is not None and other is not None
        for name in one
    )
    return sum(
        len(got) != len(right) or max(abs(a - b) for a, b in zip(got, right, strict=True)) > most
        for got, right in pairs
    )


async def measure(arguments: argparse.Namespace, report: Report, folder: Folder) -> None:
    """Every case, all systems in turn."""
    writer = Writer(documents().split(), arguments.state)
    clients, count = arguments.clients, arguments.requests or arguments.clients
    few = min(arguments.peer_requests, count)
    async with opened(folder, arguments) as systems:
        for case, asked_of in _loads(arguments):
            seen: dict[str, list[Seen]] = {name: [] for name in systems}
            faults = dict.fromkeys(systems, 0)
            wrong = dict.fromkeys(systems, 0)
            # A short run first, for one-time work.
            for system in systems.values():
                await run(system, writer.requests(case, 2, 2, seed=-1), 2)
            for round_ in range(min(repeats(arguments), 3)):
                asked: dict[str, list[Asked]] = {}
                for name in systems:
                    progress(f"{case}: {name}, round {round_ + 1}")
                    # Bus and gateway share a prefix cache, so they must not send the same requests.
                    seed = 2 * round_ + (name == "gateway")
                    requests = writer.requests(case, count, asked_of, seed)
                    asked[name] = requests[:few] if name == PEER else requests
                    seen[name].append(await run(systems[name], asked[name], clients))
                    faults[name] += lost(asked[name], seen[name][-1])
                    if fault := seen[name][-1].fault:
                        report.note(f"{case}, {name}: {fault}")
                if PEER in systems:
                    # The peer got the same requests as the bus; those of the gateway follow.
                    again = asked["gateway"][: arguments.compared]
                    right = {
                        "bus": seen[PEER][-1].answers,
                        "gateway": (await run(systems[PEER], again, clients)).answers,
                    }
                    for name, answers in right.items():
                        most = ROUNDING[arguments.dtype]
                        wrong[name] += altered(seen[name][-1].answers, answers, most)
            common = {"clients": clients, "questions": asked_of, "state_words": arguments.state}
            _add(report, case, seen, faults, wrong, common, few)


def _loads(arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """The cases, each with its number of questions per request."""
    counts = arguments.questions
    usual = counts[len(counts) // 2]
    of = {"several": counts, "same": [usual], "single": [1], "image": [usual]}
    return [(case, count) for case in arguments.only for count in of[case]]


def _add(
    report: Report,
    case: str,
    seen: dict[str, list[Seen]],
    faults: dict[str, int],
    wrong: dict[str, int],
    common: dict[str, Any],
    few: int,
) -> None:
    def sample(name: str, figure: str) -> Sample:
        return Sample(tuple(getattr(each, figure) for each in seen[name]))

    beside = PEER in seen and all(each.questions_per_s for each in seen[PEER])
    for name in (name for name in seen if name != PEER):
        own = sample(name, "questions_per_s")
        report.add(
            "decide.questions_per_s",
            own,
            "1/s",
            peer=PEER if beside else None,
            against=paired(own, sample(PEER, "questions_per_s")) if beside else None,
            peer_requests=few if beside else None,
            case=case,
            path=name,
            **common,
        )
        latency = sample(name, "latency_ms")
        report.add("decide.latency_ms", latency, "ms", case=case, path=name, **common)
        report.add("decide.lost", float(faults[name]), "questions", case=case, path=name, **common)
        if beside:
            report.add(
                "decide.altered", float(wrong[name]), "questions", case=case, path=name, **common
            )


@contextlib.contextmanager
def saved(arguments: argparse.Namespace) -> Iterator[Folder]:
    """A vision-language model on disk, with a tokenizer of English words."""
    shape = SIZES[arguments.size]
    model, processor = build_vision(
        shape, torch.device("cpu"), spoken_tokenizer(shape.vocabulary - 1, documents() + LABELS)
    )
    processor.chat_template = processor.tokenizer.chat_template = TEMPLATE
    model = model.to(getattr(torch, arguments.dtype))
    with save_folder(model, processor) as path:
        yield Folder(path, arguments.device, arguments.threads, arguments.clients)


def _cases(text: str) -> list[str]:
    chosen = list(filter(None, text.split(",")))
    if unknown := [name for name in chosen if name not in CASES]:
        raise argparse.ArgumentTypeError(
            f"there is no case {unknown[0]!r}: choose from {', '.join(CASES)}"
        )
    return chosen


def main() -> None:
    parser = options("decisions: questions per second, beside `transformers serve`")
    parser.add_argument("--only", type=_cases, metavar="LIST", help=f"some of: {', '.join(CASES)}")
    parser.add_argument("--size", choices=tuple(SIZES), default="3m", help="the language model")
    parser.add_argument("--dtype", choices=tuple(ROUNDING), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=int, default=1, help="torch threads on a CPU")
    parser.add_argument("--clients", type=int, default=32, help="requests at once")
    parser.add_argument(
        "--requests", type=int, help="requests per round; default: one from each client"
    )
    parser.add_argument(
        "--peer-requests", type=int, default=8, help="how many of these the peer gets"
    )
    parser.add_argument(
        "--questions", type=integers, default=[16], help="questions of each request; at most 64"
    )
    parser.add_argument("--state", type=int, default=800, help="words of a state")
    parser.add_argument(
        "--compared",
        type=int,
        default=2,
        help="how many of the gateway's requests the peer gets too, to compare answers",
    )
    parser.set_defaults(repeats=1)  # a round takes a quarter of an hour
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.compared = 1
        arguments.questions = arguments.questions[len(arguments.questions) // 2 :][:1]
    arguments.only = arguments.only or (["several"] if arguments.quick else list(CASES))
    report = Report(f"decide: {arguments.size}, {arguments.dtype}")
    with saved(arguments) as folder:
        try:
            asyncio.run(measure(arguments, report, folder))
        except Unavailable as error:
            raise SystemExit(f"{error}; or leave it out: --without {PEER}") from None
    report.finish(arguments)


if __name__ == "__main__":
    main()
