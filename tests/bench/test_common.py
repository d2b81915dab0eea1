"""The parts that every benchmark shares: samples, rows, CPU clocks, plain ZMTP."""

import argparse
import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from bench import common, compare, figures
from bench.common import Report, Sample
from tests.support import zmtp

MACHINE = {
    "processor": "a processor",
    "memory_gib": 4,
    "kernel": "6",
    "python": "3.11",
    "date": "2026-01-01",
    "load_1min": 0.1,
    "quick": True,
}


def test_a_sample_is_its_median_and_its_noise_ignores_one_outlier() -> None:
    sample = Sample((10.0, 10.0, 10.0, 10.0, 90.0))
    assert sample.median == 10.0
    assert sample.noise == 0.0
    assert Sample((8.0, 10.0, 12.0)).noise == pytest.approx(0.1)


def test_cases_are_interleaved_so_that_a_disturbance_hits_all() -> None:
    order: list[str] = []

    def case(name: str) -> dict[str, float]:
        order.append(name)
        return {"figure": float(len(order))}

    seen = common.interleave({"a": lambda: case("a"), "b": lambda: case("b")}, 3)
    assert order == ["a", "b"] * 3
    assert seen["a"]["figure"].values == (1.0, 3.0, 5.0)


def test_a_row_has_the_ratio_to_its_peer_and_its_parameters() -> None:
    report = Report("test")
    report.add("x", Sample((2.0, 4.0, 6.0)), "us", peer="zmq_proxy", against=2.0, streams=64)
    machine, row = map(json.loads, report.json_lines().splitlines())
    assert machine["name"] == "machine"
    assert row == {
        "name": "x",
        "value": 4.0,
        "unit": "us",
        "peer": "zmq_proxy",
        "peer_value": 2.0,
        "ratio": 2.0,
        "noise": 0.25,
        "streams": 64,
    }
    assert report.table().splitlines()[-1].endswith("2.00×")


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert common.percentile(values, 50) == 50.0
    assert common.percentile(values, 99) == 99.0
    assert common.percentile([7.0], 99) == 7.0


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_refused_before_the_measurement(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit):
        common.options("x").parse_args([option, str(tmp_path / "nowhere" / "x.png")])
    assert "make its folder first" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        common.options("x").parse_args(["--plot", "x.bmp"])
    assert common.options("x").parse_args(["--json", "-"]).json == "-"


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    common.progress("one case")
    assert capsys.readouterr().err == ""


def test_cpu_time_of_a_process_is_the_one_that_it_sees_itself() -> None:
    before = time.process_time()
    seen = common.cpu_s(os.getpid())
    assert before <= seen <= time.process_time()


def test_a_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = Report("test")
    report.add("x", 3.0, "us", peer="zmq_proxy", against=2.0, streams=64)
    path = tmp_path / "plot.svg"
    report.finish(argparse.Namespace(json=None, plot=str(path)))
    assert path.read_text().startswith("<?xml")


def write(path: Path, value: float, unit: str, noise: float) -> Path:
    row = {"name": "x", "value": value, "unit": unit, "noise": noise, "streams": 64}
    path.write_text(json.dumps({"name": "machine", "value": 2, "unit": "cores"}) + "\n")
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return path


def test_a_cost_that_rose_by_more_than_the_noise_is_worse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "before", 10.0, "us", 0.02)
    assert compare.main([str(before), str(write(tmp_path / "after", 12.0, "us", 0.02))]) == 1
    assert "worse" in capsys.readouterr().out


def test_a_rate_that_rose_is_better(tmp_path: Path) -> None:
    before = write(tmp_path / "before", 10.0, "1/s", 0.02)
    assert compare.main([str(before), str(write(tmp_path / "after", 12.0, "1/s", 0.02))]) == 0


def test_a_move_within_the_noise_is_none(tmp_path: Path) -> None:
    before = write(tmp_path / "before", 10.0, "us", 0.02)
    assert compare.main([str(before), str(write(tmp_path / "after", 12.0, "us", 0.08))]) == 0


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("hello\n")
    with pytest.raises(SystemExit, match="not a result"):
        compare.main([str(path), str(path)])


def test_plain_zmtp_talks_to_a_real_router() -> None:
    import zmq

    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.RCVTIMEO, 10_000)
        port = router.bind_to_random_port("tcp://127.0.0.1")
        frames = [b"", b"a", bytes(255), bytes(256), bytes(70_000)]
        received: list[list[bytes]] = []

        def serve() -> None:
            identity, *rest = router.recv_multipart()
            received.append([identity, *rest])
            router.send_multipart([identity, *rest])

        thread = threading.Thread(target=serve)
        thread.start()
        peer = zmtp.Connection(f"tcp://127.0.0.1:{port}", b"me", 10.0)
        peer.send(frames)
        assert peer.receive() == frames
        thread.join()
        assert received == [[b"me", *frames]]
        peer.close()


def test_plain_zmtp_reports_a_peer_that_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        peer = zmtp.Connection(f"tcp://127.0.0.1:{server.getsockname()[1]}", b"me", 10.0)
        server.accept()[0].close()
        with pytest.raises(ConnectionError):
            peer.receive()
        peer.close()


def test_tables_of_the_page_are_made_from_the_results(tmp_path: Path) -> None:
    rows = [
        {"name": "machine", "script": "hop", "value": 2, "unit": "cores", **MACHINE},
        {"name": "hop.x", "script": "hop", "value": 1234.5, "unit": "us", "noise": 0.021}
        | {"peer": "zmq_proxy", "peer_value": 617.25, "ratio": 2.0, "streams": 64},
        {"name": "machine", "script": "engine", "value": 2, "unit": "cores", **MACHINE},
        {"name": "engine_bus_share", "script": "engine", "value": 2.5, "unit": "%", "streams": 1},
    ]
    results, page = tmp_path / "results.json", tmp_path / "page.md"
    results.write_text("\n".join(map(json.dumps, rows)))
    page.write_text("old\n")
    for _ in range(2):
        figures.main([str(results), "--page", str(page)])
    text = page.read_text()
    assert "| x | streams 64 | 1,234 us | ±2% | zmq_proxy | 617 | 2.00× |" in text
    assert "| bus_share | streams 1 | 2.5 % |" in text
    assert "`python -m bench.hop --quick` · 2026-01-01 · 2 cores of a processor" in text
    assert "old" not in text
    assert text.startswith("# Figures\n") and "do not edit" in text
