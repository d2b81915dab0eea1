"""Every keyword option of a call, defined once: type, meaning, unit and default.

Type checkers and editors use the classes; `help()` and the command line show the descriptions (with
the default in brackets); a call with any other name is refused. `None` means the same as leaving
the option out.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import NoneType
from typing import Annotated, Any, Final, Literal, TypedDict, TypeVar, get_args

from msgspec import Meta

from broker.protocol.messages import Constraint
from client.options import Retry, Timeout

__all__ = [
    "CallOptions",
    "ChatOptions",
    "ConversationOptions",
    "EmbedOptions",
    "GenerateOptions",
    "Sampling",
    "described",
    "documented",
]


def _says(text: str) -> Meta:
    return Meta(description=text)


class CallOptions(TypedDict, total=False):
    """Options of every call."""

    timeout: Annotated[
        Timeout | float | None,
        _says("a Timeout, or seconds for the whole request [the client's]"),
    ]
    retry: Annotated[Retry | None, _says("how to recover from an interruption [the client's]")]
    window: Annotated[
        int | None,
        _says("tokens that may wait unread in this process [the client's, else the broker's]"),
    ]
    priority: Annotated[int | None, _says("-100 to 100; higher leaves the queue first [0]")]
    user: Annotated[
        str | None, _says("the user whose fair share it counts towards [the client's own]")
    ]
    trace: Annotated[
        Mapping[str, str] | None,
        _says("W3C trace context, such as traceparent [the current OpenTelemetry span, if any]"),
    ]


class ConversationOptions(CallOptions, total=False):
    """Options that go into the prompt rendered by a chat template."""

    tools: Annotated[
        Sequence[Mapping[str, Any] | type] | None,
        _says("what the model may call: functions in OpenAI's form, or classes [none]"),
    ]
    tool_choice: Annotated[
        str | Mapping[str, Any] | None,
        _says('"auto", "none", "required", or one function in OpenAI\'s form [auto]'),
    ]
    parallel_tool_calls: Annotated[
        bool | None, _says("no: the answer ends with its first call [yes]")
    ]
    template_args: Annotated[
        Mapping[str, Any] | None, _says("variables for the model's chat template [none]")
    ]


class Sampling(TypedDict, total=False):
    """How tokens are chosen and when to stop. `*`: the model's own default takes precedence."""

    max_tokens: Annotated[int | None, _says("longest answer, tokens [the rest of the context]")]
    min_tokens: Annotated[int | None, _says("the answer has at least this many tokens [0]")]
    temperature: Annotated[
        float | None, _says("randomness: 0 always takes the most likely token [1*]")
    ]
    top_p: Annotated[
        float | None,
        _says("choose among the most likely tokens with this total probability, 0 to 1 [1*: all]"),
    ]
    top_k: Annotated[int | None, _says("choose among this many most likely tokens [0*: all]")]
    min_p: Annotated[
        float | None,
        _says("leave out tokens below this fraction of the top token's probability [0*: none]"),
    ]
    repetition_penalty: Annotated[
        float | None, _says("above 1, tokens of prompt and answer become less likely [1*: off]")
    ]
    presence_penalty: Annotated[
        float | None, _says("subtracted from the logits of tokens in the answer so far [0: off]")
    ]
    frequency_penalty: Annotated[
        float | None, _says("the same, times the number of occurrences [0: off]")
    ]
    seed: Annotated[int | None, _says("same seed, same answer [random]")]
    stop: Annotated[str | Sequence[str] | None, _says("text that ends the answer [none]")]
    stop_token_ids: Annotated[Sequence[int] | None, _says("token ids that end it [none]")]
    ignore_eos: Annotated[bool | None, _says("continue after the end of sequence [no]")]
    include_stop: Annotated[bool | None, _says("keep the stop text in the answer [no]")]
    skip_special_tokens: Annotated[bool | None, _says("leave special tokens out of the text [yes]")]
    keep_special: Annotated[
        Sequence[str] | None, _says("special tokens to keep in the text nevertheless [none]")
    ]
    logprobs: Annotated[
        int | None,
        _says("log probabilities: of each token and this many most likely ones [none]"),
    ]
    prompt_logprobs: Annotated[int | None, _says("the same for the tokens of the prompt [none]")]
    echo: Annotated[bool | None, _says("begin the answer with the prompt [no]")]
    logit_bias: Annotated[
        Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None,
        _says("added to the logits of tokens, by token id [none]"),
    ]
    banned_token_ids: Annotated[
        Sequence[int] | None, _says("tokens that are never generated [none]")
    ]
    forced_token_ids: Annotated[
        Sequence[int] | None, _says("tokens with which the answer begins [none]")
    ]
    constraint: Annotated[
        Constraint | Mapping[str, Any] | None,
        _says('{"type": json_object, json_schema, regex, grammar or choice, "value": ...} [none]'),
    ]
    overflow: Annotated[
        Literal["error", "truncate_left"] | None,
        _says("a prompt that is too long is refused, or loses its oldest tokens [error]"),
    ]
    model_defaults: Annotated[
        Sequence[str] | None,
        _says("parameters for which the model's own default applies [those * not given]"),
    ]
    stream_interval: Annotated[
        int | None, _says("minimum number of tokens delivered at a time [1]")
    ]
    pieces: Annotated[
        Sequence[str] | None,
        _says('kinds of text to separate from the answer: "reasoning" [that in a chat, else none]'),
    ]
    thinking_tokens: Annotated[
        int | None, _says("maximum reasoning length, in tokens; then the answer follows [no limit]")
    ]
    cut_max_tokens: Annotated[
        bool | None, _says("max_tokens beyond the context's rest is cut to it [refused]")
    ]
    prompt_usage: Annotated[
        bool | None, _says("tell the prompt's tokens before the answer: `Prompt.usage` [no]")
    ]


class GenerateOptions(Sampling, CallOptions, total=False):
    """Options of `generate`."""


class ChatOptions(Sampling, ConversationOptions, total=False):
    """Options of `chat`."""


class EmbedOptions(CallOptions, total=False):
    """Options of `embed`."""

    pooling: Annotated[
        Literal["mean", "cls", "last", "max"] | None,
        _says("how the vectors of the tokens are combined into one [the model's own]"),
    ]
    normalize: Annotated[bool | None, _says("scale each vector to length 1 [the model's own]")]
    dimensions: Annotated[int | None, _says("keep only this many leading dimensions [all]")]
    truncate: Annotated[
        bool | None, _says("leave out the end of a text that is too long [refuse it]")
    ]


class ClassifyOptions(CallOptions, total=False):
    """Options of `rerank` and `classify`."""

    activation: Annotated[
        bool | None, _says("scores as the model means them, and not its logits [yes]")
    ]
    truncate: Annotated[
        bool | None, _says("leave out the end of a text that is too long [refuse it]")
    ]


def described(options: type) -> dict[str, str]:
    """The description of each option, by name."""
    return {name: meta.description or "" for name, (_, meta) in _taken_apart(options).items()}


_Function = TypeVar("_Function", bound=Callable[..., Any])


def documented(options: type) -> Callable[[_Function], _Function]:
    """For a function with `**options: Unpack[...]`: `help()` shows each option by name."""

    def dress(function: _Function) -> _Function:
        shown = inspect.signature(function)
        named: list[inspect.Parameter] = []
        by_place = False
        for parameter in shown.parameters.values():
            if by_place:
                parameter = inspect.Parameter(
                    parameter.name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    annotation=parameter.annotation,
                )
            # `*given` lets a function accept the following arguments by position too.
            by_place = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            if not by_place and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                named.append(parameter)
        named += [
            inspect.Parameter(name, _KEYWORD, default=None, annotation=type_)
            for name, (type_, _) in _taken_apart(options).items()
        ]
        function.__signature__ = shown.replace(parameters=named)  # type: ignore[attr-defined]
        if function.__doc__:  # not with `python -OO`
            lines = [
                f"  {name} ({_spelt(type_)}): {meta.description}"
                for name, (type_, meta) in _taken_apart(options).items()
            ]
            head = _HEAD + (_STAR if any("*" in line for line in lines) else "") + ":"
            function.__doc__ = "\n".join((inspect.cleandoc(function.__doc__), "", head, *lines))
        return function

    return dress


_KEYWORD: Final = inspect.Parameter.KEYWORD_ONLY
_HEAD: Final = "Options, each with its default in brackets"
_STAR: Final = " (*: the model's own, where its generation config has one)"


def _spelt(type_: Any) -> str:
    """A type as a person would write it: without modules and without `None`."""
    parts = [part for part in get_args(type_) if part is not NoneType]
    return " | ".join(re.sub(r"\b(?:\w+\.)+", "", _name(part)) for part in parts)


def _name(part: Any) -> str:
    return part.__name__ if isinstance(part, type) and not get_args(part) else str(part)


def _taken_apart(options: type) -> dict[str, tuple[Any, Meta]]:
    parts = {name: get_args(hint) for name, hint in options.__annotations__.items()}
    return {name: (type_, meta) for name, (type_, meta) in parts.items()}
