"""Batches and files at the gateway: OpenAI's own client makes, polls and reads them; every line
gets exactly one answer whatever is killed, and nobody sees another key's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from tests.gateway.batch_caller import CHAT, Caller, Make, jsonl, line, slow
from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import PATIENCE_S, Bus, wait_until


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "batches"


@pytest.fixture
def caller(gateway: GatewayProcess) -> Caller:
    """At the shared gateway, which has a folder too."""
    return Caller(gateway)


@pytest.fixture
def alone(make_gateway: Make, folder: Path) -> Caller:
    """At a gateway of the test's own, over `folder`."""
    return Caller(make_gateway("--batch-folder", str(folder)))


# --- the SDK --------------------------------------------------------------------------------------


def test_openais_client_uploads_runs_polls_and_reads(caller: Caller) -> None:
    sdk = caller.sdk
    data = jsonl(*[line(f"l{i}") for i in range(20)])
    file = caller.upload(data)
    assert (file.purpose, file.bytes, file.filename) == ("batch", len(data), "in.jsonl")
    assert file.status == "processed" and sdk.files.content(file.id).read() == data
    batch = sdk.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        metadata={"job": "nightly"},
    )
    assert batch.status == "validating" and batch.id.startswith("batch_")
    assert batch.expires_at == batch.created_at + 24 * 3600
    done = caller.over(batch)
    assert done.status == "completed" and done.metadata == {"job": "nightly"}
    counts = done.request_counts
    assert counts and (counts.total, counts.completed, counts.failed) == (20, 20, 0)
    assert done.error_file_id is None and done.output_file_id and done.model == MODEL
    assert done.in_progress_at and done.finalizing_at and done.completed_at
    answers = caller.answers(done)
    assert set(answers) == {f"l{i}" for i in range(20)}
    tokens = 0
    for custom_id, row in answers.items():
        assert row["error"] is None and row["response"]["status_code"] == 200
        chat = ChatCompletion.model_validate(row["response"]["body"], strict=True)
        assert chat.choices[0].message.content == f"say {custom_id}"
        tokens += chat.usage.total_tokens if chat.usage else 0
    assert done.usage and done.usage.total_tokens == tokens
    output = sdk.files.retrieve(done.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    assert output.bytes == len(sdk.files.content(output.id).read())


@pytest.mark.parametrize(
    ("endpoint", "body", "shape"),
    [
        (CHAT, {}, ChatCompletion),
        ("/v1/completions", {"prompt": ["one", "two"]}, Completion),
        ("/v1/embeddings", {"input": ["a", "b"]}, CreateEmbeddingResponse),
        ("/v1/responses", {"input": "say hello"}, Response),
    ],
)
def test_every_endpoint_answers_in_its_own_shape(
    caller: Caller, endpoint: str, body: dict[str, Any], shape: Any
) -> None:
    done = caller.over(caller.begin(line("a", endpoint, **body), endpoint=endpoint))
    assert done.status == "completed"
    shape.model_validate(caller.answers(done)["a"]["response"]["body"], strict=True)
    assert done.usage and done.usage.input_tokens > 0


def test_a_line_fails_as_its_request_would_at_the_door(caller: Caller) -> None:
    wrong = [
        line("field", temprature=1),
        line("model", model="nobody"),
        line("stream", stream=True),
        line("long", messages=[{"role": "user", "content": "x" * 40_000}]),
    ]
    done = caller.over(caller.begin(line("good"), *wrong))
    assert done.status == "completed"
    counts = done.request_counts
    assert counts and (counts.total, counts.completed, counts.failed) == (5, 1, 4)
    assert [row["custom_id"] for row in caller.rows(done.output_file_id)] == ["good"]
    answers = caller.answers(done)
    with caller.gateway.http() as http:
        for one in wrong:
            given = answers[one["custom_id"]]["response"]
            if one["custom_id"] == "stream":
                assert (given["status_code"], given["body"]["error"]["param"]) == (400, "stream")
                continue
            at_door = http.post(CHAT, json=one["body"])
            told = at_door.json()["error"]
            ours = given["body"]["error"]
            assert given["status_code"] == at_door.status_code
            assert ours.pop("request_id") == given["request_id"] and told.pop("request_id")
            assert ours == told


def test_a_wrong_file_is_refused_with_its_lines_and_nothing_runs(caller: Caller) -> None:
    batch = caller.begin(
        line("a"),
        "{",
        line("a"),
        {**line("b"), "method": "GET"},
        line("c", "/v1/completions", prompt="x"),
        {"custom_id": "d"},
        {**line("e"), "body": 5},
        {**line("f"), "url": "/v1/images"},
    )
    failed = caller.over(batch)
    assert failed.status == "failed" and failed.errors and failed.errors.data
    told = [(one.line, one.code, one.param) for one in failed.errors.data]
    assert told == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
        (4, "invalid_method", "method"),
        (5, "invalid_url", "url"),
        (6, "missing_required_parameter", "method"),
        (7, "invalid_body", "body"),
        (8, "invalid_url", "url"),
    ]
    assert failed.output_file_id is failed.error_file_id is None and failed.failed_at
    empty = caller.over(caller.begin("", "  "))
    assert empty.errors and empty.errors.data and empty.errors.data[0].code == "empty_file"


def test_requests_that_cannot_be_served_name_their_field(alone: Caller, folder: Path) -> None:
    file = alone.upload(jsonl(line("a")))
    good = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    with alone.gateway.http() as http:
        for field, value in (
            ("input_file_id", "file-none"),
            ("input_file_id", "../../etc/passwd"),
            ("endpoint", "/v1/moderations"),
            ("completion_window", "soon"),
            ("completion_window", "31d"),
            ("metadata", {"a": 5}),
            ("output_expires_after", {"anchor": "created_at", "seconds": 5}),
            ("priority", 5),
        ):
            answer = http.post("/v1/batches", json={**good, field: value})
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["param"].partition(".")[0].partition("[")[0] == field
        for path in ("/v1/batches/batch_none", "/v1/files/file-none", "/v1/files/..%2f..%2fx"):
            assert http.get(path).status_code == 404
        upload = {"file": ("a.jsonl", b"{}")}
        for data, param in (
            ({}, "purpose"),
            ({"purpose": "fine-tune"}, "purpose"),
            ({"purpose": "batch", "colour": "red"}, "colour"),
            ({"purpose": "batch", "expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ):
            told = http.post("/v1/files", files=upload, data=data)
            assert (told.status_code, told.json()["error"]["param"]) == (400, param), told.text
        missing = http.post("/v1/files", files={"other": ("a", b"{}")}, data={"purpose": "batch"})
        assert missing.json()["error"]["param"] == "file"
        assert http.post("/v1/files", json={}).status_code == 400
        by_page = http.post(
            "/v1/files", files=upload, data={"purpose": "batch"}, headers={"origin": "http://evil"}
        )
        assert by_page.status_code == 403
    assert [one.id for one in alone.sdk.files.list()] == [file.id]
    assert not list((folder / "uploads").iterdir())


def test_lists_come_in_pages(alone: Caller) -> None:
    files = [alone.upload(jsonl(line("a"))).id for _ in range(5)]
    sdk = alone.sdk
    assert [one.id for one in sdk.files.list(limit=2)] == files[::-1]
    assert [one.id for one in sdk.files.list(limit=2, order="asc")] == files
    first = sdk.files.list(limit=2)
    assert first.has_more and len(first.data) == 2
    assert not list(sdk.files.list(purpose="batch_output"))
    batches = [
        sdk.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h").id
        for file in files
    ]
    assert [one.id for one in sdk.batches.list(limit=2)] == batches[::-1]
    with pytest.raises(openai.BadRequestError) as caught:
        sdk.batches.list(after="batch_none")
    assert caught.value.param == "after"
    for batch in sdk.batches.list():
        alone.over(batch)


def test_a_file_is_deleted_unless_a_batch_reads_it(caller: Caller) -> None:
    batch = caller.begin(slow("a", tokens=100_000))
    with pytest.raises(openai.ConflictError, match=batch.id):
        caller.sdk.files.delete(batch.input_file_id)
    caller.sdk.batches.cancel(batch.id)
    caller.over(batch)
    assert caller.sdk.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        caller.sdk.files.content(batch.input_file_id)


def test_without_a_folder_the_doors_say_how_to_switch_them_on(make_gateway: Make) -> None:
    with make_gateway().http() as http:
        for method, path in (
            ("GET", "/v1/files"),
            ("POST", "/v1/batches"),
            ("GET", "/v1/batches/batch_x"),
            ("GET", "/v1/files/file-x/content"),
        ):
            answer = http.request(method, path, json={} if method == "POST" else None)
            assert answer.status_code == 404
            assert "--batch-folder FOLDER" in answer.json()["error"]["message"]


# --- ends -----------------------------------------------------------------------------------------


def test_a_cancelled_batch_keeps_what_is_answered_and_frees_the_slots(caller: Caller) -> None:
    bus = caller.gateway.bus
    quick, endless = [line(f"q{i}") for i in range(5)], [slow(f"s{i}", 100_000) for i in range(30)]
    batch = caller.begin(*quick, *endless)
    caller.until(batch, lambda b: b.request_counts.completed == 5, "the quick lines are answered")
    wait_until(lambda: bus.running() > 0, "the slow ones run")
    cancelling = caller.sdk.batches.cancel(batch.id)
    assert cancelling.status == "cancelling" and cancelling.cancelling_at
    done = caller.over(batch)
    assert done.status == "cancelled" and done.cancelled_at
    answers = caller.answers(done)
    assert len(answers) == 35
    assert all(answers[f"q{i}"]["response"]["status_code"] == 200 for i in range(5))
    codes = {answers[f"s{i}"]["error"]["code"] for i in range(30)}
    assert codes == {"batch_cancelled"}
    assert done.request_counts and done.request_counts.failed == 30
    bus.wait_idle()
    with pytest.raises(openai.ConflictError):
        caller.sdk.batches.cancel(batch.id)


def test_a_batch_that_is_late_expires_with_what_is_answered(caller: Caller) -> None:
    batch = caller.begin(line("a"), slow("b", tokens=100_000), completion_window="3s")
    done = caller.over(batch)
    assert done.status == "expired" and done.expired_at
    answers = caller.answers(done)
    assert answers["a"]["response"]["status_code"] == 200
    assert answers["b"]["error"]["code"] == "batch_expired" and answers["b"]["response"] is None
    caller.gateway.bus.wait_idle()


def test_an_input_that_was_taken_away_fails_its_batch(caller: Caller) -> None:
    batch = caller.begin(slow("a", tokens=100_000))
    caller.until(batch, lambda b: b.status == "in_progress", "it runs")
    arguments = caller.gateway.process.command
    folder = Path(arguments[arguments.index("--batch-folder") + 1])
    (folder / "files" / batch.input_file_id).unlink()
    caller.sdk.batches.cancel(batch.id)
    failed = caller.over(batch)
    assert failed.status == "failed" and failed.errors and failed.errors.data
    assert failed.errors.data[0].code == "file_not_found"
    caller.gateway.bus.wait_idle()


# --- bounds ---------------------------------------------------------------------------------------


def test_files_have_bounds(make_gateway: Make, folder: Path) -> None:
    gateway = make_gateway(
        *("--batch-folder", str(folder)),
        *("--batch-file-bytes", "100000", "--batch-bytes", "150000", "--body-bytes", "5000"),
    )
    caller = Caller(gateway)
    with pytest.raises(openai.APIStatusError) as caught:
        caller.upload(b"x" * 100_001)
    assert caught.value.status_code == 413 and caught.value.param == "file"
    long = {"role": "user", "content": "x" * 6000}
    failed = caller.over(caller.begin(line("a"), line("b", messages=[long])))
    assert failed.errors and failed.errors.data
    assert (failed.errors.data[0].code, failed.errors.data[0].line) == ("line_too_large", 2)
    caller.upload(b"x" * 90_000)
    with pytest.raises(openai.APIStatusError) as caught:
        caller.upload(b"x" * 90_000)
    assert caught.value.status_code == 413 and "delete some" in caught.value.message
    assert not list((folder / "uploads").iterdir())


def test_an_upload_that_breaks_off_leaves_nothing(alone: Caller, folder: Path) -> None:
    def part() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield b"x" * 3_000_000
        raise ConnectionError("gone")

    with alone.gateway.http() as http, pytest.raises(ConnectionError):
        http.post(
            "/v1/files", content=part(), headers={"content-type": "multipart/form-data; boundary=b"}
        )
    wait_until(lambda: not list((folder / "uploads").iterdir()), "the part is removed")
    assert not list(alone.sdk.files.list())
    assert httpx.get(f"{alone.gateway.url}/health").status_code == 200


def test_a_path_that_is_not_a_batch_folder_is_an_error_that_says_so(
    tmp_path: Path, bus: Bus
) -> None:
    from client.gateway.batches.folder import Folder, FolderError

    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="--batch-folder"):
        Folder(tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "batches.db").write_text("no database" * 100)
    with pytest.raises(FolderError, match="not a database"):
        Folder(tmp_path / "other")


def test_a_batch_folder_that_disappears_is_an_error(alone: Caller, folder: Path) -> None:
    (folder / "uploads").rmdir()
    with pytest.raises(openai.APIStatusError) as caught:
        alone.upload(b"{}")
    assert caught.value.status_code == 507
    assert "folder of batches cannot be used" in caught.value.message


def test_files_expire(caller: Caller) -> None:
    options: Any = {"expires_after": {"anchor": "created_at", "seconds": 3600}}
    file = caller.upload(jsonl(line("a")), **options)
    assert file.expires_at == file.created_at + 3600
    batch = caller.begin(line("a"), output_expires_after=options["expires_after"])
    output = caller.sdk.files.retrieve(caller.over(batch).output_file_id or "")
    assert output.expires_at == output.created_at + 3600


def test_several_readers_upload_at_once(caller: Caller) -> None:
    data = jsonl(*[line(f"l{i}") for i in range(2000)])
    found: list[bytes] = []

    def work() -> None:
        file = caller.upload(data)
        found.append(caller.sdk.files.content(file.id).read())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert found == [data] * 6
