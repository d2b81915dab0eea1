"""Stands between the tests of OpenAI's SDKs and a gateway, and makes the objects that they name.

Those tests were made for a server of canned answers: they read, change and delete `conv_123` or
`file-abc123`, which nobody made. Here each request that names an object gets one that was made for
it a moment before; nothing else of a request changes, and nothing of an answer.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

import httpx2 as httpx

#: Of one request to the gateway.
PATIENCE_S: Final = 60.0
_NOT_PASSED_ON: Final = ("host", "connection", "content-length", "transfer-encoding")
_NOT_PASSED_BACK: Final = ("connection", "content-length", "transfer-encoding", "date", "server")
_ASKED: Final = [{"role": "user", "content": "hello"}]
#: An alias of what the gateway serves.
_MODEL: Final = "gpt-5"
_BODY: Final = {"model": _MODEL, "input": "hello"}
_LINE: Final[dict[str, Any]] = {
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": _MODEL, "messages": _ASKED, "max_tokens": 2},
}


class Objects:
    """Makes objects at a gateway; each returns the id of a new one."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def _made(self, path: str, **how: Any) -> str:
        answer = self._http.post(path, **how)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def response(self) -> str:
        return self._made("/responses", json={**_BODY, "max_output_tokens": 2})

    def response_in_background(self) -> str:
        return self._made("/responses", json={**_BODY, "background": True, "max_output_tokens": 64})

    def chat(self) -> str:
        kept = {"store": True, "metadata": {"foo": "string"}}
        return self._made("/chat/completions", json={**_LINE["body"], **kept})

    def conversation(self) -> str:
        return self._made("/conversations", json={"items": _ASKED})

    def item(self, conversation: str) -> str:
        page = self._http.get(f"/conversations/{conversation}/items").json()
        return str(page["data"][0]["id"])

    def file(self, count: int = 1) -> str:
        lines = (json.dumps({**_LINE, "custom_id": str(number)}) for number in range(count))
        files = {"file": ("lines.jsonl", "\n".join(lines).encode())}
        return self._made("/files", files=files, data={"purpose": "batch"})

    def upload(self, size_bytes: int = 100) -> str:
        body = {
            "bytes": size_bytes,
            "filename": "lines.jsonl",
            "mime_type": "application/jsonl",
            "purpose": "batch",
        }
        return self._made("/uploads", json=body)

    def part(self, upload: str, size_bytes: int) -> str:
        return self._made(f"/uploads/{upload}/parts", files={"data": b"x" * size_bytes})

    def batch(self) -> str:
        body = {
            # Not over before it is cancelled.
            "input_file_id": self.file(500),
            "endpoint": "/v1/chat/completions",
            "completion_window": "24h",
        }
        return self._made("/batches", json=body)


def with_objects(objects: Objects, method: str, target: str, body: bytes) -> tuple[str, bytes]:
    """A request with ids of objects that exist: its path with its query, and its body."""
    path, mark, query = target.partition("?")
    makers: list[tuple[str, Callable[[], str]]] = [
        (r"/responses/(?!compact$|input_tokens$)([^/]+)/cancel", objects.response_in_background),
        (
            r"/responses/(?!compact$|input_tokens$)([^/]+)(?:/input_items)?",
            objects.response_in_background if "stream=true" in query else objects.response,
        ),
        (r"/chat/completions/([^/]+)(?:/messages)?", objects.chat),
        (r"/conversations/([^/]+)(?:/items)?(?:/.+)?", objects.conversation),
        (r"/files/([^/]+)(?:/content)?", objects.file),
        (r"/uploads/([^/]+)/(?:parts|complete|cancel)", objects.upload),
        (r"/batches/([^/]+)(?:/cancel)?", objects.batch),
    ]
    after = {
        "/chat/completions": objects.chat,
        "/files": objects.file,
        "/batches": objects.batch,
    }.get(path)
    for pattern, make in makers:
        found = re.fullmatch(f"(?:/v1)?{pattern}", path)
        if found is not None:
            id_ = make()
            path = path[: found.start(1)] + id_ + path[found.end(1) :]
            break
    if item := re.fullmatch(r"(?:/v1)?/conversations/(conv_[^/]+)/items/(.+)", path):
        path = path[: item.start(2)] + objects.item(item[1])
    # Behind what the list has no entry for, there is no place.
    if "after=after" in query.split("&"):
        of_one = re.fullmatch(r"/conversations/(conv_[^/]+)/items", path)
        if of_one is not None:
            query = query.replace("after=after", f"after={objects.item(of_one[1])}")
        elif after is not None:
            query = query.replace("after=after", f"after={after()}")
    if whole := re.fullmatch(r"(?:/v1)?/uploads/(upload_[^/]+)/complete", path):
        fields = {**json.loads(body), "part_ids": [objects.part(whole[1], 100)]}
        return path, json.dumps(fields).encode()
    return path + mark + query, _body_with(objects, body)


def _body_with(objects: Objects, body: bytes) -> bytes:
    try:
        fields = json.loads(body)
    except ValueError:
        return body
    if not isinstance(fields, dict):
        return body
    makers = {
        "previous_response_id": objects.response,
        "conversation": objects.conversation,
        "input_file_id": objects.file,
    }
    named = {name: make() for name, make in makers.items() if isinstance(fields.get(name), str)}
    return json.dumps({**fields, **named}).encode() if named else body


@contextlib.contextmanager
def placeholders(url: str) -> Iterator[str]:
    """A server in front of the gateway at `url`: its address, which has no `/v1`."""
    api = f"{url}/v1"
    with httpx.Client(base_url=api, timeout=PATIENCE_S, trust_env=False) as http:
        objects = Objects(http)

        class Handler(BaseHTTPRequestHandler):
            def _pass_on(self) -> None:
                size_bytes = int(self.headers.get("content-length", 0))
                body = self.rfile.read(size_bytes) if size_bytes else b""
                target, body = with_objects(objects, self.command, self.path, body)
                headers = [
                    (name, value)
                    for name, value in self.headers.items()
                    if name.lower() not in _NOT_PASSED_ON
                ]
                how = {"headers": headers, "content": body}
                with http.stream(self.command, target, **how) as answer:
                    self.send_response(answer.status_code)
                    for name, value in answer.headers.items():
                        if name.lower() not in _NOT_PASSED_BACK:
                            self.send_header(name, value)
                    self.end_headers()
                    with contextlib.suppress(OSError):  # a test need not read an answer to its end
                        for data in answer.iter_raw():
                            self.wfile.write(data)
                            self.wfile.flush()

            do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _pass_on

            def log_message(self, *_: Any) -> None:
                return

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        serving = threading.Thread(target=server.serve_forever, daemon=True)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            server.server_close()
            serving.join()
