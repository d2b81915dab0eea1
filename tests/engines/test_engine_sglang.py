"""The SGLang engine, on a stand-in for SGLang's offline engine: SGLang itself needs a GPU.

The stand-in keeps to SGLang's documented interface: `async_generate` yields chunks with
`output_ids` and `meta_info`, `tokenizer_manager.abort_request` ends one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import FinishReason, Kind, Request, Resume, new_id
from tests.engines import library_checks as checks, tiny
from tests.engines.library_standin import described, following, served, written
from worker.engines import registry
from worker.engines.base import EngineLoadError, Job
from worker.engines.common.library_model import LibraryEngine
from worker.engines.sglang.engine import UNSUPPORTED, SglangGenerator, sampling_parameters

HERE = find_spec("sglang") is not None
PROMPT = [30, 31, 32, 33]


class StandInSglang:
    """The part of SGLang's offline engine that is used."""

    def __init__(self, *, incremental: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.tokenizer_manager = self
        self.incremental = incremental
        self.requests: dict[str, dict[str, Any]] = {}
        self.aborted: list[str] = []
        self.broken = False

    async def async_generate(self, *, rid: str, stream: bool, **arguments: Any) -> Any:
        assert stream is True
        if self.broken:
            raise ValueError("the input is too long")
        self.requests[rid] = arguments
        return self._chunks(rid, arguments)

    async def _chunks(self, rid: str, arguments: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        ids, said = list(arguments["input_ids"]), 0
        answer: list[int] = []
        while len(answer) < arguments["sampling_params"]["max_new_tokens"]:
            await asyncio.sleep(0)
            if rid in self.aborted:
                reason = {"type": "abort", "message": "Aborted"}
                yield {"output_ids": [], "meta_info": self._meta(len(answer), reason)}
                return
            ids.append(following(ids))
            answer.append(ids[-1])
            fresh = answer[said:] if self.incremental else list(answer)
            said = len(answer)
            yield {"output_ids": fresh, "meta_info": self._meta(len(answer), None)}

    @staticmethod
    def _meta(count: int, reason: dict[str, Any] | None) -> dict[str, Any]:
        return {"completion_tokens": count, "cached_tokens": 2, "finish_reason": reason}

    def abort_request(self, rid: str) -> None:
        self.aborted.append(rid)

    def shutdown(self) -> None:
        self.loop.close()


@pytest.fixture(params=[False, True], ids=["cumulative chunks", "incremental chunks"])
def sglang(request: pytest.FixtureRequest) -> StandInSglang:
    return StandInSglang(incremental=request.param)


@pytest.fixture
def engine(sglang: StandInSglang) -> Iterator[LibraryEngine]:
    made = served(SglangGenerator(sglang, described(), slots=3), UNSUPPORTED)
    yield made
    made.close()


def test_answers_are_the_librarys_whichever_requests_join(
    engine: LibraryEngine, sglang: StandInSglang
) -> None:
    prompts = tiny.prompts(6)
    jobs = [tiny.ids_job(prompt, max_tokens=9) for prompt in prompts]
    answers = tiny.run(engine, jobs, every=(0, 1, 2, 0, 1))
    assert [answer.token_ids for answer in answers] == [written(p, 9) for p in prompts]
    ended = answers[0].ended
    assert ended is not None and ended.usage.cached_tokens == 2


def test_sampling_parameters_reach_sglang(engine: LibraryEngine, sglang: StandInSglang) -> None:
    job = tiny.ids_job(
        PROMPT, temperature=0.7, top_p=0.9, min_p=0.05, seed=(1 << 40) + 5, logit_bias=[(40, 2.0)]
    )
    tiny.run(engine, [job])
    (arguments,) = sglang.requests.values()
    parameters = arguments["sampling_params"]
    assert parameters["sampling_seed"] == 5
    assert parameters["top_k"] == -1
    assert parameters["logit_bias"] == {"40": 2.0}
    assert (parameters["temperature"], parameters["top_p"], parameters["min_p"]) == (0.7, 0.9, 0.05)


def test_no_bias_of_a_caller_allows_the_placeholder_of_an_image() -> None:
    job = tiny.ids_job(PROMPT, logit_bias=[(7, 90.0), (40, 2.0)])
    given = sampling_parameters(job.request.params, SimpleNamespace(answer=[], max_tokens=4), [7])  # type: ignore[arg-type]
    assert given["logit_bias"]["40"] == 2.0
    assert given["logit_bias"]["7"] < -100


def test_a_cancelled_and_a_stopped_request_are_aborted_at_sglang(
    engine: LibraryEngine, sglang: StandInSglang
) -> None:
    long = tiny.ids_job(PROMPT, max_tokens=400)
    answers: dict[bytes, tiny.Answer] = {}
    engine.add(long)
    while not answers.get(long.request_id, tiny.Answer()).token_ids:
        tiny.collect(engine.step(), answers)
    engine.cancel(long.request_id)
    tiny.collect(engine.step(), answers)
    assert answers[long.request_id].reason is FinishReason.CANCELLED
    assert sglang.aborted == list(sglang.requests)
    stop_id = written(PROMPT, 4)[3]
    (stopped,) = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=400, stop_token_ids=[stop_id])])
    assert stopped.reason is FinishReason.STOP
    assert stopped.token_ids == written(PROMPT, 4)
    assert sglang.aborted == list(sglang.requests)


def test_a_resumed_answer_is_prefilled_with_the_prompt(
    engine: LibraryEngine, sglang: StandInSglang
) -> None:
    whole = written(PROMPT, 10)
    job = tiny.ids_job(PROMPT, max_tokens=10)
    request = Request(
        model="tiny",
        kind=Kind.COMPLETE,
        token_ids=PROMPT,
        params=job.request.params,
        window=1 << 30,
        resume=Resume(epoch=1, token_ids=whole[:4]),
    )
    (rest,) = tiny.run(engine, [Job(new_id(), request)])
    assert rest.token_ids == whole[4:]
    (arguments,) = sglang.requests.values()
    assert arguments["input_ids"] == PROMPT + whole[:4]


def test_unsupported_parameters_are_refused_by_name(
    engine: LibraryEngine, sglang: StandInSglang
) -> None:
    refused: list[dict[str, Any]] = [
        {"logprobs": 1},
        {"prompt_logprobs": 1},
        {"min_tokens": 3},
        {"repetition_penalty": 1.2},
        {"banned_token_ids": [40]},
        {"forced_token_ids": [40]},
        {"presence_penalty": 3.0},
    ]
    for change in refused:
        (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, **change)])
        assert answer.failed is not None
        assert answer.failed.code == ErrorCode.INVALID_REQUEST.value
        assert answer.failed.details == {"parameter": next(iter(change))}
    assert sglang.requests == {}


def test_an_exception_of_sglang_fails_its_own_request(
    engine: LibraryEngine, sglang: StandInSglang
) -> None:
    sglang.broken = True
    (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT)])
    assert answer.failed is not None and "the input is too long" in answer.failed.message
    sglang.broken = False
    (answer,) = tiny.run(engine, [tiny.ids_job(PROMPT, max_tokens=3)])
    assert answer.token_ids == written(PROMPT, 3)


@pytest.mark.skipif(HERE, reason="SGLang is installed here")
def test_without_sglang_the_error_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"pip install .*\[sglang\]"):
        registry.load("sglang")(checks.options("sglang", tmp_path), checks.told)
