"""The text of an answer: whole characters, exact stops, the same after any interruption."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from broker.protocol.messages import Params
from tests.engines import tiny_tokenizers
from tests.engines.tiny_tokenizers import EOS, MULTILINGUAL
from worker.engines.common.text import (
    Detokenizer,
    StopBuffer,
    TextStream,
    places,
    token_table,
)

KINDS = {
    "byte level": lambda: tiny_tokenizers.byte_level(330),
    "byte fallback": lambda: tiny_tokenizers.byte_fallback(),
    "metaspace": lambda: tiny_tokenizers.metaspace(),
    "word piece": lambda: tiny_tokenizers.word_piece(),
    "python": ByT5Tokenizer,
}
TEXTS = [
    *MULTILINGUAL.splitlines(),
    MULTILINGUAL,
    "   leading and   double  spaces ",
    "🤖🤖🤖",
    "e\u0301\u0301 한국어 👩‍👩‍👧‍👦",
    "x",
    "",
]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def decode(tokenizer: Any, ids: Sequence[int], *, skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: Sequence[int], *, skip: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*map(detokenizer.add, ids), detokenizer.flush()]


# --- detokenising ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_what_decode_says_and_hold_no_half_character(
    tokenizer: Any, text: str
) -> None:
    ids = encode(tokenizer, text)
    said = pieces(tokenizer, ids)
    assert "".join(said) == decode(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in said)


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_left_out_or_kept_as_asked(tokenizer: Any, skip: bool) -> None:
    ids = encode(tokenizer, "one two")
    end = tokenizer.eos_token_id
    ids = [end, *ids[:1], end, end, *ids[1:], end]
    assert "".join(pieces(tokenizer, ids, skip=skip)) == decode(tokenizer, ids, skip=skip)


def test_a_character_is_emitted_with_its_last_byte() -> None:
    """Tokens that end inside one character and begin inside another, one after the other."""
    data = [b"\xe4", b"\xb8\x96\xe7", b"\x95\x8c\xf0\x9f", b"\xa4", b"\x96!", b"\xc3", b"\xa9"]
    tokenizer = byte_tokenizer(data)
    assert pieces(tokenizer, range(len(data))) == ["", "世", "界", "", "🤖!", "", "é", ""]


def byte_tokenizer(data: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose tokens are exactly these."""
    stand_in = {
        token_table(tiny_tokenizers.byte_level()).bytes_of(i): token
        for token, i in tiny_tokenizers.byte_level().get_vocab().items()
        if len(token) == 1
    }
    vocab = {"".join(stand_in[bytes([o])] for o in token): n for n, token in enumerate(data)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_byte_level_bytes_that_are_no_text_are_shown_as_decode_shows_them() -> None:
    tokenizer = tiny_tokenizers.byte_level(330)
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(25)]
        assert "".join(pieces(tokenizer, ids)) == decode(tokenizer, ids)


def test_a_stray_byte_does_not_spoil_the_characters_around_it() -> None:
    tokenizer = tiny_tokenizers.byte_fallback()
    first, second = encode(tokenizer, "饕")[-3:], encode(tokenizer, "餮")[-3:]
    letter = tokenizer.convert_tokens_to_ids("A")
    assert "".join(pieces(tokenizer, [*first, letter, *second])) == "饕A餮"
    assert "".join(pieces(tokenizer, [*first, second[0], letter])) == "饕\ufffdA"
    assert "".join(pieces(tokenizer, [*second[:2], *first])) == "\ufffd\ufffd饕"


def test_an_unfinished_character_is_shown_by_flush(tokenizer: Any) -> None:
    ids = encode(tokenizer, "ab 🤖")[:-1]
    said = pieces(tokenizer, ids)
    assert "".join(said) == decode(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in said[:-1])


class CountingTokenizer(ByT5Tokenizer):
    """Notes the longest list of ids that it was asked to decode."""

    longest = 0

    def decode(self, token_ids: Any, **options: Any) -> Any:
        self.longest = max(self.longest, len(token_ids))
        return super().decode(token_ids, **options)


@pytest.mark.parametrize("stuff", ["word ", "\x80", EOS, "🤖"])
def test_work_per_token_does_not_grow_with_the_answer(stuff: str) -> None:
    tokenizer = CountingTokenizer()
    ids = [tokenizer.eos_token_id] if stuff == EOS else encode(tokenizer, stuff)
    if stuff == "\x80":
        ids = [ids[-1]]  # a byte that never makes a character
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    tokenizer.longest = 0
    for token_id in ids * 200:
        detokenizer.add(token_id)
    assert 0 < tokenizer.longest <= 10


def test_bytes_of_a_token_are_its_own() -> None:
    byte_level = token_table(tiny_tokenizers.byte_level(330))
    fallback = token_table(tiny_tokenizers.byte_fallback())
    ids = encode(tiny_tokenizers.byte_level(330), "naïve 🤖")
    assert b"".join(map(byte_level.bytes_of, ids)).decode() == "naïve 🤖"
    ids = encode(tiny_tokenizers.byte_fallback(), "naïve 🤖")
    assert b"".join(map(fallback.bytes_of, ids)).decode() == " naïve 🤖"
    assert byte_level.bytes_of(10**6) == b""


def test_bytes_stand_for_text_only_where_the_tokenizer_joins_tokens_so() -> None:
    exact = {kind: token_table(make()).exact for kind, make in KINDS.items()}
    assert exact == {
        "byte level": True,
        "byte fallback": True,
        "metaspace": False,
        "word piece": False,
        "python": False,
    }


# --- stop strings ---------------------------------------------------------------------------------


def expected_stop(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """By definition: what is complete first, and of those the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def expected_hold(text: str, stops: Sequence[str]) -> int:
    """Length of the longest ending of `text` that begins a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


def test_stops_are_cut_and_text_is_held_exactly_as_defined_however_the_text_is_split() -> None:
    draw = random.Random(2)
    found = 0
    for _ in range(3000):
        stops = [
            "".join(draw.choices("ab", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 3))
        ]
        stops = [stop + draw.choice(["", "c"]) for stop in stops]
        text = "".join(draw.choices("abc", weights=[4, 4, 1], k=draw.randint(0, 12)))
        kept, stop = expected_stop(text, stops)
        buffer, said, seen, got = StopBuffer(stops), "", 0, None
        while seen < len(text) and got is None:
            step = draw.randint(0, 3)
            piece, got = buffer.add(text[seen : seen + step])
            seen, said = min(seen + step, len(text)), said + piece
            if got is None:
                assert said == text[: seen - expected_hold(text[:seen], stops)]
        assert got == stop
        assert said + buffer.flush() == kept
        found += stop is not None
    assert 500 < found < 2500


@pytest.mark.parametrize(
    ("stops", "text", "kept", "stop"),
    [
        (["abc", "b"], "xabc", "xa", "b"),
        (["bc", "abc"], "xabcd", "x", "abc"),
        (["ab", "abc"], "abc", "", "ab"),
        (["###", "##-"], "a####-", "a", "###"),
        (["aab"], "aaaab", "aa", "aab"),
        (["世界"], "你好世世界", "你好世", "世界"),
        (["\n\n"], "\n", "\n", None),
        (["🤖"], "🤖", "", "🤖"),
    ],
)
def test_overlapping_stops(stops: list[str], text: str, kept: str, stop: str | None) -> None:
    buffer, said, got = StopBuffer(stops), "", None
    for character in text:
        piece, got = buffer.add(character)
        said += piece
        if got:
            break
    assert (said + buffer.flush(), got) == (kept, stop)


def test_a_stop_that_is_passed_over_stays_in_the_text_and_only_later_ones_count() -> None:
    buffer = StopBuffer(["b", "abc"])
    assert buffer.add("ab", may_stop=False) == ("", None)  # "ab" may still become "abc"
    assert buffer.add("x") == ("abx", None)
    assert buffer.add("b") == ("", "b")
    buffer = StopBuffer(["aa"])
    assert buffer.add("aaa", may_stop=False) == ("aa", None)
    assert buffer.add("a") == ("", "aa")


def test_a_hostile_stop_costs_no_more_than_its_text() -> None:
    """A thousand characters that nearly match at every place: quadratic work would take minutes."""
    stops = ["a" * 1000 + chr(98 + n) for n in range(16)]
    buffer = StopBuffer(stops)
    text = "a" * 200_000
    said = "".join(buffer.add(text[n : n + 4])[0] for n in range(0, len(text), 4))
    assert said == "a" * (len(text) - 1000)


# --- the stream of one answer ---------------------------------------------------------------------


def say(
    stream: TextStream, ids: Sequence[int], ending_token: int | None = None
) -> tuple[list[str], str | None]:
    """The text of each step, the end's last, and the stop."""
    said = []
    if stream.stopped_by is None:
        for token_id in ids:
            step = stream.add(token_id)
            said.append(step.text)
            if step.stopped_by is not None:
                break
    return [*said, stream.finish(ending_token)], stream.stopped_by


def test_a_stop_string_may_span_tokens(tokenizer: Any) -> None:
    ids = encode(tokenizer, "hello world stop here and more")
    text = decode(tokenizer, ids)
    said, stop = say(TextStream(tokenizer, Params(stop=["d stop h", "zzz"])), ids)
    assert stop == "d stop h"
    assert "".join(said) == text[: text.index("d stop h")]
    assert said[-1] == ""


def test_a_stop_string_may_come_first_of_all(tokenizer: Any) -> None:
    ids = encode(tokenizer, "hello world")
    said, stop = say(TextStream(tokenizer, Params(stop=["hello"])), ids)
    assert ("".join(said), stop) == ("", "hello")
    said, stop = say(TextStream(tokenizer, Params(stop=["hello"], include_stop=True)), ids)
    assert ("".join(said), stop) == ("hello", "hello")


def test_text_that_only_looked_like_a_stop_is_given_out_at_the_end(tokenizer: Any) -> None:
    ids = encode(tokenizer, "hello wor")
    said, stop = say(TextStream(tokenizer, Params(stop=["world"])), ids)
    assert stop is None
    assert said[-1] == "wor"
    assert "".join(said) == "hello wor"


def test_the_ending_token_stands_in_the_text_only_if_asked_for(tokenizer: Any) -> None:
    ids, end = encode(tokenizer, "bye"), tokenizer.eos_token_id
    hidden = Params(skip_special_tokens=False)
    shown = Params(skip_special_tokens=False, include_stop=True)
    skipped = Params(include_stop=True)
    assert "".join(say(TextStream(tokenizer, hidden), ids, end)[0]) == "bye"
    assert "".join(say(TextStream(tokenizer, skipped), ids, end)[0]) == "bye"
    text = "".join(say(TextStream(tokenizer, shown), ids, end)[0])
    assert text == decode(tokenizer, [*ids, end], skip=False) != "bye"


@pytest.mark.parametrize("text", TEXTS)
def test_the_place_of_a_token_is_where_its_text_begins(tokenizer: Any, text: str) -> None:
    """Spaces that a decoder drops, tokens that are skipped and parts of characters included."""
    special = min(token_table(tokenizer).special_ids)
    ids = encode(tokenizer, text)
    for one in range(len(ids), 0, -5):
        if not decode(tokenizer, ids[:one]).endswith("\ufffd"):
            ids.insert(one, special)
    stream = TextStream(tokenizer, Params())
    found, said = [], ""
    for token_id in ids:
        found.append(stream.place)
        said += stream.add(token_id).text
    said += stream.finish()
    for count, place in enumerate(found):
        before = decode(tokenizer, ids[:count])
        if not before.endswith("\ufffd"):
            assert place == len(before)
    assert said == decode(tokenizer, ids)
    for count, place in enumerate(places(tokenizer, ids)):
        before = decode(tokenizer, ids[:count], skip=False)
        if not before.endswith("\ufffd"):
            assert place == len(before)


def test_special_tokens_that_are_kept_stand_in_the_text(tokenizer: Any) -> None:
    table = token_table(tokenizer)
    special = min(table.special_ids)
    mark = decode(tokenizer, [special], skip=False)
    ids = [*encode(tokenizer, "hello"), special, *encode(tokenizer, "world")]
    assert table.special_texts([mark, "<other>", "hello"]) == [mark]
    kept, skipped = Params(keep_special=[mark, "<other>"]), Params()
    text = "".join(say(TextStream(tokenizer, kept), ids)[0])
    assert text == decode(tokenizer, ids, skip=False)
    assert mark in text
    assert "".join(say(TextStream(tokenizer, skipped), ids)[0]) == decode(tokenizer, ids)


def test_a_stop_string_counts_only_from_min_tokens_on(tokenizer: Any) -> None:
    ids = encode(tokenizer, "a b a b a b a b")
    for min_tokens in range(1, len(ids)):
        early = decode(tokenizer, ids[: min_tokens - 1])
        said, stop = say(TextStream(tokenizer, Params(stop=["b"], min_tokens=min_tokens)), ids)
        text = "".join(said)
        assert text.count("b") == early.count("b")
        assert text.startswith(early)
        assert stop == ("b" if text != decode(tokenizer, ids) else None)


def test_a_completion_goes_on_where_its_prompt_ended() -> None:
    for make in (tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback):
        tokenizer = make()
        whole = encode(tokenizer, "The dog jumps. Hello world")
        for cut in range(1, len(whole)):
            stream = TextStream(tokenizer, Params(), context_ids=whole[:cut])
            prompt = "".join(pieces(tokenizer, whole[:cut]))
            assert prompt + "".join(say(stream, whole[cut:])[0]) == "The dog jumps. Hello world"


def random_answer(tokenizer: Any, draw: random.Random) -> tuple[Params, list[int]]:
    """Any ids at all, broken characters and special tokens included, and stops that often hit."""
    ids = encode(tokenizer, draw.choice(TEXTS[:6]))[: draw.randint(4, 30)]
    for _ in range(draw.randint(0, 6)):
        ids.insert(draw.randrange(len(ids) + 1), draw.randrange(len(tokenizer)))
    text = decode(tokenizer, ids)
    stops = []
    for _ in range(draw.randint(0, 3)):
        start = draw.randrange(max(1, len(text)))
        stops.append(text[start : start + draw.randint(1, 6)] or "zz")
    stops = [stop + draw.choice(["", "", "~"]) for stop in stops]
    params = Params(
        stop=stops,
        include_stop=draw.random() < 0.3,
        skip_special_tokens=draw.random() < 0.7,
        min_tokens=draw.choice([0, 0, 5]),
    )
    return params, ids


def test_an_answer_cut_off_anywhere_goes_on_as_if_it_had_not_been(tokenizer: Any) -> None:
    draw = random.Random(3)
    ends: list[Callable[[], int | None]] = [lambda: None, lambda: tokenizer.eos_token_id]
    stopped = resumed = 0
    for _ in range(25):
        params, ids = random_answer(tokenizer, draw)
        end = draw.choice(ends)()
        said, stop = say(TextStream(tokenizer, params), ids, end)
        stopped += stop is not None
        for cut in range(len(said)):
            received = "".join(said[:cut])
            stream = TextStream(
                tokenizer, params, prior_ids=ids[:cut], prior_characters=len(received)
            )
            rest, stop_again = say(stream, ids[cut:], end)
            assert received + "".join(rest) == "".join(said)
            assert stop_again == stop
            resumed += 1
    assert stopped > 3
    assert resumed > 200


def test_text_that_was_lost_with_the_worker_is_sent_again(tokenizer: Any) -> None:
    ids = encode(tokenizer, "hello world and more")
    text = decode(tokenizer, ids)
    for received in range(len(text) + 1):
        stream = TextStream(tokenizer, Params(), prior_ids=ids[:5], prior_characters=received)
        assert text[:received] + "".join(say(stream, ids[5:])[0]) == text


def test_prior_tokens_that_reached_a_stop_end_the_answer_at_once(tokenizer: Any) -> None:
    ids = encode(tokenizer, "hello world")
    stream = TextStream(tokenizer, Params(stop=["wor"]), prior_ids=ids, prior_characters=3)
    assert stream.stopped_by == "wor"
    assert stream.finish() == "lo "
    assert TextStream(tokenizer, Params(stop=["wor"]), prior_ids=ids[:2]).stopped_by is None


def test_text_that_was_received_early_is_not_sent_twice(tokenizer: Any) -> None:
    """Another engine may have given out what this one would have held back."""
    ids = encode(tokenizer, "hello world and more")
    text = decode(tokenizer, ids)
    held = text.index("wor") + 3
    for cut in range(1, len(ids)):
        if decode(tokenizer, ids[:cut]) != text[:held]:
            continue
        params = Params(stop=["worse"])
        stream = TextStream(tokenizer, params, prior_ids=ids[:cut], prior_characters=held)
        assert text[:held] + "".join(say(stream, ids[cut:])[0]) == text
