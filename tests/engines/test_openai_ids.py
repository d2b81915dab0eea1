"""Servers that take and send token ids: what is sent to them, and how their chunks are read. The
server is a stand-in without HTTP; a real vLLM is in `bench`'s table of engines."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

from broker.protocol.errors import ErrorCode, ErrorInfo
from broker.protocol.messages import FinishReason, Kind, Params, Request, Resume, new_id
from tests.engines import tiny
from tests.engines.library_standin import described, following, written
from worker.engines.base import EngineLoadError, EngineOptions, Job
from worker.engines.common.arguments import SharedSettings
from worker.engines.common.library_model import LibraryModel
from worker.engines.openai.discover import Model
from worker.engines.openai.http import Answer, Chunk, Done, Fault
from worker.engines.openai.ids import IdsEngine, IdsGenerator, build_ids, takes

PROMPT = [30, 31, 32, 33]


class StubServer:
    """Answers with `following`; `at_once` tokens in a chunk."""

    where = "stub"

    def __init__(self, *, llamacpp: bool, at_once: int = 1) -> None:
        self.llamacpp = llamacpp
        self.at_once = at_once
        self.opened: list[tuple[str, dict[str, Any]]] = []
        self.closed: list[int] = []
        self.runs: dict[int, list[int]] = {}
        self.left: dict[int, int] = {}
        self.faults: dict[int, ErrorInfo] = {}
        self.ends_after = 1 << 30

    def open(self, path: str, body: dict[str, Any]) -> int:
        self.opened.append((path, body))
        number = len(self.opened)
        self.runs[number] = list(body["prompt"])
        self.left[number] = body["n_predict" if self.llamacpp else "max_tokens"]
        return number

    def close_call(self, number: int) -> None:
        self.closed.append(number)
        self.runs.pop(number, None)

    def say(self, engine: IdsEngine) -> None:
        """One chunk of every stream."""
        for number, ids in list(self.runs.items()):
            if number in self.faults:
                engine.hear(Fault(number, self.faults.pop(number)))
                continue
            if not self.left[number] or self.ends_after <= 0:
                engine.hear(Done(number))
                continue
            self.ends_after -= 1
            fresh: list[int] = []
            for _ in range(min(self.at_once, self.left[number])):
                fresh.append(following([*ids, *fresh]))
            self.left[number] -= len(fresh)
            ids += fresh
            data: dict[str, Any] = (
                {"content": "?", "tokens": fresh, "stop": False}
                if self.llamacpp
                else {"choices": [{"text": "?", "token_ids": fresh, "logprobs": _told(fresh)}]}
            )
            engine.hear(Chunk(number, data))


def _told(ids: list[int]) -> dict[str, Any]:
    return {
        "tokens": [f"token_id:{id_}" for id_ in ids],
        "token_logprobs": [-0.25] * len(ids),
        "top_logprobs": [{f"token_id:{id_}": -0.25, "token_id:40": -2.0} for id_ in ids],
    }


class Driven(IdsEngine):
    """Steps the server with the engine."""

    stub: StubServer

    def step(self) -> Any:
        self.stub.say(self)
        return super().step()


def job(prompt: list[int], **params: Any) -> Job:
    """A completion; its end token ends it."""
    return tiny.ids_job(prompt, ignore_eos=False, **params)


def until(engine: IdsEngine, answers: dict[bytes, tiny.Answer], condition: Any) -> None:
    """Step until something is so."""
    for _ in range(1000):
        tiny.collect(engine.step(), answers)
        if condition():
            return
    raise AssertionError("nothing came of 1000 steps")


def driven(stub: StubServer) -> Driven:
    facts = described()
    generator = IdsGenerator(stub, "m", facts, 4, llamacpp=stub.llamacpp)  # type: ignore[arg-type]
    model = LibraryModel(facts, ("tiny",), SharedSettings(), generator)
    engine = Driven("stub", [model], [generator], SharedSettings())
    engine.stub = stub
    return engine


@pytest.fixture(params=[False, True], ids=["vllm", "llamacpp"])
def stub(request: pytest.FixtureRequest) -> StubServer:
    return StubServer(llamacpp=request.param)


def test_answers_are_the_servers_tokens_whoever_joins(stub: StubServer) -> None:
    stub.at_once = 2
    engine = driven(stub)
    prompts = tiny.prompts(6)
    answers = tiny.run(engine, [job(p, max_tokens=9) for p in prompts], every=(0, 1, 2))
    assert [answer.token_ids for answer in answers] == [written(p, 9) for p in prompts]
    assert answers[0].reason is FinishReason.LENGTH


def test_an_answer_goes_on_after_the_same_tokens(stub: StubServer) -> None:
    whole = written(PROMPT, 10)
    for cut in range(1, 10):
        request = Request(
            model="tiny",
            kind=Kind.COMPLETE,
            token_ids=PROMPT,
            params=Params(max_tokens=10, seed=3),
            window=1 << 30,
            resume=Resume(epoch=1, token_ids=whole[:cut]),
        )
        engine = driven(stub)
        (rest,) = tiny.run(engine, [Job(new_id(), request)])
        assert rest.token_ids == whole[cut:]
        body = stub.opened[-1][1]
        assert body["prompt"] == PROMPT + whole[:cut]
        # The draws from here are not those from the beginning.
        assert body["seed"] != 3


def test_what_is_sent_to_vllm() -> None:
    stub = StubServer(llamacpp=False)
    asked = job(PROMPT, top_k=0, seed=(1 << 40) + 5, logit_bias=[(40, 2.0)], min_tokens=2)
    tiny.run(driven(stub), [asked])
    path, body = stub.opened[0]
    assert path == "completions"
    assert body["stop_token_ids"] == [tiny.END]
    assert (body["top_k"], body["seed"], body["min_tokens"]) == (-1, 5, 2)
    assert body["logit_bias"] == {"40": 2.0}
    assert body["return_token_ids"] is True and "stop" not in body


def test_logprobs_carry_their_tokens_ids() -> None:
    stub = StubServer(llamacpp=False, at_once=3)
    (answer,) = tiny.run(driven(stub), [job(PROMPT, max_tokens=6, logprobs=2)])
    assert len(answer.logprobs) == 6
    assert answer.logprobs[0].top[0].token_id == answer.token_ids[0]
    assert answer.logprobs[0].top[1].token_id == 40


def test_a_stopped_and_a_cancelled_request_are_closed_at_the_server(stub: StubServer) -> None:
    engine = driven(stub)
    stop = tiny.tokenizer().decode(written(PROMPT, 4)[3:])
    (stopped,) = tiny.run(engine, [job(PROMPT, max_tokens=400, stop=[stop])])
    assert stopped.reason is FinishReason.STOP
    assert stub.closed == [1]


def test_llamacpps_end_is_a_token_of_ours() -> None:
    stub = StubServer(llamacpp=True)
    engine = driven(stub)
    engine.add(job(PROMPT, max_tokens=50))
    answers: dict[bytes, tiny.Answer] = {}
    until(engine, answers, lambda: any(answer.token_ids for answer in answers.values()))
    engine.hear(Chunk(1, {"content": "", "tokens": [], "stop": True, "stop_type": "eos"}))
    stub.runs.clear()
    until(engine, answers, lambda: not engine.busy)
    (answer,) = answers.values()
    assert answer.reason is FinishReason.STOP
    assert answer.token_ids[-1] == tiny.END


def test_a_stream_that_ends_before_its_end_can_be_resumed(stub: StubServer) -> None:
    stub.ends_after = 3
    (answer,) = tiny.run(driven(stub), [job(PROMPT, max_tokens=9)])
    assert answer.failed is not None
    assert (answer.failed.code, answer.failed.retryable) == ("worker_lost", True)
    assert answer.token_ids == written(PROMPT, 3)


def test_the_servers_error_is_the_requests(stub: StubServer) -> None:
    stub.faults[1] = ErrorInfo(code=ErrorCode.OVERLOADED.value, message="later", retryable=True)
    (answer,) = tiny.run(driven(stub), [job(PROMPT)])
    assert answer.failed is not None and answer.failed.message == "later"


def test_a_server_that_sends_no_ids_is_not_believed() -> None:
    stub = StubServer(llamacpp=False)
    engine = driven(stub)
    engine.add(job(PROMPT))
    answers: dict[bytes, tiny.Answer] = {}
    until(engine, answers, lambda: bool(stub.opened))
    engine.hear(Chunk(1, {"choices": [{"text": "words"}]}))
    stub.runs.clear()
    until(engine, answers, lambda: not engine.busy)
    (answer,) = answers.values()
    assert answer.failed is not None and "sent no token ids" in answer.failed.message


def test_penalties_over_the_answer_are_not_continued() -> None:
    stub = StubServer(llamacpp=False)
    request = Request(
        model="tiny",
        kind=Kind.COMPLETE,
        token_ids=PROMPT,
        params=Params(max_tokens=9, presence_penalty=1.0),
        window=1 << 30,
        resume=Resume(epoch=1, token_ids=[40]),
    )
    (answer,) = tiny.run(driven(stub), [Job(new_id(), request)])
    assert answer.failed is not None
    assert (answer.failed.code, answer.failed.retryable) == ("worker_lost", False)


@pytest.mark.parametrize(
    ("params", "attachments", "by_ids"),
    [
        (Params(), False, True),
        (Params(), True, False),
        (Params(banned_token_ids=[4]), False, False),
        (Params(logprobs=1), False, True),
        (Params(logprobs=1, repetition_penalty=1.1), False, False),
    ],
)
def test_what_goes_by_ids(params: Params, attachments: bool, by_ids: bool) -> None:
    request = Request(model="m", prompt="x", kind=Kind.COMPLETE, params=params, window=1)
    assert takes(request, attachments=attachments) == by_ids


class Tokenizing(StubServer):
    """Answers `/tokenize` with its own tokenizer and template."""

    def __init__(self, *, differs: str = "") -> None:
        super().__init__(llamacpp=False)
        self.differs = differs

    def ask(self, path: str, body: dict[str, Any]) -> Answer:
        assert path == "/tokenize"
        tokenizer = tiny.tokenizer()
        if "messages" in body:
            ids = tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=False
            )
            ids = [*ids, 7] if self.differs == "template" else ids
        else:
            ids = tokenizer.encode(body["prompt"], add_special_tokens=False)
            ids = [*ids, 7] if self.differs == "tokenizer" else ids
        return Answer(200, {"tokens": ids}, {})


@pytest.mark.parametrize("differs", ["", "tokenizer", "template"])
def test_a_tokenizer_that_is_not_the_servers_is_refused(tmp_path: Any, differs: str) -> None:
    tiny.llama().config.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    server: Any = Tokenizing(differs=differs)
    model = Model("m", ("tiny",), context_tokens=512)
    if not differs:
        made, _ = build_ids(server, model, "vllm", str(tmp_path), 2, EngineOptions())
        assert made.facts.context_tokens == 512
        return
    with pytest.raises(EngineLoadError, match=differs):
        build_ids(server, model, "vllm", str(tmp_path), 2, EngineOptions())
