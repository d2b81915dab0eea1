"""Files that are sent in parts: OpenAI's own client begins, sends, completes and cancels them; what
is whole is a file like any other, and what is not never becomes one."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from client.gateway.batches.folder import Folder, NotHere
from client.gateway.batches.records import FileObject, PartObject, Sent, UploadObject
from client.gateway.keys import add_key
from tests.gateway.batch_caller import CHAT, Caller, Make, jsonl, line
from tests.gateway.conftest import GatewayProcess

DATA = jsonl(*[line(f"l{i}") for i in range(20)])
MIME = "application/jsonl"


@pytest.fixture
def caller(gateway: GatewayProcess) -> Caller:
    return Caller(gateway)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Folder]:
    folder = Folder(tmp_path / "batches")
    yield folder
    folder.shut()


def begin(caller: Caller, size_bytes: int = len(DATA), **options: Any) -> Any:
    given = {"filename": "in.jsonl", "mime_type": MIME, "purpose": "batch", **options}
    return caller.sdk.uploads.create(bytes=size_bytes, **given)


def send(caller: Caller, upload: Any, *parts: bytes) -> list[str]:
    return [caller.sdk.uploads.parts.create(upload.id, data=part).id for part in parts]


def refused(call: Any, *args: Any, **options: Any) -> tuple[int, str | None, str]:
    """Status, field and words of a refusal."""
    with pytest.raises(openai.APIStatusError) as caught:
        call(*args, **options)
    return caught.value.status_code, caught.value.param, caught.value.message


# --- the SDK --------------------------------------------------------------------------------------


def test_a_file_is_sent_in_parts_and_runs_as_a_batch(caller: Caller) -> None:
    sdk = caller.sdk
    upload = begin(caller, filename="C:\\data\\in.jsonl")
    assert (upload.status, upload.object, upload.purpose) == ("pending", "upload", "batch")
    assert upload.id.startswith("upload_") and upload.filename == "in.jsonl"
    assert upload.expires_at == upload.created_at + 3600 and upload.file is None
    # Sent in another order than they belong in; one of them twice, as after a lost answer.
    last, first, again = send(caller, upload, DATA[700:], DATA[:700], DATA[:700])
    assert first.startswith("part_") and again != first
    md5 = hashlib.md5(DATA).hexdigest().upper()
    done = sdk.uploads.complete(upload.id, part_ids=[first, last], md5=md5)
    assert done.status == "completed" and done.file and done.file.bytes == len(DATA)
    assert sdk.files.content(done.file.id).read() == DATA
    assert sdk.files.retrieve(done.file.id) == done.file
    batch = sdk.batches.create(input_file_id=done.file.id, endpoint=CHAT, completion_window="24h")
    assert len(caller.answers(caller.over(batch))) == 20
    # Asked again, as the SDK does when an answer was lost.
    assert sdk.uploads.complete(upload.id, part_ids=[first, last]).file == done.file
    for call in (
        lambda: sdk.uploads.complete(upload.id, part_ids=[last, first]),
        lambda: sdk.uploads.cancel(upload.id),
        lambda: send(caller, upload, b"x"),
    ):
        status, param, words = refused(call)
        assert (status, param) == (409, "id") and "is completed" in words


def test_the_sdk_cuts_a_file_itself(caller: Caller, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(DATA)
    of_path = caller.sdk.uploads.upload_file_chunked(
        file=path, mime_type=MIME, purpose="batch", part_size=600
    )
    of_bytes = caller.sdk.uploads.upload_file_chunked(
        file=DATA,
        filename="lines.jsonl",
        bytes=len(DATA),
        mime_type=MIME,
        purpose="batch",
        md5=hashlib.md5(DATA).hexdigest(),
    )
    for done in (of_path, of_bytes):
        assert done.file and done.file.filename == "lines.jsonl"
        assert caller.sdk.files.content(done.file.id).read() == DATA

    async def at_once() -> Any:
        url = f"{caller.gateway.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as sdk:
            return await sdk.uploads.upload_file_chunked(
                file=DATA,
                filename="a",
                bytes=len(DATA),
                mime_type=MIME,
                purpose="batch",
                part_size=1000,
            )

    done = asyncio.run(at_once())
    assert caller.sdk.files.content(done.file.id).read() == DATA


def test_a_file_in_parts_may_expire_and_be_empty(caller: Caller) -> None:
    expires: Any = {"anchor": "created_at", "seconds": 3600}
    upload = begin(caller, 0, expires_after=expires)
    done = caller.sdk.uploads.complete(upload.id, part_ids=[])
    assert done.file and done.file.bytes == 0
    assert done.file.expires_at == done.file.created_at + 3600


# --- what is refused ------------------------------------------------------------------------------


def test_parts_that_do_not_make_the_file_are_refused(caller: Caller) -> None:
    sdk = caller.sdk
    upload, other = begin(caller), begin(caller)
    first, last = send(caller, upload, DATA[:100], DATA[100:])
    [foreign] = send(caller, other, DATA)
    complete = sdk.uploads.complete
    for part_ids, param, words in (
        ([first], "part_ids", f"100 bytes together, and the upload was announced with {len(DATA)}"),
        ([], "part_ids", "0 bytes"),
        ([first, last, first], "part_ids[2]", "named twice"),
        ([foreign], "part_ids[0]", "has no part"),
        (["../../batches.db"], "part_ids[0]", "has no part"),
    ):
        told = refused(complete, upload.id, part_ids=part_ids)
        assert told[:2] == (400, param) and words in told[2]
    told = refused(complete, upload.id, part_ids=[last, first], md5=hashlib.md5(DATA).hexdigest())
    assert told[:2] == (400, "md5")
    assert refused(complete, upload.id, part_ids=[first, last], md5="abc")[:2] == (400, "md5")
    # Nothing of it has ended the upload.
    assert complete(upload.id, part_ids=[first, last]).status == "completed"
    assert sdk.uploads.cancel(other.id).status == "cancelled"
    assert sdk.uploads.cancel(other.id).status == "cancelled"
    assert "is cancelled" in refused(send, caller, other, b"x")[2]
    assert "is cancelled" in refused(complete, other.id, part_ids=[foreign])[2]


def test_uploads_have_bounds(make_gateway: Make, tmp_path: Path) -> None:
    path = tmp_path / "batches"
    gateway = make_gateway(
        *("--batch-folder", str(path)),
        *("--batch-file-bytes", "100000", "--batch-bytes", "150000"),
    )
    caller = Caller(gateway)
    assert refused(begin, caller, 100_001)[:2] == (413, "bytes")
    assert refused(begin, caller, purpose="assistants")[:2] == (400, "purpose")
    assert refused(begin, caller, -1)[:2] == (400, "bytes")
    upload = begin(caller, 80_000)
    assert refused(send, caller, upload, b"x" * 80_001)[:2] == (413, "data")
    parts = send(caller, upload, b"x" * 80_000)
    # Parts take room as files do.
    assert refused(begin, caller, 80_000)[:2] == (413, "bytes")
    status, param, words = refused(send, caller, upload, b"x" * 75_000)
    assert (status, param) == (413, "data") and "delete some" in words
    assert len(list((path / "uploads").iterdir())) == 1
    assert caller.sdk.uploads.complete(upload.id, part_ids=parts).status == "completed"
    assert not list((path / "uploads").iterdir())
    with gateway.http() as http:
        form = {"data": ("a", io.BytesIO(b"x")), "other": (None, "1")}
        pending = begin(caller, 10)
        answer = http.post(f"/v1/uploads/{pending.id}/parts", files=form)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "other")
        answer = http.post(f"/v1/uploads/{pending.id}/parts", json={"data": "x"})
        assert answer.status_code == 400 and "multipart/form-data" in answer.text
        answer = http.post(f"/v1/uploads/{pending.id}/parts", files={"file": ("a", b"x")})
        assert answer.json()["error"]["param"] in ("file", "data")
    assert not list((path / "uploads").iterdir())


def test_an_upload_is_its_keys_and_outlives_the_gateway(make_gateway: Make, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    alice, bob = add_key(keys, "alice"), add_key(keys, "bob")
    options = ("--batch-folder", str(tmp_path / "batches"), "--keys", str(keys))
    gateway = make_gateway(*options)
    hers = Caller(gateway, alice)
    upload = begin(hers)
    [first] = send(hers, upload, DATA[:100])
    his = Caller(gateway, bob)
    for call in (
        lambda: send(his, upload, b"x"),
        lambda: his.sdk.uploads.cancel(upload.id),
        lambda: his.sdk.uploads.complete(upload.id, part_ids=[first]),
    ):
        assert refused(call)[:2] == (404, "id")
    gateway.process.kill()
    hers = Caller(make_gateway(*options), alice)
    [last] = send(hers, upload, DATA[100:])
    done = hers.sdk.uploads.complete(upload.id, part_ids=[first, last])
    assert done.file and hers.sdk.files.content(done.file.id).read() == DATA


# --- the folder -----------------------------------------------------------------------------------


def kept(folder: Folder, now: int, size_bytes: int = 3) -> Sent:
    upload = UploadObject(
        id="upload_1", bytes=size_bytes, created_at=now, expires_at=now + 3600, filename="a"
    )
    sent = Sent(upload=upload)
    assert folder.add_upload(sent, "alice", now, 1)
    return sent


def with_part(folder: Folder, now: int, id_: str = "part_1") -> Path:
    path = folder.upload_path(id_)
    path.write_bytes(b"abc")
    part = PartObject(id=id_, created_at=now, upload_id="upload_1")
    assert folder.add_part(part, "alice", 3, lambda sent: None)
    return path


def test_an_upload_expires_and_is_forgotten_a_day_later(folder: Folder) -> None:
    now = int(time.time())
    sent = kept(folder, now)
    path = with_part(folder, now)
    assert not folder.add_upload(sent, "alice", now, 1) and folder.used_bytes() == 3
    folder.tidy(now + 3599)
    assert path.exists() and sent.status_at(now + 3599) == "pending"
    assert sent.status_at(now + 3600) == "expired"
    folder.tidy(now + 3600)
    assert not path.exists() and folder.used_bytes() == 0 and not folder.parts("upload_1")
    assert folder.upload("upload_1", "alice").upload.status == "expired"
    folder.tidy(now + 3600 + 24 * 3600)
    with pytest.raises(NotHere):
        folder.upload("upload_1", "alice")


def test_an_upload_that_ended_meanwhile_becomes_no_file(folder: Folder) -> None:
    now = int(time.time())
    kept(folder, now)
    path = with_part(folder, now)
    file = FileObject(id="file-1", bytes=3, created_at=now, filename="a", purpose="batch")
    folder.upload_path(file.id).write_bytes(b"abc")

    def late(sent: Sent) -> None:
        raise KeyError("it is cancelled")

    with pytest.raises(KeyError):
        folder.end_upload("upload_1", "alice", late, file)
    assert path.exists() and not folder.path_of(file.id).exists()
    with pytest.raises(NotHere):
        folder.file(file.id, "alice", now)
