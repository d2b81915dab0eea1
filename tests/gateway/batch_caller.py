"""One caller of batches, with OpenAI's own client, and lines for its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from openai.types import Batch, FileObject

from tests.gateway.conftest import MODEL, GatewayProcess
from tests.harness import wait_until

CHAT = "/v1/chat/completions"
OVER = ("failed", "completed", "expired", "cancelled")


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    body.setdefault("model", MODEL)
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": f"say {custom_id}"}])
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def slow(custom_id: str, tokens: int = 50, delay_ms: int = 10) -> dict[str, Any]:
    text = f"[[echo mode=sampled answer_tokens={tokens} step_delay_ms={delay_ms}]] {custom_id}"
    return line(custom_id, messages=[{"role": "user", "content": text}])


def jsonl(*lines: dict[str, Any] | str) -> bytes:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    return "".join(f"{text}\n" for text in texts).encode()


class Caller:
    """One key's OpenAI client at one gateway."""

    def __init__(self, gateway: GatewayProcess, key: str = "none") -> None:
        self.gateway, self.key = gateway, key
        self.sdk = gateway.openai(api_key=key)

    def upload(self, data: bytes, **options: Any) -> FileObject:
        return self.sdk.files.create(file=("in.jsonl", data), purpose="batch", **options)

    def begin(self, *lines: dict[str, Any] | str, endpoint: Any = CHAT, **options: Any) -> Batch:
        file = self.upload(jsonl(*lines))
        given = {"completion_window": "24h", **options}
        return self.sdk.batches.create(input_file_id=file.id, endpoint=endpoint, **given)

    def until(self, batch: Batch, condition: Callable[[Batch], bool], what: str) -> Batch:
        def now() -> Batch | None:
            seen = self.sdk.batches.retrieve(batch.id)
            return seen if condition(seen) else None

        found = wait_until(now, what, story=self.gateway.process.log)
        assert found is not None
        return found

    def over(self, batch: Batch) -> Batch:
        return self.until(batch, lambda seen: seen.status in OVER, "the batch is over")

    def rows(self, id_: str | None) -> list[dict[str, Any]]:
        if id_ is None:
            return []
        return [json.loads(text) for text in self.sdk.files.content(id_).text.splitlines()]

    def answers(self, batch: Batch) -> dict[str, dict[str, Any]]:
        """The rows of both files by custom_id; fails if one is there twice."""
        rows = self.rows(batch.output_file_id) + self.rows(batch.error_file_id)
        found = {row["custom_id"]: row for row in rows}
        assert len(found) == len(rows), "a line was answered twice"
        return found


Make = Callable[..., GatewayProcess]
