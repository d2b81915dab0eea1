"""How an exception is reported to a client: code and cause, the same for every engine."""

from __future__ import annotations

import pytest
import torch

from broker.protocol.errors import ErrorCode, RequestError
from worker.engines.common.failures import error_info, one_line

SHORT = ErrorCode.OUT_OF_MEMORY.value
BROKEN = ErrorCode.ENGINE_ERROR.value


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), SHORT),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), SHORT),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), SHORT),
        (RuntimeError("[metal::malloc] out of memory"), SHORT),
        (RuntimeError("shape mismatch"), BROKEN),
        (ValueError("the words out of memory in a text"), BROKEN),
    ],
    ids=["host", "cuda", "torch-cpu", "library", "other", "not-a-runtime-error"],
)
def test_running_out_of_memory_has_its_own_code(error: Exception, code: str) -> None:
    assert error_info(error, "it failed").code == code


def test_the_cause_follows_what_failed_on_one_line() -> None:
    info = error_info(ValueError("one\n  two"), "the model failed on this request")
    assert info.message == "the model failed on this request: one two"


def test_an_error_of_the_request_keeps_its_code_and_its_details() -> None:
    refused = RequestError(ErrorCode.INVALID_REQUEST, "no such word", details={"parameter": "x"})
    assert error_info(refused, "it failed") is refused.info


def test_an_exception_without_a_message_is_reported_by_its_class() -> None:
    assert one_line(KeyError()) == "KeyError"


def test_a_long_cause_is_cut_visibly() -> None:
    assert one_line(ValueError("x" * 20), 10) == "xxxxxxx..."
