"""What SageMaker asks of a container: `/ping`, and `/invocations` for every kind of request."""

from __future__ import annotations

from typing import Any

import httpx2 as httpx
import pytest

SAID = [{"role": "user", "content": "hello there"}]


def test_a_container_that_lives_says_so(http: httpx.Client) -> None:
    assert http.get("/ping").status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": SAID, "max_tokens": 5}),
        ("/v1/completions", {"prompt": "hello there", "max_tokens": 5}),
        ("/v1/embeddings", {"input": "hello there"}),
    ],
)
def test_a_request_is_what_its_body_says(
    http: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    told, same = (http.post(place, json=body) for place in ("/invocations", path))
    assert told.status_code == same.status_code == 200, told.text
    for name in ("object", "model", "choices", "data", "usage"):
        assert told.json().get(name) == same.json().get(name)


def test_a_stream_is_streamed(http: httpx.Client) -> None:
    body = {"messages": SAID, "stream": True}
    with http.stream("POST", "/invocations", json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert answer.status_code == 200 and lines[-1] == "data: [DONE]" and len(lines) > 3


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{}", "messages"),
        (b"[]", None),
        (b"{", None),
        (b'{"messages": []}', "messages"),
        (b'{"prompt": "x", "unknown": 1}', "unknown"),
    ],
)
def test_what_is_wrong_is_named(http: httpx.Client, body: bytes, param: str | None) -> None:
    answer = http.post("/invocations", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param
