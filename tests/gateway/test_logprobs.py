"""Logprobs of completions: no candidate is lost, and offsets follow the text."""

from __future__ import annotations

from broker.protocol.messages import TokenLogprob, TopLogprob
from client.core.events import Prompt
from client.gateway.openai.answers import TextChoice
from client.gateway.openai.generation import Delta, Prompted
from client.gateway.openai.logprobs import Places, text_logprobs


def token(
    data: bytes, logprob: float = -1.0, *top: tuple[int, float, bytes], place: int | None = None
) -> TokenLogprob:
    return TokenLogprob(logprob, data, [TopLogprob(*one) for one in top], place)


def test_parts_of_characters_have_distinct_names() -> None:
    half = token(b"\xc3", -0.1, (7, -0.1, b"\xc3"), (8, -2.0, b"\xc4"), (9, -3.0, b"a"))
    told = text_logprobs([half])
    assert told["tokens"] == ["bytes:\\xc3"]
    assert told["top_logprobs"] == [{"bytes:\\xc3": -0.1, "bytes:\\xc4": -2.0, "a": -3.0}]


def test_tokens_of_the_same_text_are_all_listed() -> None:
    """The chosen token gets the plain name; if it is not among the top ones, it is added."""
    likeliest = ((1, -0.5, b"a"), (2, -1.5, b"a"), (3, -2.5, b"b"))
    assert text_logprobs([token(b"a", -1.5, *likeliest)])["top_logprobs"] == [
        {"token_id:1": -0.5, "a": -1.5, "b": -2.5}
    ]
    assert text_logprobs([token(b"a", -0.5, *likeliest)])["top_logprobs"] == [
        {"a": -0.5, "token_id:2": -1.5, "b": -2.5}
    ]
    assert text_logprobs([token(b"c", -9.0, *likeliest)])["top_logprobs"] == [
        {"a": -0.5, "token_id:2": -1.5, "b": -2.5, "c": -9.0}
    ]


def test_the_chosen_token_is_listed_first_and_alone_if_there_are_no_alternatives() -> None:
    assert text_logprobs([token(b"a")])["top_logprobs"] == [{"a": -1.0}]
    first = TokenLogprob(None, b"a", [], None)
    assert text_logprobs([first])["top_logprobs"] == [None], "it has no predecessor"
    [told] = text_logprobs([token(b"c", -9.0, (1, -0.5, b"a"))])["top_logprobs"]
    assert list(told) == ["c", "a"]


def test_a_split_character_has_one_offset() -> None:
    data = [b"x", b"\xe4\xb8", b"\x96", b"y"]
    places = Places()
    placed = places.of([token(part) for part in data[:2]]) + places.of(
        [token(part) for part in data[2:]]
    )
    assert text_logprobs(placed)["text_offset"] == [0, 1, 1, 2]


def test_a_workers_offsets_are_used_after_an_echoed_prompt() -> None:
    """With a space that the tokenizer drops, and a special token that is not shown."""
    choice = TextChoice()
    prompt = Prompt(
        b"r" * 16, 0, 0, [1, 2], "one two", [token(b" one", place=0), token(b" two", place=3)]
    )
    choice.take(Prompted(0, prompt))
    choice.take(Delta(0, " three", 1, [token(b" three", place=0)]))
    choice.take(Delta(0, "!", 2, [token(b"<s>", place=6), token(b"!", place=6)]))
    assert choice.text == "one two three!"
    assert text_logprobs(choice.logprobs)["text_offset"] == [0, 3, 7, 13, 13]


def test_without_a_workers_offsets_they_come_from_the_bytes() -> None:
    words = [b"ab", b" c", "é".encode()]
    placed = Places(10).of([token(word) for word in words])
    assert [one.place for one in placed] == [10, 12, 14]
