"""For every architecture: requests that join and leave at random steps get, each of them, what
plain greedy `generate()` writes for it alone."""

from __future__ import annotations

import random

import pytest
import torch

from tests.engines import tiny
from tests.engines.architectures import ALONE, BATCHED, text_model


def _agree(model: torch.nn.Module, *, scheduler: str, jobs: int = 6) -> None:
    engine = tiny.serve(model, slots=4)
    try:
        served = engine.capabilities.models[0].details["scheduler"]
        assert served.startswith(scheduler), served
        prompts = tiny.prompts(jobs, low=3, high=40, seed=5)
        lengths = [random.Random(index).randint(4, 14) for index in range(jobs)]
        wanted = [
            tiny.generated(model, {"input_ids": torch.tensor([ids])}, length, ())
            for ids, length in zip(prompts, lengths, strict=True)
        ]
        answers = tiny.run(
            engine,
            [
                tiny.ids_job(ids, max_tokens=length)
                for ids, length in zip(prompts, lengths, strict=True)
            ],
            every=[0, 0, 2, 3, 1, 4],
        )
        assert [answer.token_ids for answer in answers] == wanted
        # A model that always says the same would prove nothing.
        assert len({token for answer in wanted for token in answer}) > 6
    finally:
        engine.close()


@pytest.mark.parametrize("name", BATCHED)
def test_a_batch_writes_what_generate_writes(name: str) -> None:
    _agree(text_model(name), scheduler="slots")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_batch_with_eager_attention_writes_what_generate_writes(name: str) -> None:
    _agree(text_model(name, attention="eager"), scheduler="slots")


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_no_slot_can_hold_takes_turns_and_writes_the_same(name: str) -> None:
    _agree(text_model(name), scheduler="generate", jobs=4)
