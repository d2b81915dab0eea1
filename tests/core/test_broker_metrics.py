"""The broker's metrics, parsed by Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from broker.core.figures import MAX_MODELS, OTHER, Figures, Histogram
from broker.protocol.messages import Ledger
from tests.core.broker_facts import Bus, ClientPeer


class Scrape:
    """One answer to `bus.metrics`."""

    def __init__(self, client: ClientPeer) -> None:
        self.text: str = client.query("bus.metrics")["text"]
        self.families = {f.name: f for f in text_string_to_metric_families(self.text)}
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[f"tokenbus_{name}", tuple(sorted(labels.items()))]

    def labels(self, name: str) -> set[str]:
        """The values of all labels of a metric family."""
        return {
            value
            for (sample, labels), _ in self.samples.items()
            if sample == f"tokenbus_{name}"
            for _, value in labels
        }


@pytest.fixture
def bus() -> Bus:
    return Bus()


def test_a_request_is_counted_with_its_waits_tokens_and_outcome(bus: Bus) -> None:
    worker, client = bus.worker(slots=1), bus.client()
    client.request()
    (assign,) = worker.assigned()
    bus.now_s += 0.2
    worker.output(assign.assign.reply_to, ledger=Ledger(1, [], [assign.id]))
    bus.now_s += 0.9
    worker.finish(assign, tokens=10)
    scrape = Scrape(client)
    assert scrape("requests_total", model="demo", outcome="stop") == 1
    assert scrape("tokens_total", model="demo", kind="completion") == 10
    assert scrape("tokens_total", model="demo", kind="prompt") == 3
    first = "time_to_first_token_seconds"
    assert scrape(f"{first}_bucket", model="demo", le="0.1") == 0
    assert scrape(f"{first}_bucket", model="demo", le="0.25") == 1
    assert scrape(f"{first}_sum", model="demo") == pytest.approx(0.2)
    # Ten tokens have nine gaps.
    assert scrape("time_between_tokens_seconds_sum", model="demo") == pytest.approx(0.1)
    assert scrape("request_duration_seconds_sum", model="demo") == pytest.approx(1.1)
    assert scrape("queue_wait_seconds_count", model="demo") == 1


def test_gauges_show_the_current_queues_credit_and_workers(bus: Bus) -> None:
    worker, client = bus.worker("w", slots=2), bus.client()
    for _ in range(3):
        client.request()
    bus.now_s += 4
    scrape = Scrape(client)
    assert scrape("queue_requests", model="demo") == 1
    assert scrape("queue_oldest_seconds", model="demo") == pytest.approx(4)
    assert scrape("queue_bytes", model="demo") > 0
    assert scrape("worker_slots", worker="w") == 2
    assert scrape("worker_credit", worker="w") == 0
    assert scrape("worker_running_requests", worker="w") == 2
    assert scrape("worker_silent_seconds", worker="w") == pytest.approx(4)
    assert scrape("workers", state="ready") == 1
    worker.goodbye()
    after = Scrape(client)
    assert ("tokenbus_worker_slots", (("worker", "w"),)) not in after.samples


def test_a_heartbeats_figures_are_exported_in_base_units(bus: Bus) -> None:
    worker, client = bus.worker("w"), bus.client()
    metrics = {"tokens_per_s": 12.5, "ttft_ms": 80.0, "memory_used_bytes": 3e9, "made_up": 1.0}
    worker.beat(metrics=metrics, engine_age_ms=1500)
    scrape = Scrape(client)
    assert scrape("worker_tokens_per_second", worker="w") == 12.5
    assert scrape("worker_first_token_seconds", worker="w") == pytest.approx(0.08)
    assert scrape("worker_memory_used_bytes", worker="w") == 3e9
    assert scrape("worker_engine_age_seconds", worker="w") == 1.5
    assert "made_up" not in scrape.text


def test_every_end_counts_once_by_its_code(bus: Bus) -> None:
    worker, client = bus.worker(slots=1), bus.client()
    client.request()
    (assign,) = worker.assigned()
    queued = client.request()
    client.cancel(queued)
    client.request(queue_ms=100)
    bus.wait(0.2)
    worker.finish(assign, outcome="engine_error", grant=False)
    client.request("nobody")
    scrape = Scrape(client)
    for outcome in ("cancelled", "deadline_exceeded", "engine_error"):
        assert scrape("requests_total", model="demo", outcome=outcome) == 1
    assert scrape("requests_total", model=OTHER, outcome="model_unavailable") == 1


def test_an_end_that_is_sent_again_after_a_resume_counts_once(bus: Bus) -> None:
    worker, client = bus.worker(slots=1), bus.client()
    request = client.request()
    (assign,) = worker.assigned()
    worker.finish(assign, tokens=5)
    client.resume(request, tokens=2)
    (again,) = worker.assigned()
    worker.finish(again, tokens=5, grant=False)
    scrape = Scrape(client)
    assert scrape("requests_total", model="demo", outcome="stop") == 1
    assert scrape("tokens_total", model="demo", kind="completion") == 5
    assert scrape("resumes_total") == 1


def test_forwarded_messages_are_counted_with_their_bytes(bus: Bus) -> None:
    worker, client = bus.worker(), bus.client()
    client.request()
    (assign,) = worker.assigned()
    worker.finish(assign, tokens=3)
    scrape = Scrape(client)
    assert scrape("forwarded_messages_total") == 1
    assert scrape("forwarded_bytes_total") > 10


def test_a_silent_worker_counts_as_late_once_per_interval(bus: Bus) -> None:
    bus.worker()
    client = bus.client()
    bus.wait(1.2)
    assert Scrape(client)("heartbeats_late_total") == 0
    bus.wait(2.0)
    assert Scrape(client)("heartbeats_late_total") == 2


def test_a_made_up_name_never_becomes_a_label(bus: Bus) -> None:
    worker, client = bus.worker(slots=1), bus.client("c-secret")
    for number in range(20):
        client.request(f"made-up-{number}")
    client.request()
    (assign,) = worker.assigned()
    worker.finish(assign, outcome="an outcome of my own")
    scrape = Scrape(client)
    assert scrape("requests_total", model=OTHER, outcome="model_unavailable") == 20
    assert scrape("requests_total", model="demo", outcome=OTHER) == 1
    assert "made-up" not in scrape.text and "c-secret" not in scrape.text


def test_requests_for_models_that_nobody_serves_yet_wait_under_one_name() -> None:
    bus = Bus(model_grace_s=30)
    client = bus.client()
    for number in range(5):
        client.request(f"later-{number}")
    scrape = Scrape(client)
    assert scrape("queue_requests", model=OTHER) == 5


def test_a_workers_strange_name_is_escaped(bus: Bus) -> None:
    name = 'w"1\\\n2'
    bus.worker(name)
    assert Scrape(bus.client())("worker_ready", worker=name) == 1


def test_names_and_help_follow_prometheus_conventions(bus: Bus) -> None:
    bus.worker()
    scrape = Scrape(bus.client())
    units = ("_seconds", "_bytes", "_tokens", "_requests")
    for name, family in scrape.families.items():
        assert family.documentation, name
        assert name.startswith("tokenbus_")
        assert family.type in ("counter", "gauge", "histogram"), name
        if family.type == "histogram":
            assert name.endswith(units)
        for part in ("_ms", "_milliseconds", "_count", "_sum"):
            assert not name.endswith(part), name


def test_models_beyond_the_bound_share_one_entry() -> None:
    figures = Figures()
    for number in range(MAX_MODELS + 10):
        figures.of(f"m{number}").prompt_tokens += 1
    found = dict(figures)
    assert len(found) == MAX_MODELS + 1
    assert found[OTHER].prompt_tokens == 10


@pytest.mark.parametrize(
    ("value", "counts"), [(0.5, [1, 1]), (1.0, [1, 1]), (1.5, [0, 1]), (9.0, [0, 0])]
)
def test_a_bucket_holds_what_is_at_or_below_its_bound(value: float, counts: list[int]) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(value)
    assert [count for _, count in histogram.cumulative()] == counts
    assert histogram.count == 1 and histogram.total == value
