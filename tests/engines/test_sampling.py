"""Sampling: what transformers' processors mean, each row as if it were alone, and repeatable."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from broker.protocol.errors import RequestError
from broker.protocol.messages import Params
from worker.engines.common.sampling import (
    LOGPROB_FLOOR,
    Sampled,
    Sampler,
    SamplerRow,
    check_params,
    prompt_logprobs,
    uniform,
)

EOS = frozenset({0})


def bytes_of(token_id: int) -> bytes:
    return b"<%d>" % token_id


def sampler(vocab_size: int, banned_ids: Sequence[int] = ()) -> Sampler:
    return Sampler(vocab_size, banned_ids=banned_ids, token_bytes=bytes_of)


def row(params: Params, prompt: Sequence[int] = (1, 2), **options: Any) -> SamplerRow:
    return SamplerRow(params, prompt, eos_ids=EOS, **options)


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow], **options: Any) -> list[Sampled]:
    """The sampler overwrites what it is given; the tests want to use it again."""
    return sampler(logits.shape[1], **options).sample(logits.clone(), rows)


def random_logits(count: int, vocab_size: int, seed: int, *, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, vocab_size, generator=generator) * scale


def with_ties(logits: torch.Tensor) -> torch.Tensor:
    """As a model in half precision makes them: many tokens are exactly as likely as others."""
    return logits.to(torch.bfloat16).float()


def by_library(params: Params, prompt: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
    """The distribution [V] that `generate` would draw from."""
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([list(prompt)]), logits[None].clone()).softmax(-1)[0]


def chi_squared(
    drawn: Sequence[int], probabilities: torch.Tensor, equals: torch.Tensor | None = None
) -> float:
    """How likely at least so large a deviation is. Rare tokens are counted together.

    `equals` [V]: tokens with the same number are exactly as likely before the cuts and are counted
    together as well: which of them the library keeps hangs on its unstable sort.
    """
    counts = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)).double()
    probabilities = probabilities.double()
    if equals is not None:
        counts = torch.zeros_like(counts).index_add(0, equals, counts)
        probabilities = torch.zeros_like(counts).index_add(0, equals, probabilities)
    assert counts[probabilities == 0].sum() == 0, "a token outside the library's support"
    order = probabilities.argsort(descending=True)
    counts, expected = counts[order], probabilities[order] * len(drawn)
    bins: list[list[float]] = [[0.0, 0.0]]
    for count, mean in zip(counts.tolist(), expected.tolist(), strict=True):
        if bins[-1][1] >= 8:
            bins.append([0.0, 0.0])
        bins[-1][0] += count
        bins[-1][1] += mean
    if len(bins) > 1 and bins[-1][1] < 8:
        count, mean = bins.pop()
        bins[-1][0] += count
        bins[-1][1] += mean
    if len(bins) == 1:
        return 1.0
    statistic = sum((count - mean) ** 2 / mean for count, mean in bins)
    return torch.special.gammaincc(
        torch.tensor((len(bins) - 1) / 2, dtype=torch.double), torch.tensor(statistic / 2)
    ).item()


def random_cuts(draw: random.Random) -> dict[str, Any]:
    """Half of the rows draw from the top of the ranking, half from the whole vocabulary."""
    ranked = draw.random() < 0.5
    return {
        "temperature": draw.choice([0.3, 0.7, 1.0, 1.0, 1.8]),
        "top_k": draw.choice([0, 2, 5, 40] if ranked else [0, 10**6]),
        "top_p": draw.choice([1.0, 0.95, 0.6, 0.05] if ranked else [1.0]),
        "min_p": draw.choice([0.0, 0.0, 0.02, 0.3]),
        "repetition_penalty": draw.choice([1.0, 1.0, 1.3, 0.8]),
    }


# --- the random number ----------------------------------------------------------------------------


def test_the_random_number_of_a_token_never_changes() -> None:
    """Workers of different versions continue each other's streams: these values are for ever."""
    assert uniform(0, 0) == 0.0564663990004608
    assert uniform(42, 7) == 0.8614033402518924
    assert uniform((1 << 63) - 1, 10**9) == 0.9756637627194488


def test_random_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for numbers in (
        [uniform(seed, 3) for seed in range(4000)],
        [uniform(3, position) for position in range(4000)],
    ):
        assert all(0.0 < u < 1.0 for u in numbers)
        drawn = [int(u * 50) for u in numbers]
        assert chi_squared(drawn, torch.full((50,), 1 / 50)) > 1e-3


# --- the distribution -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(24))
def test_the_distribution_is_that_of_the_librarys_processors(seed: int) -> None:
    draw = random.Random(seed)
    cuts = random_cuts(draw)
    vocab_size, count = draw.choice([(7, 1500), (300, 3000), (1500, 3000)])
    logits = random_logits(1, vocab_size, seed, scale=draw.choice([0.5, 3.0]))
    if draw.random() < 0.4:
        logits = with_ties(logits)
    prompt = [draw.randrange(vocab_size) for _ in range(10)]
    rows = [row(Params(seed=n, **cuts), prompt) for n in range(count)]
    drawn = []
    for start in range(0, count, 250):
        part = rows[start : start + 250]
        drawn += [one.token_id for one in sample(logits.expand(len(part), -1), part)]
    penalty = Params(repetition_penalty=cuts["repetition_penalty"])
    _, equals = by_library(penalty, prompt, logits[0]).unique(return_inverse=True)
    assert chi_squared(drawn, by_library(Params(**cuts), prompt, logits[0]), equals) > 1e-4


def test_the_test_of_distributions_would_notice_a_wrong_one() -> None:
    logits = random_logits(1, 300, 0)
    rows = [row(Params(seed=n, temperature=1.1)) for n in range(3000)]
    drawn = [one.token_id for one in sample(logits.expand(3000, -1), rows)]
    assert chi_squared(drawn, by_library(Params(temperature=1.1), [1], logits[0])) > 1e-4
    assert chi_squared(drawn, by_library(Params(temperature=1.0), [1], logits[0])) < 1e-4


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("top_k", [0, 30, 3000])
def test_every_token_that_the_library_keeps_can_be_drawn_and_no_other(
    top_p: float, top_k: int
) -> None:
    vocab_size = 4000
    for logits in (random_logits(1, vocab_size, 5), with_ties(random_logits(1, vocab_size, 6))):
        kept = by_library(Params(top_p=top_p, top_k=top_k), [1], logits[0])
        rows = [row(Params(top_p=top_p, top_k=top_k, seed=n)) for n in range(1200)]
        drawn = {one.token_id for one in sample(logits.expand(len(rows), -1), rows)}
        lowest = logits[0, kept > 0].min()
        certain = (kept > 12 / len(rows)) & (logits[0] > lowest)  # of equals, the library's own few
        assert logits[0, list(drawn)].min() >= lowest
        assert drawn >= set(certain.nonzero()[:, 0].tolist())
        assert len(drawn) <= (kept > 0).sum() + 1  # the sum may be rounded across the edge


def test_of_equally_likely_tokens_at_an_edge_the_first_stay() -> None:
    logits = torch.zeros(1, 5000)
    logits[0, [4, 40, 400]] = 3.0
    rows = [row(Params(seed=n, top_p=1e-6)) for n in range(50)]
    assert {one.token_id for one in sample(logits.expand(50, -1), rows)} == {4}
    logits = torch.zeros(1, 5000)
    rows = [row(Params(seed=n, top_p=0.002)) for n in range(400)]
    assert {one.token_id for one in sample(logits.expand(400, -1), rows)} == set(range(10))


def test_greedy_takes_the_likeliest_token_whatever_else_is_set() -> None:
    logits = random_logits(6, 50, 1)
    greedy = [Params(temperature=0, top_p=0.1, top_k=9, min_p=0.5, seed=n) for n in range(3)]
    rows = [row(params) for params in [*greedy, *[Params(top_k=1, seed=n) for n in range(3)]]]
    assert [one.token_id for one in sample(logits, rows)] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 1e-300])
def test_a_very_low_temperature_is_greedy_and_not_an_overflow(temperature: float) -> None:
    logits = random_logits(4, 50, 2, scale=1e4)
    chosen = [Params(temperature=temperature, seed=n, top_p=0.9 if n % 2 else 1) for n in range(4)]
    rows = [row(params) for params in chosen]
    assert [one.token_id for one in sample(logits, rows)] == logits.argmax(-1).tolist()


def test_sampling_leaves_torchs_random_state_alone() -> None:
    before = torch.get_rng_state()
    sample(random_logits(2, 50, 3), [row(Params(seed=1)), row(Params(seed=2, top_p=0.5))])
    assert torch.equal(torch.get_rng_state(), before)


# --- penalties, bias, bans ------------------------------------------------------------------------


def distribution(outcome: Sampled) -> dict[int, float]:
    """Log probabilities by token id; complete where the vocabulary is as small as the list."""
    assert outcome.logprob is not None
    return {top.token_id: top.logprob for top in outcome.logprob.top}


def test_repetition_penalty_is_the_librarys_over_prompt_and_answer() -> None:
    vocab_size, prompt, answer = 20, [3, 3, 5, 7, 19], [5, 11, 11]
    logits = random_logits(1, vocab_size, 4)
    for penalty in (0.5, 1.2, 3.0):
        params = Params(repetition_penalty=penalty, temperature=0, logprobs=20)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.tensor([prompt + answer]), logits.clone()
        ).log_softmax(-1)[0]
        (outcome,) = sample(logits, [row(params, prompt, prior_ids=answer)])
        assert outcome.token_id == expected.argmax()
        assert distribution(outcome) == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-5)


def test_presence_and_frequency_penalty_are_openais_over_the_answer_alone() -> None:
    vocab_size, prompt, answer = 20, [3, 3, 5], [5, 11, 11, 11]
    logits = random_logits(1, vocab_size, 5)
    params = Params(presence_penalty=0.7, frequency_penalty=-0.2, temperature=0, logprobs=20)
    expected = logits[0].clone()
    expected[5] -= 0.7 - 0.2
    expected[11] -= 0.7 - 3 * 0.2
    (outcome,) = sample(logits, [row(params, prompt, prior_ids=answer)])
    expected = expected.log_softmax(-1)
    assert distribution(outcome) == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-5)


def test_tokens_appended_count_like_tokens_known_from_the_start() -> None:
    draw = random.Random(6)
    params = Params(
        repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2, logprobs=20, seed=9
    )
    prompt, answer = [1, 2, 3], [draw.randrange(150) for _ in range(400)]
    logits = random_logits(1, 150, 7)
    grown = row(params, prompt)
    for token_id in answer:
        grown.append(token_id)
    assert grown.position == 400
    assert sample(logits, [grown]) == sample(logits, [row(params, prompt, prior_ids=answer)])


def test_bias_is_added_and_banned_tokens_never_come() -> None:
    logits = torch.zeros(1, 6)
    params = Params(
        logit_bias=[(2, 3.0), (3, -2.0)], banned_token_ids=[4], temperature=0, logprobs=6
    )
    (outcome,) = sample(logits, [row(params)], banned_ids=[5])
    expected = torch.tensor([0.0, 0, 3, -2]).log_softmax(-1)
    assert outcome.token_id == 2
    assert distribution(outcome) == pytest.approx(dict(enumerate(expected.tolist())), abs=1e-6)


def test_nothing_ends_the_answer_before_min_tokens() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 0] = 9.0  # EOS
    logits[0, 3] = 8.0  # a stop token
    one = row(Params(min_tokens=2, stop_token_ids=[3], temperature=0))
    chosen = []
    for _ in range(3):
        (outcome,) = sample(logits, [one])
        chosen.append(outcome.token_id)
        one.append(outcome.token_id)
    assert chosen == [1, 1, 0]


def test_an_answer_begins_with_its_forced_tokens() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 1] = 5.0
    params = Params(forced_token_ids=[4, 2], banned_token_ids=[2], temperature=0, logprobs=0)
    for prior in ([], [4], [4, 2]):
        one = row(params, prior_ids=prior)
        outcomes = []
        while one.position < 3:
            (outcome,) = sample(logits, [one])
            outcomes.append(outcome)
            one.append(outcome.token_id)
        assert [*prior, *(outcome.token_id for outcome in outcomes)] == [4, 2, 1]
        said = {outcome.token_id: outcome.logprob for outcome in outcomes}
        if 2 in said:  # it was forced against a ban
            assert said[2] is not None
            assert said[2].logprob == LOGPROB_FLOOR


def test_ids_that_the_output_does_not_have_do_no_harm_in_a_prompt() -> None:
    """Placeholders of images may lie beyond the vocabulary, or below zero."""
    logits = random_logits(2, 10, 8)
    params = Params(repetition_penalty=1.5, temperature=0, logprobs=10)
    rows = [row(params, [3, 4]), row(params, [-200, 3, 10, 32_000, 4])]
    outcomes = sample(logits[:1].expand(2, -1), rows)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "params",
    [
        Params(logit_bias=[(100, 1.0)]),
        Params(banned_token_ids=[3, 100]),
        Params(forced_token_ids=[101]),
        Params(stop_token_ids=[100]),
    ],
)
def test_ids_that_the_model_does_not_have_are_refused_by_name(params: Params) -> None:
    with pytest.raises(RequestError, match=r"token 10., but this model's last token is 99"):
        check_params(params, 100)
    check_params(params, 102)


@pytest.mark.parametrize(
    ("utmost", "beyond", "words"),
    [
        ({"repetition_penalty": 1e-30}, {"repetition_penalty": 1e-40}, "penalty is 1e-40"),
        ({"logit_bias": [(5, 1e30)]}, {"logit_bias": [(5, 2e38)]}, "logit_bias"),
        ({"logit_bias": [(5, -1e30)]}, {"logit_bias": [(5, 1e308)]}, "logit_bias"),
    ],
)
def test_a_number_that_would_make_a_score_infinite_is_refused_by_name(
    utmost: dict[str, Any], beyond: dict[str, Any], words: str
) -> None:
    """A bias by the protocol's own bounds, a penalty by the engine."""
    params = msgspec.convert(utmost, Params)
    check_params(params, 100)
    (outcome,) = sample(50.0 * torch.ones(1, 100), [row(params)])
    assert outcome.ok, outcome.fault
    with pytest.raises((RequestError, msgspec.ValidationError), match=words):
        check_params(msgspec.convert(beyond, Params), 100)


# --- alone and in company -------------------------------------------------------------------------


def random_row(draw: random.Random, vocab_size: int) -> SamplerRow:
    def ids(most: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(draw.randint(0, most))]

    params = Params(
        **{
            **random_cuts(draw),
            "temperature": draw.choice([0.0, 0.2, 0.8, 1.0, 1.0, 3.0]),
            "presence_penalty": draw.choice([0.0, 0.0, 0.6]),
            "frequency_penalty": draw.choice([0.0, 0.0, 0.2]),
            "seed": draw.randrange(1 << 63),
            "logit_bias": [(i, draw.uniform(-3, 3)) for i in ids(4)],
            "banned_token_ids": ids(4),
            "forced_token_ids": ids(2) if draw.random() < 0.2 else [],
            "min_tokens": draw.choice([0, 4]),
            "logprobs": draw.choice([None, None, 0, 3, 20]),
        }
    )
    return row(params, ids(30), prior_ids=ids(6))


def test_a_row_gives_the_same_alone_and_in_any_company() -> None:
    draw = random.Random(10)
    for trial in range(12):
        vocab_size = draw.choice([40, 1500, 5000])
        rows = [random_row(draw, vocab_size) for _ in range(draw.randint(2, 24))]
        logits = random_logits(len(rows), vocab_size, trial, scale=draw.choice([0.3, 1.0, 4.0]))
        if draw.random() < 0.5:
            logits = with_ties(logits)
        alone = [sample(logits[n : n + 1], [one])[0] for n, one in enumerate(rows)]
        assert sample(logits, rows) == alone
        order = draw.sample(range(len(rows)), len(rows))
        assert sample(logits[order], [rows[n] for n in order]) == [alone[n] for n in order]


def test_a_large_vocabulary_and_several_threads_change_nothing() -> None:
    """A long row that stands alone is summed by several threads, in another order than in a
    batch."""
    vocab_size = 100_000
    logits = random_logits(4, vocab_size, 11)
    threads = torch.get_num_threads()
    try:
        for position in range(6):
            rows = [
                row(Params(seed=position, logprobs=2)),
                row(Params(seed=position, top_p=0.9, logprobs=2)),
                row(Params(seed=position, top_p=0.9, temperature=4.0)),
                row(Params(seed=position, min_p=0.001)),
            ]
            torch.set_num_threads(1)
            together = sample(logits, rows)
            torch.set_num_threads(2)
            assert sample(logits, rows) == together
            alone = [sample(logits[n : n + 1], [one])[0] for n, one in enumerate(rows)]
            assert alone == together
    finally:
        torch.set_num_threads(threads)


def test_looking_at_more_candidates_does_not_change_the_outcome() -> None:
    """A row with a large top_k makes the whole batch look further down the ranking."""
    logits = with_ties(random_logits(40, 6000, 12))
    rows = [
        row(Params(seed=n, top_p=[0.2, 0.9, 0.97, 1.0][n % 4], top_k=[0, 40, 1000][n % 3]))
        for n in range(40)
    ]
    few = sample(logits, rows)
    wide = row(Params(seed=1, top_k=4000))
    assert sample(torch.cat([logits, logits[:1]]), [*rows, wide])[:40] == few


def test_an_interrupted_answer_goes_on_with_the_same_tokens() -> None:
    vocab_size, length = 60, 25
    table = random_logits(vocab_size, vocab_size, 13, scale=1.5)  # a model that sees one token
    params = Params(
        seed=77, top_p=0.9, repetition_penalty=1.2, frequency_penalty=0.3, min_tokens=length
    )

    def go_on(prior: list[int]) -> list[int]:
        one, answer = row(params, [1, 2], prior_ids=prior), list(prior)
        while one.position < length:
            (outcome,) = sample(table[answer[-1] if answer else 2][None], [one])
            answer.append(outcome.token_id)
            one.append(outcome.token_id)
        return answer

    whole = go_on([])
    assert len(set(whole)) > 10
    assert all(go_on(whole[:cut]) == whole for cut in range(length))


# --- faults and types -----------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_fail_their_own_row_only(poison: float) -> None:
    logits = random_logits(5, 2000, 14)
    rows = [
        row(Params(temperature=0, logprobs=3)),
        row(Params(seed=1, logprobs=3)),
        row(Params(seed=2, top_p=0.9, min_p=0.1)),
        row(Params(seed=3, top_k=20)),
        row(Params(seed=4, repetition_penalty=1.2)),
    ]
    healthy = sample(logits, rows)
    for broken in range(5):
        spoilt = logits.clone()
        spoilt[broken, 17] = poison
        outcomes = sample(spoilt, rows)
        assert not outcomes[broken].ok
        assert "not numbers" in outcomes[broken].fault
        spoilt[broken] = poison
        assert not sample(spoilt, rows)[broken].ok
        del outcomes[broken]
        assert outcomes == [one for n, one in enumerate(healthy) if n != broken]


def test_a_row_with_no_token_left_fails_alone_and_says_why() -> None:
    logits = random_logits(3, 4, 15)
    rows = [
        row(Params(seed=1)),
        row(Params(seed=1, banned_token_ids=[0, 1, 2, 3], top_p=0.9)),
        row(Params(seed=1)),
    ]
    outcomes = sample(logits, rows)
    assert [one.ok for one in outcomes] == [True, False, True]
    assert "no token is allowed" in outcomes[1].fault


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_float_type_and_layout_are_taken(dtype: torch.dtype) -> None:
    logits = random_logits(3, 500, 16).to(dtype)
    rows = [row(Params(seed=n, top_p=0.9, logprobs=1, logit_bias=[(n, 1.0)])) for n in range(3)]
    expected = sample(logits.float(), rows)
    assert sample(logits, rows) == expected
    strided = torch.stack([logits, logits], dim=1)[:, 1]
    assert not strided.is_contiguous()
    assert sampler(500).sample(strided, rows) == expected


def test_several_answers_may_share_the_logits_of_one_prompt() -> None:
    logits = random_logits(1, 500, 17)
    rows = [row(Params(seed=n, logit_bias=[(n, 50.0)], temperature=0)) for n in range(3)]
    outcomes = sampler(500).sample(logits.expand(3, -1), rows)
    assert [one.token_id for one in outcomes] == [0, 1, 2]


def test_no_rows_are_no_work() -> None:
    assert sampler(10).sample(torch.empty(0, 10), []) == []


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(2, 9\) for 1 rows and a vocabulary of 10"):
        sampler(10).sample(torch.zeros(2, 9), [row(Params())])


# --- log probabilities ----------------------------------------------------------------------------


def test_logprobs_are_of_the_distribution_before_temperature_and_cuts() -> None:
    logits = random_logits(1, 800, 18)
    expected = logits.log_softmax(-1)[0]
    params = Params(temperature=0.3, top_k=3, top_p=0.5, seed=3, logprobs=5)
    (outcome,) = sample(logits, [row(params)])
    assert outcome.logprob is not None
    assert outcome.logprob.logprob == pytest.approx(expected[outcome.token_id].item(), abs=1e-5)
    assert outcome.logprob.token == bytes_of(outcome.token_id)
    best = expected.topk(5)
    assert [top.token_id for top in outcome.logprob.top] == best.indices.tolist()
    assert [top.logprob for top in outcome.logprob.top] == pytest.approx(
        best.values.tolist(), abs=1e-5
    )
    assert [top.token for top in outcome.logprob.top] == [
        bytes_of(i) for i in best.indices.tolist()
    ]


def test_each_row_gets_as_many_likeliest_tokens_as_it_asked_for() -> None:
    logits = random_logits(4, 100, 19)
    outcomes = sample(logits, [row(Params(logprobs=count)) for count in (None, 0, 2, 20)])
    assert outcomes[0].logprob is None
    assert [len(one.logprob.top) for one in outcomes if one.logprob] == [0, 2, 20]


def test_tokens_that_cannot_come_are_not_among_the_likeliest() -> None:
    params = Params(logprobs=20, banned_token_ids=[1, 2])
    (outcome,) = sample(torch.zeros(1, 5), [row(params)])
    assert sorted(distribution(outcome)) == [0, 3, 4]


def test_prompt_logprobs_are_the_models_own() -> None:
    logits = random_logits(6, 90, 20)
    ids = [5, 3, 3, 80, 0, 1]
    expected = logits.log_softmax(-1)
    facts = prompt_logprobs(logits.clone(), ids, 4, bytes_of)
    assert [one.token for one in facts] == [bytes_of(i) for i in ids]
    assert [one.logprob for one in facts] == pytest.approx(
        [expected[n, i].item() for n, i in enumerate(ids)], abs=1e-5
    )
    assert [[top.token_id for top in one.top] for one in facts] == expected.topk(4).indices.tolist()
    assert [one.top for one in prompt_logprobs(logits, ids, 0, bytes_of)] == [[]] * 6
