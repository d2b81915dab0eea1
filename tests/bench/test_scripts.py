"""Each benchmark runs at a tiny size and writes the JSON lines that its readers rely on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.engine.profile import PARTS
from tests.harness import WHOLE_RUN_S

ROOT = Path(__file__).resolve().parents[2]


def run(script: str | tuple[str, ...], *arguments: str) -> list[dict[str, Any]]:
    """The rows of a benchmark of this name, or of what Python is told to run."""
    program = ("-m", f"bench.{script}") if isinstance(script, str) else script
    command = [sys.executable, *program, "--quick", "--json", "-", "--repeats", "1"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=WHOLE_RUN_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[0]["name"] == "machine"
    for row in rows:
        assert isinstance(row["name"], str)
        assert isinstance(row["value"], int | float)
        assert isinstance(row["unit"], str)
    return rows[1:]


def test_hop_measures_the_broker_beside_both_proxies() -> None:
    rows = run("hop", "--events", "1,16", "--streams", "10", "--messages", "512", "--clients", "4")
    costs = [row for row in rows if row["name"] == "hop.cpu_us_per_message"]
    assert {row["peer"] for row in costs} == {"zmq_proxy", "monitored_queue", "python_floor"}
    for row in costs:
        assert row["value"] > 0
        assert row["ratio"] == pytest.approx(row["value"] / row["peer_value"])
    assert {row["events_per_message"] for row in costs} == {1, 16}
    assert {row["streams"] for row in costs} == {10, 64}


def test_stream_measures_rate_first_token_and_delay_through_the_whole_bus() -> None:
    rows = run(
        "stream",
        *("--streams", "4", "--batched", "4", "--paced", "4", "--tokens", "256"),
        *("--without", "fastchat,nats,gateway"),
    )
    rates = [row for row in rows if row["name"] == "stream.tokens_per_s"]
    assert all(row["value"] > 0 for row in rates)
    assert any(row.get("peer") == "zmq_proxy" and row["ratio"] > 0 for row in rates)
    paced = {row["name"]: row["value"] for row in rows if row.get("paced_ms") == 20}
    assert paced["stream.delay_ms_p99"] >= paced["stream.delay_ms_p50"] > 0
    parties = {row["name"].rsplit(".", 1)[1] for row in rows if ".cpu_us_per_token." in row["name"]}
    assert parties == {"engine", "link", "broker", "client", "all"}
    woken = {row["name"]: row["value"] for row in rows if ".wakes_per_request." in row["name"]}
    assert woken["stream.wakes_per_request.engine"] > 0.5
    assert woken["stream.wakes_per_request.all"] > 5


def test_scale_registers_every_peer_and_spreads_the_requests_evenly() -> None:
    rows = run("scale", "--workers", "4", "--clients", "20")
    values = {row["name"]: row["value"] for row in rows}
    assert values["scale.jain_index_workers"] == 1.0
    assert values["scale.messages_per_s"] > 0
    (fair,) = [row for row in rows if row["name"] == "scale.assignments_until_served"]
    # Round robin between the two clients: ten of each.
    assert fair["value"] == 20
    assert {row["what"] for row in rows if row["name"] == "scale.restart_s"} == {
        "broker listens",
        "all peers registered",
    }


def test_images_go_through_with_and_without_curve() -> None:
    rows = run("images", "--without", "fastchat", "--kib", "16", "--mib", "1")
    rates = {row["curve"]: row["value"] for row in rows if row["name"] == "images.mib_per_s"}
    assert rates.keys() == {True, False}
    assert min(rates.values()) > 0


def test_start_measures_imports_and_first_requests() -> None:
    rows = run("start", "--without", "fastchat")
    imports = [row for row in rows if row["name"] == "start.import_cpu_ms"]
    assert {"client", "broker", "worker link", "dependencies"} <= {row["what"] for row in imports}
    firsts = {row["what"]: row["value"] for row in rows if row["name"] == "start.first_request_ms"}
    assert {"broker", "worker (echo)", "client"} <= firsts.keys()


def test_engine_stands_beside_its_peers_and_one_that_is_missing_is_a_note() -> None:
    arguments = (
        *("--only", "throughput,served,bus,shared,pictures"),
        *("--size", "3m", "--streams", "2", "--new", "8", "--shared", "64"),
        *("--without", "transformers_cb,transformers_serve,transformers_serve_cb"),
    )
    program = (
        "import pathlib\n"
        "from bench import systems\n"
        "from bench.engine import __main__ as engine\n"
        "systems.FASTCHAT = pathlib.Path('/nonexistent')\n"
        "engine.main()\n"
    )
    rows = run(("-c", program), *arguments)
    notes = [row["text"] for row in rows if row["name"] == "note"]
    assert any("fastchat was not measured: not installed" in note for note in notes)
    rates = [row for row in rows if row["name"] == "engine_tokens_per_s"]
    assert {(row["streams"], row["peer"]) for row in rates} == {(2, "generate_threads")}
    served = [row for row in rows if row["name"] == "engine_served_tokens_per_s"]
    assert {(row["streams"], row["path"]) for row in served} == {(2, "bus"), (2, "gateway")}
    shares = [row for row in rows if row["name"] == "engine_bus_share"]
    assert shares and all(row["value"] > 0 and row["peer_value"] == 3 for row in shares)
    (prefix,) = [row for row in rows if row["name"] == "engine_shared_prefix_ttft_ms"]
    assert prefix["peer"] == "no reuse"
    assert any(row["name"] == "engine_pictures_tokens_per_s" for row in rows)


def test_engine_profile_says_where_the_time_of_a_step_goes() -> None:
    rows = run(
        "engine",
        *("--only", "profile", "--size", "3m", "--streams", "1,2", "--prefill", "16"),
    )
    steps = [row for row in rows if row["name"] == "engine_step_cpu_ms"]
    assert {(row["dtype"], row["phase"], row["rows"]) for row in steps} == {
        (dtype, phase, count)
        for dtype in ("float32", "bfloat16")
        for phase, count in (("decode", 1), ("decode", 2), ("prefill", 1))
    }
    assert all(row["peer"] == "products" and row["ratio"] > 0 for row in steps)
    parts = [row for row in rows if row["name"] == "engine_step_part_ms"]
    assert {row["part"] for row in parts} == set(PARTS)
    for part in ("products", "attention", "pointwise"):
        assert all(row["value"] > 0 for row in parts if row["part"] == part), part


def test_decide_counts_questions_of_the_bus_and_of_the_gateway() -> None:
    rows = run(
        "decide",
        *("--only", "several,image", "--clients", "4", "--questions", "3"),
        *("--state", "40", "--without", "transformers_serve"),
    )
    rates = [row for row in rows if row["name"] == "decide.questions_per_s"]
    assert {(row["case"], row["path"]) for row in rates} == {
        (case, path) for case in ("several", "image") for path in ("bus", "gateway")
    }
    assert all(row["value"] > 0 for row in rates)
    assert [row["value"] for row in rows if row["name"] == "decide.lost"] == [0] * 4
