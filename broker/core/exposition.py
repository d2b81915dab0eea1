"""The broker's figures in Prometheus' text, the answer to `bus.metrics` (SPEC.md section 10).

Names and units follow https://prometheus.io/docs/practices/naming/. Labels have few values: models
that are served, workers that are here, states, outcomes, codes; never an address, a client or a
request. Reads the core's state and changes nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from broker.core.figures import Histogram, ModelFigures
from broker.core.records import WorkerSession
from broker.core.state import BusState

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_Sample = tuple[dict[str, str], float]

#: Counters of the core with a metric name of their own: (help, the core's name).
_COUNTERS: Final = {
    "requests_accepted": ("Requests that were queued, resumed ones included.", "requests"),
    "request_bytes": ("Bytes of queued requests, images included.", "request_bytes"),
    "assignments": ("Credit spent: requests given to a worker.", "assigned"),
    "resumes": ("RESUMEs: streams that went on after an interruption.", "resumes"),
    "swaps": ("Models loaded on demand in place of others.", "swaps"),
    "swap_moves": ("Streams that outlasted their model's turn and went on later.", "swap_moves"),
    "resumes_inexact": (
        "Streams that went on at a worker that continues by token ids or text alone.",
        "resumes_inexact",
    ),
    "preemptions": ("Streams that gave way to a request of higher priority.", "preempted"),
    "evenings": ("Streams moved to a faster worker that had a free slot.", "evened_out"),
    "moves": ("Streams moved away from workers that were about to end.", "moved"),
    "interruptions": ("Requests whose worker left or gave them up.", "interrupted"),
    "rejections": ("Requests that a worker did not take.", "rejected"),
    "heartbeats_late": ("Heartbeat intervals in which a worker was silent.", "heartbeats_late"),
    "peers_silent": ("Sessions that ended because the peer was silent.", "peers_silent"),
    "peers_overflowed": ("Sessions that ended because the peer did not read.", "peers_overflowed"),
    "workers_stalled": ("Workers lost because their engine made no progress.", "workers_stalled"),
    "protocol_errors": ("Messages that violated the protocol.", "protocol_errors"),
    "sessions": ("Sessions that began.", "sessions"),
    "sessions_refused": ("Connections that were refused a session.", "refused"),
    "queries": ("Queries answered.", "queries"),
}

#: Figures of the heartbeat: (name, help, factor to the base unit).
_BEAT: Final = {
    "tokens_per_s": ("tokens_per_second", "Tokens generated, as the worker reports it.", 1.0),
    "ttft_ms": ("first_token_seconds", "Latest mean time to first token at the engine.", 0.001),
    "batch": ("batch_requests", "Requests of the last engine step.", 1.0),
    "kv_used_tokens": ("kv_used_tokens", "KV cache in use, tokens.", 1.0),
    "kv_total_tokens": ("kv_capacity_tokens", "KV cache capacity, tokens.", 1.0),
    "prefix_tokens": ("prefix_cache_tokens", "Tokens kept for prompts with a common prefix.", 1.0),
    "prefix_hit_tokens": ("prefix_hit_tokens", "Prompt tokens found in the prefix cache.", 1.0),
    "draft_tokens": ("draft_tokens", "Tokens of answers that were drafted and verified.", 1.0),
    "accepted_tokens": ("accepted_draft_tokens", "Draft tokens that were right.", 1.0),
    "memory_used_bytes": ("memory_used_bytes", "Memory of the device in use.", 1.0),
}

_HISTOGRAMS: Final[tuple[tuple[str, str, Callable[[ModelFigures], Histogram]], ...]] = (
    (
        "queue_wait_seconds",
        "From a request's arrival to its assignment to a worker.",
        lambda model: model.queue_wait,
    ),
    (
        "time_to_first_token_seconds",
        "From a request's assignment to its first token.",
        lambda model: model.first_token,
    ),
    (
        "time_between_tokens_seconds",
        "Mean time between the tokens of an answer.",
        lambda model: model.token_interval,
    ),
    (
        "request_duration_seconds",
        "From a request's arrival to its end, whatever that was.",
        lambda model: model.duration,
    ),
)


def text(bus: BusState) -> str:
    """Everything, for a scrape. Takes some 10 µs for each worker and model."""
    page = _Page()
    _broker(bus, page)
    _queues(bus, page)
    _requests(bus, page)
    _workers(bus, page)
    return page.text()


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def family(self, name: str, kind: str, about: str, samples: Iterable[_Sample]) -> None:
        full = f"tokenbus_{name}"
        self._head(full, kind, about)
        self._lines += [f"{full}{_labels(labels)} {value!r}" for labels, value in samples]

    def one(self, name: str, kind: str, about: str, value: float) -> None:
        self.family(name, kind, about, [({}, value)])

    def histograms(
        self, name: str, about: str, series: Iterable[tuple[dict[str, str], Histogram]]
    ) -> None:
        full = f"tokenbus_{name}"
        self._head(full, "histogram", about)
        for labels, histogram in series:
            for bound, count in histogram.cumulative():
                self._lines.append(f"{full}_bucket{_labels({**labels, 'le': repr(bound)})} {count}")
            count = histogram.count
            self._lines.append(f"{full}_bucket{_labels({**labels, 'le': '+Inf'})} {count}")
            self._lines.append(f"{full}_sum{_labels(labels)} {histogram.total!r}")
            self._lines.append(f"{full}_count{_labels(labels)} {count}")

    def _head(self, full: str, kind: str, about: str) -> None:
        self._lines.append(f"# HELP {full} {about}")
        self._lines.append(f"# TYPE {full} {kind}")


def _labels(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    pairs = (f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items())
    return f"{{{','.join(pairs)}}}"


def _broker(bus: BusState, page: _Page) -> None:
    loop = bus.loop_figures
    page.one("uptime_seconds", "gauge", "Time since the broker started.", bus.now_s - bus.started_s)
    page.one("clients", "gauge", "Client sessions.", len(bus.clients))
    states = Counter(worker.state_name for worker in bus.workers.values())
    by_state: list[_Sample] = [({"state": state}, n) for state, n in sorted(states.items())]
    page.family("workers", "gauge", "Worker sessions by state.", by_state)
    for name, (about, counter) in _COUNTERS.items():
        page.one(f"{name}_total", "counter", about, bus.counters[counter])
    page.one(
        "forwarded_messages_total",
        "counter",
        "OUTPUT messages passed on to clients.",
        int(loop.get("forwarded_total", 0)) + bus.counters["output_forwarded"],
    )
    page.one(
        "forwarded_bytes_total",
        "counter",
        "Bytes of the bodies of those messages.",
        int(loop.get("forwarded_bytes_total", 0)) + bus.counters["output_bytes"],
    )
    page.one(
        "stray_frames_total",
        "counter",
        "Frames discarded because they belonged to no message.",
        int(loop.get("stray_frames_total", 0)),
    )
    page.one(
        "loop_late_total", "counter", "Late wake-ups of the loop.", int(loop.get("late_total", 0))
    )


def _queues(bus: BusState, page: _Page) -> None:
    models = sorted({*bus.registry.models(), *bus.queues})
    # Models that were never served are shown as one.
    names = [model if bus.registry.serving(model) else "other" for model in models]

    def family(name: str, about: str, read: Callable[[str], float], merge: str = "sum") -> None:
        values: dict[str, float] = {}
        for model, shown in zip(models, names, strict=True):
            before, value = values.get(shown, 0), read(model)
            values[shown] = max(before, value) if merge == "max" else before + value
        samples: list[_Sample] = [({"model": shown}, value) for shown, value in values.items()]
        page.family(name, "gauge", about, samples)

    def waiting(model: str) -> int:
        queue = bus.queues.get(model)
        return queue.requests if queue else 0

    def size_bytes(model: str) -> int:
        queue = bus.queues.get(model)
        return queue.bytes if queue else 0

    def oldest_s(model: str) -> float:
        queue = bus.queues.get(model)
        since_s = (request.queued_s for request in queue.all()) if queue else ()
        return bus.now_s - min(since_s, default=bus.now_s)

    def wait_error_s(model: str) -> float:
        accuracy = bus.accuracy.get(model)
        return (accuracy.error or 0.0) if accuracy is not None else 0.0

    family("queue_wait_error_seconds", "Mean error of what was said of the wait.", wait_error_s)
    family("queue_requests", "Requests that wait for a worker.", waiting)
    family("queue_bytes", "Bytes of the requests that wait.", size_bytes)
    family("queue_oldest_seconds", "How long the oldest of them has waited.", oldest_s, "max")


def _requests(bus: BusState, page: _Page) -> None:
    by_model = sorted(bus.figures)
    ends: list[_Sample] = [
        ({"model": model, "outcome": outcome}, count)
        for model, figures in by_model
        for outcome, count in sorted(figures.outcomes.items())
    ]
    page.family("requests_total", "counter", "Requests by finish reason or error code.", ends)
    tokens: list[_Sample] = []
    for model, figures in by_model:
        tokens.append(({"model": model, "kind": "prompt"}, figures.prompt_tokens))
        tokens.append(({"model": model, "kind": "completion"}, figures.completion_tokens))
    page.family("tokens_total", "counter", "Tokens of finished requests.", tokens)
    for name, about, read in _HISTOGRAMS:
        page.histograms(name, about, [({"model": model}, read(f)) for model, f in by_model])


def _workers(bus: BusState, page: _Page) -> None:
    # Two sessions with one name (a dead one and its successor) must not become two samples.
    workers = {worker.name: worker for worker in bus.workers.values()}

    def family(name: str, about: str, read: Callable[[WorkerSession], float]) -> None:
        samples: list[_Sample] = [({"worker": n}, read(w)) for n, w in workers.items()]
        page.family(f"worker_{name}", "gauge", about, samples)

    infos: list[_Sample] = [
        (
            {
                "worker": name,
                "model": ",".join(worker.models),
                "engine": worker.engine,
                "device": worker.device,
            },
            1,
        )
        for name, worker in workers.items()
    ]
    page.family("worker_info", "gauge", "Facts about a worker, as labels.", infos)
    serial: list[_Sample] = [
        ({"worker": name, "model": info.name, "reason": info.serial}, 1)
        for name, worker in workers.items()
        for info in worker.models.values()
        if info.serial
    ]
    page.family("worker_serial", "gauge", "A model served one request at a time, and why.", serial)
    family("ready", "1 if it may take requests.", lambda w: int(w.state_name == "ready"))
    family("slots", "Requests that it can run at once.", lambda w: w.capacity)
    family("credit", "Credit granted and not yet spent.", lambda w: max(0, w.free))
    family("running_requests", "Requests that it has.", lambda w: len(w.running))
    family("waiting_requests", "Requests that wait at the worker.", lambda w: w.beat.waiting)
    ends: list[_Sample] = [
        ({"worker": name}, max(0.0, worker.ends_s - bus.now_s))
        for name, worker in workers.items()
        if worker.ends_s < math.inf
    ]
    about = "Time until it will be gone, if it knows its end."
    page.family("worker_ends_seconds", "gauge", about, ends)
    family("silent_seconds", "Time since its last message.", lambda w: w.silent_s(bus.now_s))
    family(
        "engine_age_seconds",
        "Time since its engine last finished a step while it had work.",
        lambda w: w.beat.engine_age_ms / 1000,
    )
    for name, (shown, about, factor) in _BEAT.items():
        samples: list[_Sample] = [
            ({"worker": n}, w.beat.metrics[name] * factor)
            for n, w in workers.items()
            if name in w.beat.metrics
        ]
        page.family(f"worker_{shown}", "gauge", about, samples)
