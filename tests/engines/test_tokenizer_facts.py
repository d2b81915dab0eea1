"""The facts about a tokenizer: only those that it states, none about the machine, and the tokens
for filling in a middle only if its vocabulary has all three."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engines import tiny
from worker.engines.common.tokenizer_facts import infill_tokens, tokenizer_facts


def with_tokens(*names: str) -> Any:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(list(names), special_tokens=True)
    return tokenizer


def test_a_tokenizer_tells_its_class_tokens_and_template() -> None:
    tokenizer = with_tokens("<extra>")
    tokenizer.model_max_length = 10**30
    told: dict[str, Any] = tokenizer_facts(
        SimpleNamespace(tokenizer=tokenizer, processor=None)  # type: ignore[arg-type]
    )
    assert told["tokenizer_class"] == type(tokenizer).__name__
    assert told["eos_token"] == tokenizer.eos_token
    assert told["chat_template"] == tokenizer.chat_template
    assert "model_max_length" not in told, "it has none"
    assert "<extra>" in told["added_tokens_decoder"].values()
    assert not {"name_or_path", "vocab_file"} & set(told)


@pytest.mark.parametrize(
    "names",
    [
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|file_sep|>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
def test_the_marks_of_each_family_are_found(names: tuple[str, ...]) -> None:
    tokenizer = with_tokens(*names)
    found = infill_tokens(tokenizer)
    assert found.pop("begins") == []
    assert [tokenizer.convert_ids_to_tokens(id_) for id_ in found.values()] == list(names)
    assert list(found)[:3] == ["prefix", "suffix", "middle"]

    class Own:
        """A tokenizer that is not transformers', as that of a GGUF file."""

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            known = tokenizer.get_vocab()
            if add_special_tokens:
                return {"input_ids": [7]}
            return {"input_ids": [known[text]] if text in names else [1, 2]}

    assert infill_tokens(Own()) == {**found, "begins": [7]}


def test_a_model_without_all_of_them_has_none() -> None:
    assert infill_tokens(tiny.tokenizer()) == {}
    assert infill_tokens(with_tokens("<|fim_prefix|>", "<|fim_suffix|>")) == {}
