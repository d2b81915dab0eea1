"""Files and batches as OpenAI's API shows them, and as the folder keeps them."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct, field

from client.gateway.batches.lines import Endpoint, Mistake
from client.gateway.batches.output import Tally

__all__ = [
    "MAX_PARTS",
    "OPEN",
    "Batch",
    "BatchRequest",
    "CompleteRequest",
    "Ending",
    "ExpiresAfter",
    "FileObject",
    "Job",
    "PartObject",
    "Sent",
    "Status",
    "UploadObject",
    "UploadRequest",
    "window_s",
]

Status = Literal[
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
]
Ending = Literal["completed", "expired", "cancelled"]
MAX_PARTS: Final = 10_000
"""Of one upload."""
#: Of a batch that is not over.
OPEN: Final = ("validating", "in_progress", "finalizing", "cancelling")


class ExpiresAfter(Struct, forbid_unknown_fields=True, kw_only=True):
    """When a file is deleted by itself."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=3600, le=2592000)]


Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]


class BatchRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/batches`."""

    input_file_id: str
    endpoint: Endpoint
    #: OpenAI has 24h alone.
    completion_window: Annotated[str, Meta(pattern="^[1-9][0-9]{0,6}[smhd]$")]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def window_s(window: str) -> int:
    """Seconds of a `completion_window`."""
    match = re.fullmatch("([0-9]+)([smhd])", window)
    assert match is not None, "checked when it was read"
    return int(match[1]) * _UNIT_S[match[2]]


class FileObject(Struct, kw_only=True):
    """A file. Times are Unix seconds."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"
    expires_at: int | None = None
    status_details: str | None = None


class UploadRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/uploads`."""

    bytes: Annotated[int, Meta(ge=0)]
    filename: Annotated[str, Meta(min_length=1)]
    #: Whatever it is, a batch looks at the lines.
    mime_type: str
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `POST /v1/uploads/{id}/complete`."""

    part_ids: Annotated[list[str], Meta(max_length=MAX_PARTS)]
    md5: Annotated[str, Meta(pattern="^[0-9a-fA-F]{32}$")] | None = None


class UploadObject(Struct, kw_only=True):
    """A file that arrives in parts. Times are Unix seconds."""

    id: str
    object: Literal["upload"] = "upload"
    #: What the parts must add up to.
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch"] = "batch"
    status: Literal["pending", "completed", "cancelled", "expired"] = "pending"
    file: FileObject | None = None


class PartObject(Struct, kw_only=True):
    """A part of an upload."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


class Sent(Struct, kw_only=True):
    """An upload with what is not shown of it."""

    upload: UploadObject
    #: Seconds after which its file expires.
    file_expires_s: int | None = None
    #: Once it is completed, of which parts.
    part_ids: list[str] = []

    def status_at(self, now: int) -> str:
        """The status, by the clock."""
        if self.upload.status == "pending" and self.upload.expires_at <= now:
            return "expired"
        return self.upload.status


class Counts(Struct, kw_only=True):
    """Lines of a batch."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class Cached(Struct, kw_only=True):
    """Part of the input tokens."""

    cached_tokens: int = 0


class Reasoning(Struct, kw_only=True):
    """Part of the output tokens."""

    reasoning_tokens: int = 0


class TokenUsage(Struct, kw_only=True):
    """Tokens of the answered lines."""

    input_tokens: int
    input_tokens_details: Cached
    output_tokens: int
    output_tokens_details: Reasoning
    total_tokens: int


class Problem(Struct, kw_only=True):
    """See `lines.Mistake`."""

    code: str
    message: str
    param: str | None
    line: int | None


class Problems(Struct, kw_only=True):
    """Why a batch failed."""

    data: list[Problem]
    object: Literal["list"] = "list"


class Batch(Struct, kw_only=True):
    """A batch. Times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = None
    errors: Problems | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = field(default_factory=Counts)
    usage: TokenUsage | None = None
    metadata: dict[str, str] | None = None

    def move(self, status: Status, now: int) -> None:
        """Change the status, and note when."""
        self.status = status
        setattr(self, f"{status}_at", now)

    def fail(self, mistakes: list[Mistake], now: int) -> None:
        """The input is refused."""
        problems = [
            Problem(code=one.code, message=one.message, param=one.param, line=one.line)
            for one in mistakes
        ]
        self.errors = Problems(data=problems)
        self.move("failed", now)

    def count(self, tally: Tally) -> None:
        """Lines that are answered so far."""
        self.request_counts.completed = tally.completed
        self.request_counts.failed = tally.failed
        self.usage = TokenUsage(
            input_tokens=tally.prompt_tokens,
            input_tokens_details=Cached(cached_tokens=tally.cached_tokens),
            output_tokens=tally.completion_tokens,
            output_tokens_details=Reasoning(reasoning_tokens=tally.reasoning_tokens),
            total_tokens=tally.prompt_tokens + tally.completion_tokens,
        )


class Job(Struct, kw_only=True):
    """A batch with what is not shown of it."""

    batch: Batch
    #: The key that made it.
    owner: str
    #: Where answers and failures are written; the batch names them when it is over.
    output_id: str
    error_id: str
    output_expires_s: int | None = None
    #: The models of its lines that were served when it was checked: if one goes, it is waited for.
    served: list[str] = []
    #: The model of its lines that name none: the only one that was served then, if it was the only.
    only: str = ""
    #: Set with `finalizing`: how it ends.
    ending: Ending | None = None
