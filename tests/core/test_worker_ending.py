"""Who knows of an end: times as people write them, Slurm, the clouds' services (a server of this
test), a command. And the watch that asks them."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from worker import config
from worker.ending import sources, times
from worker.ending.sources import Aws, Azure, Command, Ending, Gcp, Slurm, SourceError
from worker.ending.watch import EndWatch

NOON = datetime(2026, 11, 30, 12, 0, 0)


# --- times ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("21:00", datetime(2026, 11, 30, 21, 0)),
        ("9:00", datetime(2026, 12, 1, 9, 0)),
        ("12:00:01", datetime(2026, 11, 30, 12, 0, 1)),
        ("2026-12-24T18:00", datetime(2026, 12, 24, 18, 0)),
        ("2026-12-24T18:00:00+00:00", datetime(2026, 12, 24, 18, 0, tzinfo=UTC)),
        ("1796072400", datetime.fromtimestamp(1796072400)),
    ],
)
def test_points_in_time(text: str, at: datetime) -> None:
    assert times.point(text, NOON) == at.timestamp()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("90s", 90),
        ("15m", 900),
        ("1.5h", 5400),
        ("1d", 86400),
        ("10:00", 600),
        ("1:30:00", 5400),
        ("2-12:00:00", 216000),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert times.length(text) == seconds


@pytest.mark.parametrize("text", ["soon", "25:00", "-5", "", "2026-13-01", "never"])
def test_what_is_neither(text: str) -> None:
    with pytest.raises(ValueError):
        times.point(text, NOON)
    with pytest.raises(ValueError):
        times.length(text if ":" not in text else "a:b")


def test_options_name_an_end() -> None:
    assert config.parse([], {}).ends_at is None
    soon = config.parse(["--ends-in", "15m"], {}).ends_at
    assert soon is not None and soon == pytest.approx(time.time() + 900, abs=10)
    assert config.parse(["--spot", "aws,gcp"], {}).spot == ("aws", "gcp")
    assert not config.parse(["--ends-at", "never"], {}).slurm
    with pytest.raises(config.ConfigError, match="exclude"):
        config.parse(["--ends-in", "15m", "--ends-at", "21:00"], {})
    with pytest.raises(config.ConfigError, match="further ahead than --end-margin-s"):
        config.parse(["--ends-at", "1000000000"], {})
    with pytest.raises(config.ConfigError, match="azure"):
        config.parse(["--spot", "ibm"], {})


def test_every_cloud_of_the_options_has_a_source() -> None:
    assert tuple(sources.CLOUDS) == config.CLOUDS


# --- Slurm ----------------------------------------------------------------------------------------


def squeue(folder: Path, monkeypatch: pytest.MonkeyPatch, says: str, status: int = 0) -> None:
    """A squeue on the path that says this."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\nprintf '%s' '{says}'\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_slurm_says_it_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert Slurm("7", "1796072400").ask() == Ending(1796072400.0, "Slurm job 7")
    assert Slurm("7", "").ask() is None


def test_squeue_says_it_where_the_environment_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue(tmp_path, monkeypatch, "2026-11-30T21:00:00")
    at = datetime(2026, 11, 30, 21, 0).timestamp()
    assert Slurm("7").ask() == Ending(at, "Slurm job 7")
    assert Slurm("7", "1").ask() == Ending(at, "Slurm job 7"), "the limit was changed since"


def test_a_job_without_a_limit_has_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue(tmp_path, monkeypatch, "UNLIMITED")
    assert Slurm("7").ask() is None


def test_a_squeue_that_fails_does_not_hide_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue(tmp_path, monkeypatch, "", status=1)
    assert Slurm("7", "1796072400").ask() == Ending(1796072400.0, "Slurm job 7")
    with pytest.raises(SourceError, match="squeue"):
        Slurm("7").ask()


def test_a_squeue_that_fails_does_not_bring_back_a_limit_that_was_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Slurm("7", "1")
    squeue(tmp_path, monkeypatch, "2026-11-30T21:00:00")
    assert job.ask() == Ending(datetime(2026, 11, 30, 21, 0).timestamp(), "Slurm job 7")
    squeue(tmp_path, monkeypatch, "", status=1)
    with pytest.raises(SourceError, match="squeue"):
        job.ask()


# --- clouds ---------------------------------------------------------------------------------------


class Metadata:
    """A metadata service: path → (status, text), and the headers that each needs."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {}
        self.needs: dict[str, tuple[str, str]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                name, value = outer.needs.get(self.path, ("", ""))
                allowed = not name or self.headers.get(name) == value
                status, text = outer.answers.get(self.path, (404, "")) if allowed else (401, "")
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_PUT = _answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[Metadata]:
    # No proxy may come between a machine and its own service.
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    service = Metadata()
    yield service
    service.close()


def test_aws(metadata: Metadata) -> None:
    path = "/latest/meta-data/spot/instance-action"
    metadata.answers["/latest/api/token"] = (200, "secret")
    metadata.needs["/latest/api/token"] = ("X-aws-ec2-metadata-token-ttl-seconds", "60")
    metadata.needs[path] = ("X-aws-ec2-metadata-token", "secret")
    source = Aws(metadata.address)
    assert source.ask() is None
    metadata.answers[path] = (200, '{"action": "terminate", "time": "2026-11-30T08:22:00Z"}')
    at = datetime(2026, 11, 30, 8, 22, tzinfo=UTC).timestamp()
    assert source.ask() == Ending(at, "spot notice: terminate")


def test_gcp(metadata: Metadata) -> None:
    path = "/computeMetadata/v1/instance/preempted"
    metadata.needs[path] = ("Metadata-Flavor", "Google")
    metadata.answers[path] = (200, "FALSE\n")
    source = Gcp(metadata.address)
    assert source.ask() is None
    metadata.answers[path] = (200, "TRUE\n")
    ending = source.ask()
    assert ending is not None and 25 < ending.at - time.time() <= 30
    assert source.ask() == ending, "its thirty seconds do not begin again"


def test_azure(metadata: Metadata) -> None:
    name = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
    events = "/metadata/scheduledevents?api-version=2020-07-01"
    for path in (name, events):
        metadata.needs[path] = ("Metadata", "true")
    metadata.answers[name] = (200, "me")
    metadata.answers[events] = (200, '{"DocumentIncarnation": 1, "Events": []}')
    source = Azure(metadata.address)
    assert source.ask() is None
    event = {
        "EventId": "e1",
        "EventType": "Preempt",
        "Resources": ["another"],
        "EventStatus": "Scheduled",
        "NotBefore": "Mon, 30 Nov 2026 08:22:00 GMT",
    }
    document = {"DocumentIncarnation": 2, "Events": [event, event | {"EventType": "Freeze"}]}
    metadata.answers[events] = (200, json.dumps(document))
    assert source.ask() is None, "another machine's, and one that ends nothing"
    document["Events"] = [event | {"Resources": ["another", "me"]}]
    metadata.answers[events] = (200, json.dumps(document))
    at = datetime(2026, 11, 30, 8, 22, tzinfo=UTC).timestamp()
    assert source.ask() == Ending(at, "spot notice: Preempt")
    document["Events"] = [event | {"Resources": ["me"], "EventStatus": "Started", "NotBefore": ""}]
    metadata.answers[events] = (200, json.dumps(document))
    ending = source.ask()
    assert ending is not None and ending.at == pytest.approx(time.time(), abs=5)


@pytest.mark.parametrize("cloud", [Aws, Gcp, Azure])
def test_a_service_that_answers_nonsense_is_an_error_and_no_notice(
    metadata: Metadata, cloud: type[Aws | Gcp | Azure]
) -> None:
    for path in (
        "/latest/api/token",
        "/latest/meta-data/spot/instance-action",
        "/computeMetadata/v1/instance/preempted",
        "/metadata/instance/compute/name?api-version=2021-02-01&format=text",
        "/metadata/scheduledevents?api-version=2020-07-01",
    ):
        metadata.answers[path] = (200, "<html>")
    with pytest.raises(SourceError):
        cloud(metadata.address).ask()
    with pytest.raises(SourceError):
        cloud("http://127.0.0.1:9").ask()


@pytest.mark.parametrize("cloud", [Aws, Gcp, Azure])
def test_a_service_that_does_not_speak_http_is_an_error(cloud: type[Aws | Gcp | Azure]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.recv(1 << 16)
                connection.sendall(b"busy\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(SourceError, match="does not answer: busy"):
            cloud(f"http://127.0.0.1:{server.getsockname()[1]}").ask()
        thread.join()


# --- commands, and the watch ----------------------------------------------------------------------


def test_a_command_says_the_seconds_left_a_time_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "notice"
    file.write_text("")
    source = Command(f"cat {file}")
    assert source.ask() is None
    file.write_text("30\n")
    first = source.ask()
    assert first is not None and first.at == pytest.approx(time.time() + 30, abs=5)
    assert source.ask() == first, "it repeats its notice"
    file.write_text("1796072400")
    assert source.ask() == Ending(1796072400.0, "notice")
    file.write_text("soon")
    with pytest.raises(SourceError, match="soon"):
        source.ask()
    with pytest.raises(SourceError, match="ended with 3"):
        Command(f"{sys.executable} -c 'raise SystemExit(3)'").ask()
    file.write_bytes(b"\xff")
    with pytest.raises(SourceError, match="is not a time"):
        source.ask()


def test_a_command_that_cannot_be_split_into_words_is_a_wrong_option() -> None:
    for wrong in ("it's", " "):
        with pytest.raises(config.ConfigError, match="--notice-command"):
            config.parse(["--engine", "echo", "--notice-command", wrong])


class Told:
    """A source that says what it is told to say."""

    name, every_s = "told", 0.01

    def __init__(self, ending: Ending | None = None) -> None:
        self.ending = ending
        self.fails: Exception | None = None

    def ask(self) -> Ending | None:
        if self.fails is not None:
            raise self.fails
        return self.ending


def news(watch: EndWatch) -> tuple[float, str]:
    assert select.select([watch], [], [], 30)[0], "it did not ring"
    (news,) = watch.take()
    return news


@pytest.mark.parametrize("error", [SourceError("no answer"), KeyError("a fault of ours")])
def test_the_watch_reports_the_earliest_end_and_when_it_changes(error: Exception) -> None:
    option, notice = Told(Ending(time.time() + 100, "option")), Told()
    watch = EndWatch([option, notice], margin_s=2.0)
    watch.start()
    at_s, why = news(watch)
    assert (at_s - time.monotonic(), why) == (pytest.approx(98, abs=5), "option")
    notice.ending = Ending(time.time() + 30, "spot notice")
    at_s, why = news(watch)
    assert (at_s - time.monotonic(), why) == (pytest.approx(28, abs=5), "spot notice")
    notice.fails = error
    option.ending = None
    time.sleep(0.1)
    assert watch.take() == [], "what it said before it failed still counts"
    notice.fails, notice.ending = None, None
    assert news(watch) == (float("inf"), "")
    watch.close()


def test_nobody_is_asked_where_nobody_can_know() -> None:
    assert sources.chosen(None, (), None, environment={}) == []
    found = sources.chosen(5.0, ("gcp",), "true", environment={"SLURM_JOB_ID": "7"})
    names = [source.name for source in found]
    assert names == ["the time set by its options", "slurm", "gcp", "notice command"]
    assert sources.chosen(None, (), None, slurm=False, environment={"SLURM_JOB_ID": "7"}) == []
