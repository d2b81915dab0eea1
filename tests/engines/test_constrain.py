"""Structured output, driven by a model that says anything at random: only the grammar makes sense
of it."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Constraint, Params
from tests.engines import tiny_tokenizers
from worker.engines.common.constrain import (
    ConstraintFactory,
    ConstraintState,
    _spread,
    _unpacked,
    mask_logits_,
)
from worker.engines.common.sampling import Sampler, SamplerRow
from worker.engines.common.text import TextStream, token_table

pytest.importorskip("llguidance", reason="install tokenbus[structured]")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["ä", "b\n", "世界"]}, "maxItems": 3},
        "height": {"type": ["number", "null"]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
#: The model's output is wider than its vocabulary, as it often is.
PADDING = 40


@pytest.fixture(params=["byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return getattr(tiny_tokenizers, request.param)()


@pytest.fixture
def factory(tokenizer: Any) -> ConstraintFactory:
    return ConstraintFactory(tokenizer)


def ends(tokenizer: Any) -> frozenset[int]:
    return frozenset({tokenizer.eos_token_id})


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of the characters one by one, or of their bytes where the vocabulary lacks them."""
    table = token_table(tokenizer)
    known = {table.bytes_of(i): i for i in range(len(tokenizer))}
    ids: list[int] = []
    for character in text:
        data = character.encode()
        ids += [known[data]] if data in known else [known[bytes([o])] for o in data]
    return ids


def sampler(tokenizer: Any) -> Sampler:
    return Sampler(len(tokenizer) + PADDING, token_bytes=token_table(tokenizer).bytes_of)


class RandomModel:
    """Logits that depend only on position and seed."""

    def __init__(self, tokenizer: Any, seed: int, *, scale: float = 2.0) -> None:
        self._generator = torch.Generator()
        self._seed, self._scale = seed, scale
        self._width = len(tokenizer) + PADDING

    def logits(self, position: int) -> torch.Tensor:
        self._generator.manual_seed(1000 * self._seed + position)
        return torch.randn(1, self._width, generator=self._generator) * self._scale


def answer(
    tokenizer: Any, state: ConstraintState, seed: int, *, most: int = 1500, **params: Any
) -> list[int]:
    """Sample until the answer ends, which it must."""
    model, choose = RandomModel(tokenizer, seed), sampler(tokenizer)
    one = SamplerRow(Params(seed=seed, **params), [1], eos_ids=ends(tokenizer), constraint=state)
    ids: list[int] = []
    while len(ids) < most:
        (outcome,) = choose.sample(model.logits(len(ids)), [one])
        assert outcome.ok, outcome.fault
        one.append(outcome.token_id)
        if outcome.token_id in ends(tokenizer):
            assert one.finished
            return ids
        ids.append(outcome.token_id)
    raise AssertionError(f"no end after {most} tokens")


def text_of(tokenizer: Any, ids: list[int]) -> str:
    return b"".join(map(token_table(tokenizer).bytes_of, ids)).decode()


# --- every kind of constraint ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_an_answer_to_a_schema_is_json_of_that_schema(
    tokenizer: Any, factory: ConstraintFactory, seed: int
) -> None:
    state = factory.build(Constraint(type="json_schema", value=PERSON), ends(tokenizer))
    cuts = [{}, {"temperature": 0.0}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}][seed % 5]
    ids = answer(tokenizer, state, seed, **cuts)
    person = json.loads(text_of(tokenizer, ids))
    assert {"name", "age", "tags"} <= person.keys() <= PERSON["properties"].keys()
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"ä", "b\n", "世界"}
    assert len(person["tags"]) <= 3
    assert isinstance(person.get("height"), (int, float, type(None)))


@pytest.mark.parametrize("seed", range(4))
def test_json_object_gives_an_object(tokenizer: Any, factory: ConstraintFactory, seed: int) -> None:
    closing = [(token_id, 4.0) for token_id in encode(tokenizer, '"}]')]  # or it takes for ever
    state = factory.build(Constraint(type="json_object"), ends(tokenizer))
    ids = answer(tokenizer, state, seed, logit_bias=closing)
    assert isinstance(json.loads(text_of(tokenizer, ids)), dict)


def test_blanks_in_json_are_bounded(tokenizer: Any, factory: ConstraintFactory) -> None:
    blank = encode(tokenizer, " ")
    state = factory.build(Constraint(type="json_object"), ends(tokenizer))
    state.replay(encode(tokenizer, "{"))
    assert state.allows(blank)
    assert not state.allows(blank * 2)


@pytest.mark.parametrize(
    "expression", ["[0-9]{3}-[a-f]+", "(ja|nein)( wirklich)?", "[世界]{2,4}", "a/b\\.c"]
)
def test_an_answer_matches_its_expression_as_a_whole(
    tokenizer: Any, factory: ConstraintFactory, expression: str
) -> None:
    for seed in range(3):
        state = factory.build(Constraint(type="regex", value=expression), ends(tokenizer))
        assert re.fullmatch(expression, text_of(tokenizer, answer(tokenizer, state, seed)))


def test_an_answer_is_one_of_the_choices_and_each_can_be(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    choices = ["yes", "yes, of course", 'a "quoted" \\ one', "zwei\nZeilen", "世界", "1/2|3"]
    for choice in choices:
        state = factory.build(Constraint(type="choice", value=choices), ends(tokenizer))
        state.replay(encode(tokenizer, choice))
        assert state.accepting
    for seed in range(6):
        state = factory.build(Constraint(type="choice", value=choices), ends(tokenizer))
        assert text_of(tokenizer, answer(tokenizer, state, seed)) in choices


def test_an_answer_follows_its_grammar(tokenizer: Any, factory: ConstraintFactory) -> None:
    balanced = 'start: "(" start ")" | "x"'
    for seed in range(4):
        state = factory.build(Constraint(type="grammar", value=balanced), ends(tokenizer))
        text = text_of(tokenizer, answer(tokenizer, state, seed))
        depth = text.index("x")
        assert text == "(" * depth + "x" + ")" * depth


def test_a_grammar_of_llamacpp_is_read_too(tokenizer: Any, factory: ConstraintFactory) -> None:
    """GBNF, as `grammar` has it there, and EBNF as in SGLang."""
    gbnf = 'root ::= "a" middle # comment\nmiddle ::= [0-9]{2} | "(" middle ")"'
    for seed in range(4):
        state = factory.build(Constraint(type="grammar", value=gbnf), ends(tokenizer))
        text = text_of(tokenizer, answer(tokenizer, state, seed))
        assert re.fullmatch(r"a\(*[0-9]{2}\)*", text) and text.count("(") == text.count(")")


# --- the end of the answer ------------------------------------------------------------------------


def allowed(state: ConstraintState, width: int) -> set[int]:
    logits = torch.zeros(width)
    state.mask_logits_(logits)
    return set(torch.isfinite(logits).nonzero()[:, 0].tolist())


def test_the_end_is_allowed_exactly_where_the_grammar_accepts(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    """Both end tokens of a model that has two, at every step of many answers."""
    both = frozenset({tokenizer.eos_token_id, tokenizer.bos_token_id})
    expression, draw, seen = "(ab?c|d+)(ef)*", random.Random(0), []
    width = len(tokenizer) + PADDING
    for _ in range(25):
        state = factory.build(Constraint(type="regex", value=expression), both)
        ids: list[int] = []
        while len(ids) < 12:
            complete = re.fullmatch(expression, text_of(tokenizer, ids)) is not None
            now = allowed(state, width)
            assert now & both == (both if complete else set())
            assert state.accepting == complete
            assert max(now) < len(tokenizer)
            seen.append(complete)
            following = sorted(now - both)
            if not following:
                assert state.finished
                break
            ids.append(draw.choice(following))
            state.accept(ids[-1])
    assert 20 < sum(seen) < len(seen) - 20


def test_when_nothing_else_may_follow_only_the_end_may(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    state = factory.build(Constraint(type="choice", value=["no"]), ends(tokenizer))
    assert not state.finished
    state.replay(encode(tokenizer, "no"))
    assert state.finished
    width = len(tokenizer) + PADDING
    assert allowed(state, width) == ends(tokenizer)
    state.accept(tokenizer.eos_token_id)
    assert allowed(state, width) == ends(tokenizer)


def test_each_answer_has_its_own_ends_and_they_are_never_content(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    """A stop token ends the answer, so it may come only where the answer is complete; and an end
    token that does not belong to this answer is ignored."""
    (a,), (b,) = encode(tokenizer, "a"), encode(tokenizer, "b")
    eos, width = tokenizer.eos_token_id, len(tokenizer) + PADDING
    expression = Constraint(type="regex", value="[ab]+")
    usual, other = factory.build(expression, {eos}), factory.build(expression, {b})
    assert {a, b} <= allowed(usual, width)
    assert b not in allowed(other, width)
    for state in (usual, other):
        state.accept(a)
    assert {a, b, eos} <= allowed(usual, width)
    assert {a, b} <= allowed(other, width)
    assert eos not in allowed(other, width)
    usual.accept(b)
    other.accept(b)
    assert (usual.finished, other.finished) == (False, True)
    with pytest.raises(RequestError, match="the answer had ended"):
        other.accept(a)
    with pytest.raises(RequestError, match="not complete and cannot end"):
        factory.build(expression, {eos}).accept(eos)


@pytest.mark.parametrize("text", ["<tool>ab", "a<tool>b<tool>", "a<s>b", "<s>"])
@pytest.mark.parametrize("kind", ["choice", "regex", "grammar", "json_schema"])
def test_text_may_hold_what_is_an_added_token(
    tokenizer: Any, factory: ConstraintFactory, kind: str, text: str
) -> None:
    """An added token is text, and the text of a special one is spelled by other tokens."""
    said, value = (
        text,
        {
            "choice": [text],
            "regex": re.escape(text),
            "grammar": f"start: {json.dumps(text)}",
            "json_schema": {"const": text},
        }[kind],
    )
    if kind == "json_schema":
        said = json.dumps(text)
    state = factory.build(Constraint(type=kind, value=value), ends(tokenizer))  # type: ignore[arg-type]
    ids = answer(tokenizer, state, 1)
    assert text_of(tokenizer, ids) == said
    assert not set(ids) & token_table(tokenizer).special_ids


def test_several_answers_that_hold_added_tokens_run_at_once(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    states = [
        factory.build(Constraint(type="choice", value=[text]), ends(tokenizer))
        for text in ("<tool>one", "two<tool>")
    ]
    said: list[list[int]] = [[], []]
    while not all(state.finished for state in states):
        logits = torch.zeros(2, len(tokenizer))
        assert not mask_logits_(logits, [0, 1], states)
        for row, state in enumerate(states):
            if not state.finished:
                said[row].append(int(logits[row].argmax()))
                state.accept(said[row][-1])
    assert [text_of(tokenizer, ids) for ids in said] == ["<tool>one", "two<tool>"]


def test_a_grammar_names_an_added_token_by_its_text_or_its_id(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    lark = f'start: "<tool>" <tool> /<tool>/ <[{tool}]> // <tool>'
    state = factory.build(Constraint(type="grammar", value=lark), ends(tokenizer))
    assert answer(tokenizer, state, 0) == [tool] * 4


def test_a_stop_token_that_the_constraint_needs_is_the_requests_fault(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    data = token_table(tokenizer).bytes_of
    (a,) = encode(tokenizer, "a")
    stops = [i for i in range(len(tokenizer)) if data(i) == b"b"]
    params = Params(stop_token_ids=stops, seed=1)
    state = factory.build(Constraint(type="regex", value="ab"), ends(tokenizer).union(stops))
    row = SamplerRow(params, [1], eos_ids=ends(tokenizer), prior_ids=[a], constraint=state)
    (outcome,) = sampler(tokenizer).sample(RandomModel(tokenizer, 0).logits(1), [row])
    assert (outcome.ok, outcome.code) == (False, ErrorCode.INVALID_REQUEST)
    assert "stop_token_ids" in outcome.fault


def test_min_tokens_does_not_keep_a_finished_answer_from_ending(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    state = factory.build(Constraint(type="choice", value=["no"]), ends(tokenizer))
    assert text_of(tokenizer, answer(tokenizer, state, 0, min_tokens=100)) == "no"
    state = factory.build(Constraint(type="regex", value="a+"), ends(tokenizer))
    assert len(answer(tokenizer, state, 0, min_tokens=30)) >= 30


# --- batches and interruptions --------------------------------------------------------------------


def test_constrained_rows_behave_as_alone_and_do_not_affect_others(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    choose = sampler(tokenizer)
    constraints = [
        Constraint(type="json_schema", value=PERSON),
        None,
        Constraint(type="regex", value="[0-9]+"),
        Constraint(type="choice", value=["no"]),
        None,
    ]

    def rows() -> list[SamplerRow]:
        return [
            SamplerRow(
                Params(seed=n, top_p=0.9 if n % 2 else 1.0, logprobs=3),
                [1],
                eos_ids=ends(tokenizer),
                constraint=c and factory.build(c, ends(tokenizer)),
            )
            for n, c in enumerate(constraints)
        ]

    models = [RandomModel(tokenizer, n) for n in range(len(constraints))]
    company, alone = rows(), rows()
    for step in range(12):
        logits = torch.cat([model.logits(step) for model in models])
        together = choose.sample(logits.clone(), company)
        single = [choose.sample(logits[n : n + 1].clone(), [one])[0] for n, one in enumerate(alone)]
        assert together == single
        for one, other, outcome in zip(company, alone, together, strict=True):
            one.append(outcome.token_id)
            other.append(outcome.token_id)


def test_an_interrupted_answer_is_taken_up_anywhere(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    constraint = Constraint(type="json_schema", value=PERSON)
    ids = answer(tokenizer, factory.build(constraint, ends(tokenizer)), 3)
    model, choose = RandomModel(tokenizer, 3), sampler(tokenizer)
    for cut in range(len(ids) + 1):
        one = SamplerRow(
            Params(seed=3),
            [1],
            eos_ids=ends(tokenizer),
            prior_ids=ids[:cut],
            constraint=factory.build(constraint, ends(tokenizer)),
        )
        (outcome,) = choose.sample(model.logits(cut), [one])
        assert outcome.token_id == [*ids, tokenizer.eos_token_id][cut]


def test_the_text_of_a_constrained_answer_streams_as_the_json_it_is(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    state = factory.build(Constraint(type="json_schema", value=PERSON), ends(tokenizer))
    ids = answer(tokenizer, state, 5)
    stream = TextStream(tokenizer, Params())
    said = "".join(stream.add(token_id).text for token_id in ids) + stream.finish()
    assert json.loads(said) == json.loads(text_of(tokenizer, ids))


# --- faults ---------------------------------------------------------------------------------------


def test_a_grammar_that_the_model_cannot_spell_fails_its_own_row_only() -> None:
    tokenizer = tiny_tokenizers.byte_fallback()
    start = tokenizer.convert_tokens_to_ids("<0x00>")
    banned = Params(banned_token_ids=list(range(start, start + 256)), seed=1)
    factory = ConstraintFactory(tokenizer)
    spelt_in_bytes = factory.build(Constraint(type="regex", value="饕+"), ends(tokenizer))
    rows = [
        SamplerRow(Params(seed=1), [1], eos_ids=ends(tokenizer)),
        SamplerRow(banned, [1], eos_ids=ends(tokenizer), constraint=spelt_in_bytes),
    ]
    logits = RandomModel(tokenizer, 0).logits(0)
    outcomes = sampler(tokenizer).sample(logits.expand(2, -1), rows)
    assert [one.ok for one in outcomes] == [True, False]
    assert "exclude each other" in outcomes[1].fault
    assert outcomes[1].code == ErrorCode.INVALID_REQUEST


def test_a_grammar_that_has_no_next_token_says_so() -> None:
    tokenizer = tiny_tokenizers.letters()
    factory = ConstraintFactory(tokenizer)
    rows = [
        SamplerRow(
            Params(seed=1),
            [1],
            eos_ids=ends(tokenizer),
            constraint=factory.build(Constraint(type="regex", value=e), ends(tokenizer)),
        )
        for e in ("[ab]+", "[0-9]+", "b+")
    ]
    logits = RandomModel(tokenizer, 0).logits(0)
    outcomes = sampler(tokenizer).sample(logits.expand(3, -1), rows)
    assert [one.ok for one in outcomes] == [True, False, True]
    assert outcomes[1].fault == (
        "the constraint cannot be satisfied: no token of this model can come next"
    )
    assert outcomes[1].code == ErrorCode.INVALID_REQUEST


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Constraint(type="json_schema", value={"type": "nope"}), "Invalid type: nope"),
        (Constraint(type="json_schema", value={"not": {}}), "Unimplemented keys"),
        (Constraint(type="json_schema", value=[1]), "must be a schema"),
        (Constraint(type="json_schema", value={"enum": [b"x"]}), "bytes"),
        (Constraint(type="regex", value="(a"), "unclosed group"),
        (Constraint(type="regex", value=5), "must be a regular expression"),
        (Constraint(type="grammar", value="start: foo"), 'unknown name: "foo"'),
        (Constraint(type="grammar", value="root ::= foo"), "neither Lark nor GBNF"),
        (Constraint(type="grammar"), "must be a grammar in Lark or GBNF"),
        (Constraint(type="choice", value=[]), "must be a list of strings"),
        (Constraint(type="choice", value=["a", ""]), "none of them empty"),
    ],
)
def test_a_bad_constraint_is_refused_with_its_cause(constraint: Constraint, message: str) -> None:
    tokenizer = tiny_tokenizers.byte_level()
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        ConstraintFactory(tokenizer).build(constraint, ends(tokenizer))
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    assert f"constraint of type {constraint.type}" in str(caught.value)


def test_tokens_that_do_not_fit_are_refused_wherever_they_come_from(
    tokenizer: Any, factory: ConstraintFactory
) -> None:
    constraint, wrong = Constraint(type="regex", value="[0-9]+"), encode(tokenizer, "1x")

    def build() -> ConstraintState:
        return factory.build(constraint, ends(tokenizer))

    with pytest.raises(RequestError, match=r"cannot be resumed: its token .* offset 1") as caught:
        SamplerRow(Params(), [1], eos_ids=ends(tokenizer), prior_ids=wrong, constraint=build())
    assert caught.value.code == ErrorCode.INVALID_REQUEST
    forced = Params(forced_token_ids=wrong)
    with pytest.raises(RequestError, match="forced_token_ids do not fit the constraint"):
        SamplerRow(forced, [1], eos_ids=ends(tokenizer), constraint=build())
    fitting = Params(forced_token_ids=wrong[:1])
    SamplerRow(fitting, [1], eos_ids=ends(tokenizer), constraint=build())
    with pytest.raises(RequestError, match="does not fit the constraint") as caught:
        build().accept(wrong[1])
    assert caught.value.code == ErrorCode.ENGINE_ERROR


@pytest.fixture
def without_llguidance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    yield


@pytest.mark.usefixtures("without_llguidance")
def test_a_missing_extra_is_named() -> None:
    tokenizer = tiny_tokenizers.byte_level()
    with pytest.raises(RequestError, match=r"install tokenbus\[structured\] on the worker"):
        ConstraintFactory(tokenizer).build(Constraint(type="json_object"), ends(tokenizer))


def test_a_tokenizer_of_another_kind_is_named() -> None:
    tokenizer = tiny_tokenizers.word_piece()
    with pytest.raises(RequestError, match="llguidance does not read its tokenizer"):
        ConstraintFactory(tokenizer).build(Constraint(type="json_object"), ends(tokenizer))


def test_a_model_without_an_end_token_is_refused() -> None:
    with pytest.raises(RequestError, match="no end token"):
        ConstraintFactory(tiny_tokenizers.byte_level()).build(Constraint(type="json_object"), [])


def test_masks_are_unpacked_alike_on_the_cpu_and_on_accelerators() -> None:
    masks = torch.randint(-(1 << 31), 1 << 31, (3, 7), dtype=torch.int32)
    assert torch.equal(_spread(masks), _unpacked(masks, torch.device("cpu")))
    assert _spread(masks).shape == (3, 7 * 32)
