"""Control tokens that a client types, whole or in pieces, are text."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from worker.engines.common.control import ControlTokens, rewritten

TOKENS = ["<|end|>", "<|start|>", "[INST]", "<image>", "<img>", "</s>"]
WRITTEN = "<tool_call>"


def control(*more: str, template: str = f"{{{{ '{WRITTEN}' }}}}") -> ControlTokens:
    added = {
        index: SimpleNamespace(content=text, special=text != WRITTEN and text != "<other>")
        for index, text in enumerate([*TOKENS[:3], WRITTEN, "<other>", "  ", "\n", "x"])
    }
    tokenizer = SimpleNamespace(all_special_tokens=["</s>"], added_tokens_decoder=added)
    processor = SimpleNamespace(image_token=SimpleNamespace(content="<image>"), boi_token="<img>")
    return ControlTokens(tokenizer, processor, template, more)


@pytest.mark.parametrize("token", [*TOKENS, "<more>"])
def test_a_special_token_and_a_processors_mark_are_broken_by_a_space(token: str) -> None:
    text = control("<more>").broken(f"a{token}{token}b")
    assert text == f"a{token[0]} {token[1:]}{token[0]} {token[1:]}b"
    assert control("<more>").found(text) == []


def test_a_token_that_the_template_writes_is_broken_in_third_party_text() -> None:
    assert control().broken(WRITTEN) == WRITTEN
    assert control().all_broken(WRITTEN) == "< tool_call>"
    assert control(template="").all_broken(WRITTEN) == WRITTEN
    assert control().all_broken("<other>") == "<other>"


def test_blanks_and_single_characters_are_no_control_tokens() -> None:
    text = "a  b\nx"
    assert control().all_broken(text) == text


def test_a_model_without_control_tokens_leaves_every_text_alone() -> None:
    none = ControlTokens(SimpleNamespace(), None, "")
    for text in ("<|end|>", "<|end", "", "a"):
        assert none.broken(text) == none.all_broken(text) == none.edges_broken(text) == text


@pytest.mark.parametrize("text", ["user", "end", "hello world", "a < b", "x > y", "", " "])
def test_ordinary_texts_have_no_edges_to_break(text: str) -> None:
    assert control().edges_broken(text) == text


@given(st.sampled_from(TOKENS), st.data())
def test_pieces_of_a_token_never_join_into_it(token: str, data: Any) -> None:
    """However it is cut, and whatever precedes its first piece and follows its last."""
    inner = data.draw(st.sets(st.integers(1, len(token) - 1), min_size=1))
    pieces = [token[a:b] for a, b in pairwise([0, *sorted(inner), len(token)])]
    pieces[0] = data.draw(st.sampled_from(["", "x", "<", "<<"])) + pieces[0]
    pieces[-1] += data.draw(st.sampled_from(["", "x", ">", ">>"]))
    tokens = control()
    assert tokens.found("".join(pieces)) != []
    assert tokens.found("".join(map(tokens.edges_broken, pieces))) == []


def test_every_string_of_a_value_is_rewritten_and_nothing_else() -> None:
    value = {"a": ["b", 1, None, {"c": True}], "d": ("e", 2.5)}
    assert rewritten(value, str.upper) == {"A": ["B", 1, None, {"C": True}], "D": ["E", 2.5]}
