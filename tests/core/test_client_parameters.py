"""The options of a call: known to type checkers and `help()`, and the same for every call in both
clients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from broker.protocol.messages import Kind, Params, Request
from client import AsyncClient, Client, InvalidRequest, Retry, Timeout, calls
from client.cli import arguments as flags
from client.parameters import ChatOptions, ConversationOptions, EmbedOptions, Sampling, described
from tests.harness import MYPY

CALLS = ("chat", "generate", "embed", "decide", "count", "tokenize", "detokenize", "template")
DEFAULTS = calls.Defaults(Timeout(), Retry())


def test_every_field_of_the_wire_that_a_caller_may_set_is_a_named_option() -> None:
    assert list(Params.__struct_fields__) and set(Params.__struct_fields__) == set(
        Sampling.__annotations__
    )
    beside = set(ConversationOptions.__annotations__) - {"timeout", "retry", "window"}
    assert beside <= set(Request.__struct_fields__)


@pytest.mark.parametrize("name", CALLS)
def test_help_names_every_option_with_type_meaning_and_default(name: str) -> None:
    function = getattr(Client, name)
    shown = inspect.signature(function).parameters
    assert "params" not in shown and "options" not in shown and "timeout" in shown
    for option in shown:
        if option in described(ChatOptions) | described(EmbedOptions):
            assert f"  {option} (" in function.__doc__


def test_options_are_documented_with_type_unit_and_default() -> None:
    text = Client.chat.__doc__ or ""
    assert "  max_tokens (int): longest answer, tokens [the rest of the context]\n" in text
    assert "  stop (str | Sequence[str]): text that ends the answer [none]\n" in text
    assert "  timeout (Timeout | float): a Timeout, or seconds for the whole request" in text
    assert all("[" in line for line in described(ChatOptions).values())
    assert all("[" in line for line in described(EmbedOptions).values())


@pytest.mark.parametrize("name", CALLS)
def test_both_clients_take_the_same_options(name: str) -> None:
    one, other = (inspect.signature(getattr(face, name)) for face in (Client, AsyncClient))
    assert one.parameters == other.parameters


def test_the_command_line_explains_every_parameter_that_has_a_flag() -> None:
    assert flags._flags().keys() <= described(Sampling).keys()


def _typed(body: str) -> str:
    """The output of mypy for a program that uses the library."""
    api = pytest.importorskip("mypy.api")
    program = "from client import AsyncClient, Client, Completion, Stream\nbus = Client()\n" + body
    report, errors, _ = api.run([*MYPY, "-c", program])
    assert not errors
    return str(report)


def test_a_type_checker_finds_misspelled_options_and_wrong_types() -> None:
    report = _typed(
        'bus.chat("hi", temprature=0)\n'
        'bus.generate("hi", max_token=1)\n'
        'bus.embed("hi", dimension=1)\n'
        'bus.count("hi", template_arg={})\n'
        'bus.chat("hi", max_tokens="ten")\n'
        "async def main(bus: AsyncClient) -> None:\n"
        '    await bus.chat("hi", temprature=0)\n'
        '    await bus.embed("hi", dimension=1)\n'
    )
    assert [f"<string>:{line}: error" in report for line in (3, 4, 5, 6, 7, 9, 10)] == [True] * 7
    assert '"temperature"' in report  # the near one is named


def test_a_type_checker_accepts_every_way_to_call() -> None:
    report = _typed(
        'a: Completion = bus.chat("hi", model="demo", stop="x", logit_bias={5: 1.0})\n'
        'b: Stream = bus.chat("demo", "hi", stream=True, seed=None, timeout=3)\n'
        'c: Completion = bus.chat(model="demo", messages=[{"role": "user", "content": "hi"}])\n'
        'd: Stream = bus.chat("demo", messages="hi", stream=True)\n'
        'e: Completion = bus.generate("hi", model="demo", stop=["a", "b"], top_k=3)\n'
        'bus.embed(["a", [1, 2]], model="demo", pooling="mean", normalize=True)\n'
    )
    assert report.startswith("Success")


@pytest.mark.parametrize(
    ("given", "named", "wanted"),
    [
        (("hi",), {}, (None, "hi")),
        (("hi",), {"model": "demo"}, ("demo", "hi")),
        (("demo", "hi"), {}, ("demo", "hi")),
        ((None, "hi"), {}, (None, "hi")),
        (("demo",), {"messages": "hi"}, ("demo", "hi")),
        ((), {"model": "demo", "messages": "hi"}, ("demo", "hi")),
        ((), {"messages": "hi"}, (None, "hi")),
    ],
)
def test_messages_come_first_as_in_every_call_or_the_model(
    given: tuple[Any, ...], named: dict[str, Any], wanted: tuple[Any, ...]
) -> None:
    got = calls.model_and_messages(given, named.get("model"), named.get("messages"))
    assert tuple(got) == wanted


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), {}),
        ((), {"model": "demo"}),
        (("demo", "hi"), {"model": "demo"}),
        (("demo", "hi"), {"messages": "hi"}),
        (("demo",), {"model": "demo", "messages": "hi"}),
        (("a", "b", "c"), {}),
    ],
)
def test_too_many_or_too_few_are_a_type_error(
    given: tuple[Any, ...], named: dict[str, Any]
) -> None:
    with pytest.raises(TypeError, match=r"chat\(messages, model=\.\.\.\)"):
        calls.model_and_messages(given, named.get("model"), named.get("messages"))


@pytest.mark.parametrize(
    ("make", "misspelt", "near"),
    [
        (lambda o: calls.chat(DEFAULTS, None, "hi", (), o), "temprature", "temperature"),
        (lambda o: calls.embed(DEFAULTS, None, "hi", o), "dimension", "dimensions"),
        (lambda o: calls.embed(DEFAULTS, None, "hi", o), "max_tokens", "known .*: dimensions"),
    ],
)
def test_the_error_for_an_unknown_option_names_similar_ones(
    make: Callable[[dict[str, Any]], Any], misspelt: str, near: str
) -> None:
    with pytest.raises(TypeError, match=near):
        make({misspelt: 1})


def test_none_is_the_same_as_not_given() -> None:
    for name in described(ChatOptions):
        calls.chat(DEFAULTS, None, "hi", (), {name: None})
    (call,) = calls.embed(DEFAULTS, None, "hi", dict.fromkeys(described(EmbedOptions)))
    assert call.request.kind is Kind.EMBED and call.request.embed_args == {}
    with pytest.raises(InvalidRequest):
        calls.chat(DEFAULTS, None, "hi", (), {"max_tokens": 0})
