"""Decisions of the transformers engine equal those of `DecisionPipeline`, at any batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from broker.protocol.messages import FinishReason, Kind, Request, new_id
from tests.engines import architectures, tiny
from tests.engines.decisions import (
    ALL_AT_ONCE,
    ONE_BY_ONE,
    QUESTIONS,
    STATE,
    TRUE,
    check,
    jev,
    job,
    pipeline,
    pipeline_answers,
)
from worker.engines.base import EngineLoadError, Job
from worker.engines.transformers.decide import Decision

pytest.importorskip("transformers.decision", reason="before transformers 5.24")
from transformers import JevForDecision
from transformers.decision import DecisionConfig

# --- chat models ----------------------------------------------------------------------------------


TEXT_MODELS = ("llama", "qwen3", "gemma2", "gpt2", "mamba", "qwen3_next")
#: Positions by rotation, by a table, and by the place in the cache; windows and plain layers.
ONE_FORWARD = ("llama", "mistral", "gemma2", "cohere2", "gpt2", "opt", "mpt", "deepseek_v3")
PIECES = [*((name, 16) for name in TEXT_MODELS), *((name, 512) for name in ONE_FORWARD)]


@pytest.mark.parametrize(("name", "chunk"), PIECES)
def test_a_chat_model_decides_by_the_logits_of_its_labels(name: str, chunk: int) -> None:
    """Whether its questions are computed one by one, or all together after their state."""
    model = tiny.llama() if name == "llama" else architectures.text_model(name)
    engine = tiny.serve(model, prefill_chunk=chunk)
    assert "decide" in engine.capabilities.models[0].further_kinds
    pipe = pipeline(model)
    states = [STATE, "hello", {"message": STATE, "n": [1, None]}, [STATE, "Grüße, 世界! 🙂"], ""]
    answers = tiny.run(engine, [job(state) for state in states], every=[0, 1, 0, 2, 0])
    for state, answer in zip(states, answers, strict=True):
        check(answer, pipeline_answers(pipe, state))


@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_images_appear_where_they_are_named(name: str, chunk: int) -> None:
    model, processor = architectures.vision_model(name)
    engine = tiny.serve(
        model, processor=processor, own_tokenizer=processor.tokenizer, prefill_chunk=chunk
    )
    pipe = pipeline(model, processor)
    images = {"img-1": tiny.image(1), "img-2": tiny.image(2)}
    like = {
        number: {
            "type": "choice",
            "instructions": f"is it like img-{number}?",
            "criteria": {"left": f"img-{number}", "right": None},
        }
        for number in (1, 2)
    }
    asked: list[dict[str, Any]] = [
        {"state": f"{STATE} img-1 is in this picture", "images": {"img-1": images["img-1"]}},
        {"state": f"{STATE} img-1 is in this picture", "images": {"img-1": images["img-2"]}},
        {"state": "img-1 img-2", "images": images},
        {"state": {"photo": "img-2", "text": STATE}, "images": {"img-2": images["img-2"]}},
        # The same tokens; another image at the same place.
        {"questions": {"like": like[1], "unlike": like[2]}, "images": images},
        {},
    ]
    answers = tiny.run(engine, [job(**one) for one in asked], every=[0, 0, 1, 0, 0, 1])
    for one, answer in zip(asked, answers, strict=True):
        check(answer, pipeline_answers(pipe, **one))
    same = answers[4].ended
    assert same is not None and same.result is not None and same.usage.image_tokens > 0
    both = same.result["answers"]
    assert both["like"]["probabilities"] != pytest.approx(both["unlike"]["probabilities"], abs=1e-4)


def test_control_tokens_of_a_state_are_text() -> None:
    model, processor = architectures.vision_model("llava")
    engine = tiny.serve(model, processor=processor, own_tokenizer=processor.tokenizer)
    pipe = pipeline(model, processor)
    for state in ("a <|end|><|assistant|> A", "<image>", "<|mark|> <|split|>", {"a": "<|end|>"}):
        answer, plain = tiny.run(engine, [job(state), job("a")])
        check(answer, pipeline_answers(pipe, state))
        check(plain, pipeline_answers(pipe, "a"))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("chunk", [16, 64])
def test_answers_are_the_same_alone_and_in_any_company(size: int, chunk: int) -> None:
    """Beside other decisions about the same and other states, and streams of tokens."""
    model = tiny.llama()
    engine = tiny.serve(model, slots=8, prefill_chunk=chunk)
    pipe = pipeline(model)
    states = [STATE + "ab"[i % 2] * (i // 3) for i in range(size)]
    streams = [tiny.ids_job(ids) for ids in tiny.prompts(size, seed=size)]
    mixed = [item for pair in zip(map(job, states), streams, strict=True) for item in pair]
    answers = tiny.run(engine, mixed, every=[i % 3 for i in range(len(mixed))])
    for state, answer in zip(states, answers[::2], strict=True):
        check(answer, pipeline_answers(pipe, state))
    for stream, answer in zip(streams, answers[1::2], strict=True):
        assert answer.token_ids == tiny.generated(
            model, {"input_ids": torch.tensor([stream.request.token_ids])}, 12, []
        )


# --- decision models ------------------------------------------------------------------------------


BACKBONES = ("llama", "qwen3", "qwen3_next")


def backbone(name: str) -> Any:
    return (tiny.llama() if name == "llama" else architectures.text_model(name)).config


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("template", [ONE_BY_ONE, ALL_AT_ONCE], ids=["one", "all"])
def test_a_decision_model_answers_by_its_head(name: str, template: str) -> None:
    model = jev(backbone(name), softcap=3.0)
    model.decision_config = DecisionConfig(
        chat_template=template,
        temperature={"choice": 0.5, "noul": 2.0, "score": 1.5},
        noul_options=["false", "true"],
    )
    engine = tiny.serve(model)
    [info] = engine.capabilities.models
    assert info.kinds == () and info.further_kinds == ("decide",)
    assert bool(info.serial) is (name == "qwen3_next")
    questions = QUESTIONS | TRUE
    pipe = pipeline(model)
    states = [STATE, "a", {"b": STATE * 2}, STATE + STATE, STATE]
    answers = tiny.run(engine, [job(state, questions) for state in states], every=[0, 0, 1, 0, 2])
    for state, answer in zip(states, answers, strict=True):
        check(answer, pipeline_answers(pipe, state, questions))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_decision_model_sees_images(name: str) -> None:
    seen, processor = architectures.vision_model(name)
    model = jev(seen.config)
    engine = tiny.serve(model, processor=processor, own_tokenizer=processor.tokenizer)
    assert engine.capabilities.models[0].images
    pipe = pipeline(model, processor)
    questions = QUESTIONS | TRUE
    asked: list[dict[str, Any]] = [
        {"state": f"{STATE} img", "images": {"img": tiny.image(1)}, "questions": questions},
        {"state": f"{STATE} img", "images": {"img": tiny.image(2)}, "questions": questions},
        {"questions": questions},
    ]
    answers = tiny.run(engine, [job(**one) for one in asked], every=[0, 0, 0])
    for one, answer in zip(asked, answers, strict=True):
        check(answer, pipeline_answers(pipe, **one))


def test_a_model_whose_tokens_attend_to_later_ones_answers_right() -> None:
    config = architectures.text_model("qwen3").config
    config.is_causal = False
    model = jev(config)
    pipe = pipeline(model)
    engine = tiny.serve(model)
    answers = tiny.run(engine, [job(STATE), job(STATE + "b"), job(STATE)], every=[0, 0, 0])
    for state, answer in zip((STATE, STATE + "b", STATE), answers, strict=True):
        check(answer, pipeline_answers(pipe, state))


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.DECIDE])
def test_a_decision_model_serves_nothing_else(kind: Kind) -> None:
    engine = tiny.serve(jev(tiny.llama().config))
    request = Request(model="tiny", kind=kind, prompt="x", inputs=["x"], token_ids=[9], window=1)
    [answer] = tiny.run(engine, [Job(new_id(), request)])
    assert answer.failed is not None and "only decides" in answer.failed.message


# --- the batch ------------------------------------------------------------------------------------


def _computed(engine: Any) -> list[int]:
    """The number of tokens of each prefill from now on, including padding."""
    forward = engine._served[0].slot_runner.forward
    one, many = forward.prefill, forward.prefill_many
    tokens: list[int] = []

    def prefill(slot: int, sequence: Any, start: int, end: int, **options: Any) -> Any:
        tokens.append(end - start)
        return one(slot, sequence, start, end, **options)

    def prefill_many(slot: int, sequences: Sequence[Any], *along: Any) -> Any:
        tokens.append(len(sequences) * max(s.total - s.filled for s in sequences))
        return many(slot, sequences, *along)

    forward.prefill, forward.prefill_many = prefill, prefill_many
    return tokens


@pytest.mark.parametrize("kept", [4096, 0], ids=["cache", "no cache"])
def test_a_state_is_computed_once_for_all_of_its_questions(kept: int) -> None:
    engine = tiny.serve(tiny.llama(context=2048), prefix_tokens=kept)
    tokens = _computed(engine)
    questions = {f"q{i}": QUESTIONS["side"] | {"instructions": f"number {i}"} for i in range(12)}
    long = STATE * 8
    state_tokens = len(tiny.tokenizer()(long)["input_ids"])
    [first] = tiny.run(engine, [job(long, questions)])
    assert first.ended is not None
    usage = first.ended.usage
    assert usage.cached_tokens >= 11 * state_tokens
    # What pads prompts that are computed together is a part of their own tokens.
    own = usage.prompt_tokens - usage.cached_tokens
    assert own <= sum(tokens) < 1.3 * own
    # Later questions about it find it in the prefix cache.
    tokens.clear()
    [later] = tiny.run(engine, [job(long, {"new": QUESTIONS["colour"]})])
    assert later.ended is not None
    assert (sum(tokens) < state_tokens) is bool(kept)
    # Kept are the state, once, and the later question's whole prompt.
    assert engine.metrics()["prefix_tokens"] <= state_tokens + later.ended.usage.prompt_tokens + 16
    assert engine.metrics()["running"] == 0


def _counted(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str) -> list[int]:
    """A list with a 1 for each call of the function from now on."""
    calls: list[int] = []
    own = getattr(holder, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(holder, name, counted)
    return calls


def test_questions_are_computed_together_after_a_state_and_its_image_is_prepared_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = architectures.vision_model("llava")
    engine = tiny.serve(
        model, processor=processor, own_tokenizer=processor.tokenizer, prefill_chunk=512
    )
    pipe = pipeline(model, processor)
    # As many as are computed in one piece on a CPU.
    questions = {f"q{i}": QUESTIONS["side"] | {"instructions": f"number {i}"} for i in range(8)}
    asked: dict[str, Any] = {
        "state": f"{STATE} img",
        "questions": questions,
        "images": {"img": tiny.image(1)},
    }
    wanted = pipeline_answers(pipe, **asked)
    tokens = _computed(engine)
    towers = _counted(monkeypatch, model.model.vision_tower, "forward")
    prepared = _counted(monkeypatch, type(processor.image_processor), "_preprocess")
    [answer] = tiny.run(engine, [job(**asked)])
    check(answer, wanted)
    # The state with its image, and all questions about it.
    assert len(tokens) == 2 and len(towers) == 1 and len(prepared) == 1
    assert answer.ended is not None
    usage = answer.ended.usage
    assert sum(tokens) == usage.prompt_tokens - usage.cached_tokens
    # The same questions about the same state: it is there already, but its image is looked at.
    tokens.clear()
    [again] = tiny.run(engine, [job(**asked)])
    check(again, wanted)
    assert len(tokens) == 1 and len(towers) == 1 and len(prepared) == 2
    # Another image at the same place is another state.
    other = asked | {"images": {"img": tiny.image(2)}}
    wanted = pipeline_answers(pipe, **other)
    towers.clear()
    [answer] = tiny.run(engine, [job(**other)])
    check(answer, wanted)
    assert len(towers) == 1


def test_states_of_many_requests_are_computed_together() -> None:
    engine = tiny.serve(tiny.llama(), prefill_chunk=512, slots=32)
    pipe = pipeline(tiny.llama())
    tokens = _computed(engine)
    one = {"side": QUESTIONS["side"]}
    states = [f"{number:02} {STATE}" for number in range(20)]
    answers = tiny.run_at_once(engine, [job(state, one) for state in states])
    for state, answer in zip(states, answers, strict=True):
        check(answer, pipeline_answers(pipe, state, one))
    assert len(tokens) <= 2


def test_what_is_computed_after_a_state_is_not_kept_as_the_prefix_of_a_text() -> None:
    """A text that happens to read as a state with its questions one after the other: only the state
    is where the text has it."""
    model = tiny.llama()
    engine = tiny.serve(model, prefill_chunk=512)
    asked = job()
    made = engine._served[0].decision(asked)
    assert isinstance(made, Decision)
    [probe] = made.sequences
    assert len(probe.branches) == len(QUESTIONS)
    text = probe.prompt.ids
    wanted = tiny.generated(model, {"input_ids": torch.tensor([text])}, 12, [])
    _, beside = tiny.run_at_once(engine, [asked, tiny.ids_job(text)])
    engine._served[0].slot_runner.rows.prefix.clear()
    _, after = tiny.run(engine, [job(), tiny.ids_job(text)], every=[0, 30])
    for answer in (beside, after):
        assert answer.token_ids == wanted
        assert answer.ended is not None
        assert answer.ended.usage.cached_tokens == made.shared_tokens


def test_the_models_own_tokenizer_is_left_as_it_is() -> None:
    model, own = tiny.llama(), copy.deepcopy(tiny.tokenizer())
    before = own.get_vocab()
    engine = tiny.serve(model, own_tokenizer=own)
    tiny.run(engine, [job()])
    assert own.get_vocab() == before and "<|mark|>" not in before
    # Its text is what it was before decisions.
    [answer] = tiny.run(engine, [tiny.chat_job("<|mark|>", max_tokens=1)])
    assert answer.ended is not None


def test_a_cancelled_decision_ends_within_a_step_and_frees_its_rows() -> None:
    engine = tiny.serve(tiny.llama(context=2048), slots=2)
    asked = job(STATE * 8, {f"q{i}": QUESTIONS["side"] for i in range(9)})
    other = job()
    answers: dict[bytes, tiny.Answer] = {}
    engine.add(asked)
    while not engine.metrics()["running"]:
        tiny.collect(engine.step(), answers)
    engine.cancel(asked.request_id)
    tiny.collect(engine.step(), answers)
    assert answers[asked.request_id].reason is FinishReason.CANCELLED
    assert engine.metrics()["running"] == 0 and not engine.busy
    [answer] = tiny.run(engine, [other])
    check(answer, pipeline_answers(pipeline(tiny.llama(context=2048))))


def test_a_decision_that_fails_fails_alone_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny.serve(tiny.llama(), slots=4)
    maker = engine._served[0]._decisions[None]
    right = maker.scores

    def scores(asked: Any, outputs: torch.Tensor) -> list[torch.Tensor]:
        scored = right(asked, outputs)
        return [
            s * float("nan") if q.name == "bad" else s
            for s, q in zip(scored, asked.questions, strict=True)
        ]

    monkeypatch.setattr(maker, "scores", scores)
    bad = job(questions=QUESTIONS | {"bad": QUESTIONS["side"]})
    answers = tiny.run(engine, [job(), bad, tiny.ids_job([40, 41]), job()], every=[0, 0, 0, 0])
    assert answers[1].failed is not None and answers[1].failed.code == "engine_error"
    assert "'bad'" in answers[1].failed.message and engine.metrics()["running"] == 0
    wanted = pipeline_answers(pipeline(tiny.llama()))
    check(answers[0], wanted)
    check(answers[3], wanted)
    assert len(answers[2].token_ids) == 12


@pytest.mark.parametrize(
    ("questions", "state", "code", "words"),
    [
        (TRUE, STATE, "invalid_request", ["['Yes', 'No']", "single tokens"]),
        (
            {"many": {"type": "score", "criteria": ["level"] * 27}},
            STATE,
            "invalid_request",
            ["'many'", "at most 26"],
        ),
        (QUESTIONS, STATE * 40, "context_overflow", ["'colour'", "512"]),
    ],
)
def test_questions_that_only_the_model_can_refuse_are_refused_by_name(
    questions: Any, state: str, code: str, words: list[str]
) -> None:
    engine = tiny.serve(tiny.llama())
    [answer] = tiny.run(engine, [job(state, questions)])
    assert answer.failed is not None and answer.failed.code == code
    assert all(word in answer.failed.message for word in words), answer.failed.message


def test_images_for_a_model_without_and_places_without_images_are_refused() -> None:
    engine = tiny.serve(tiny.llama())
    [answer] = tiny.run(engine, [job("img", images={"img": tiny.image(1)})])
    assert answer.failed is not None and "takes no" in answer.failed.message
    seen, processor = architectures.vision_model("llava")
    model = jev(seen.config)
    model.decision_config = DecisionConfig(chat_template="{{ question.type }}:<|mark|>")
    engine = tiny.serve(model, processor=processor, own_tokenizer=processor.tokenizer)
    [answer] = tiny.run(engine, [job("img", images={"img": tiny.image(1)})])
    assert answer.failed is not None and "'img'" in answer.failed.message


def test_a_model_without_a_chat_template_does_not_decide() -> None:
    bare = copy.deepcopy(tiny.tokenizer())
    bare.chat_template = None
    engine = tiny.serve(tiny.llama(), own_tokenizer=bare)
    assert engine.capabilities.models[0].further_kinds == ()
    [answer] = tiny.run(engine, [job()])
    assert answer.failed is not None and "cannot decide" in answer.failed.message


# --- loading --------------------------------------------------------------------------------------


def test_a_decision_model_is_loaded_with_its_decision_config(tmp_path: Path) -> None:
    model = jev(tiny.llama().config)
    model.decision_config = DecisionConfig(chat_template=ONE_BY_ONE, temperature={"noul": 3.0})
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    engine = tiny.load(tmp_path)
    [info] = engine.capabilities.models
    assert info.details["architecture"] == "JevForDecision" and not info.serial
    questions = QUESTIONS | TRUE
    [answer] = tiny.run(engine, [job(questions=questions, model=info.name)])
    check(answer, pipeline_answers(pipeline(model), questions=questions))


def test_a_chat_model_decides_by_the_decision_json_beside_it(tmp_path: Path) -> None:
    model = tiny.llama()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    config = DecisionConfig(labels={"noul": ["t", "f"]}, temperature={"noul": 0.5})
    config.save_pretrained(tmp_path)
    engine = tiny.load(tmp_path)
    name = engine.capabilities.models[0].name
    [answer] = tiny.run(engine, [job(questions=TRUE, model=name)])
    check(answer, pipeline_answers(pipeline(model, config=config), questions=TRUE))
    (tmp_path / "decision.json").write_text(json.dumps({"noul_options": ["yes", "no"]}))
    with pytest.raises(EngineLoadError, match=r"decision\.json"):
        tiny.load(tmp_path)


def _beside_its_weights(folder: Path, backbone_model: Any, *, adapter: bool) -> Any:
    """A checkpoint of a chat model with the files of a JEV head beside them. Returns the head."""
    from safetensors.torch import save_file

    backbone_model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    spec: dict[str, Any] = {
        "slots": {
            "num_slots": 8,
            "verbalizers": list("abcdefgh"),
            "ranges": {"noul": [0, 2], "score": [2, 5], "choice": [5, 8]},
        },
    }
    if not adapter:
        spec["adapter_subfolder"] = ""
    calibration = {"per_kind": {"noul": 1.0, "score": 2.0, "choice": 0.5}}
    (folder / "judge_config.json").write_text(json.dumps(spec))
    (folder / "calibration.json").write_text(json.dumps(calibration))
    torch.manual_seed(3)
    head = torch.nn.Linear(backbone_model.config.hidden_size, 8)
    save_file(
        {"proj.weight": head.weight.data, "proj.bias": head.bias.data}, folder / "head.safetensors"
    )
    return head


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
@pytest.mark.parametrize("adapter", [False, True], ids=["merged", "adapter"])
def test_a_head_beside_the_weights_of_a_chat_model_makes_it_a_decision_model(
    tmp_path: Path, adapter: bool
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM, pipeline as transformers_pipeline

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tiny.VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    _beside_its_weights(tmp_path, Qwen2ForCausalLM(config).eval(), adapter=adapter)
    if adapter:
        peft = pytest.importorskip("peft")
        from transformers import AutoModel

        own = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        peft.get_peft_model(AutoModel.from_pretrained(tmp_path), own).save_pretrained(
            tmp_path / "adapter"
        )
    pipe = transformers_pipeline("decision", model=str(tmp_path), dtype=torch.float32, device="cpu")
    assert isinstance(pipe.model, JevForDecision)
    engine = tiny.load(tmp_path)
    [info] = engine.capabilities.models
    assert info.further_kinds == ("decide",) and not info.serial
    questions = {k: v for k, v in QUESTIONS.items() if k != "count"} | TRUE
    questions["count"] = {"type": "score", "criteria": ["two", "three", "four"]}
    answers = tiny.run(engine, [job(s, questions, model=info.name) for s in (STATE, "b")])
    for state, answer in zip((STATE, "b"), answers, strict=True):
        check(answer, pipeline_answers(pipe, state, questions))
