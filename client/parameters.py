"""Every option that a call takes by name, once: type, meaning, unit and default.

Type checkers and editors read the classes, `help()` and the command line the descriptions (the
default stands in brackets), and a call that is given another name is refused. `None` is the same
as not given.
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
    """What every call takes."""

    timeout: Annotated[
        Timeout | float | None,
        _says("a Timeout, or seconds for the whole request [the client's]"),
    ]
    retry: Annotated[Retry | None, _says("how to recover from an interruption [the client's]")]
    window: Annotated[
        int | None,
        _says("tokens that may wait unread in this process [the client's, else the broker's]"),
    ]
    priority: Annotated[int | None, _says("-100 to 100; the higher leaves the queue first [0]")]
    user: Annotated[str | None, _says("whose share of the workers it counts to [the client's own]")]
    trace: Annotated[
        Mapping[str, str] | None,
        _says("W3C trace context, such as traceparent [the current OpenTelemetry span, if any]"),
    ]


class ConversationOptions(CallOptions, total=False):
    """What goes into the prompt that a chat template makes."""

    tools: Annotated[
        Sequence[Mapping[str, Any] | type] | None,
        _says("what the model may call: functions in OpenAI's form, or classes [none]"),
    ]
    tool_choice: Annotated[
        str | Mapping[str, Any] | None,
        _says('"auto", "none", "required", or one function in OpenAI\'s form [auto]'),
    ]
    template_args: Annotated[
        Mapping[str, Any] | None, _says("variables for the model's chat template [none]")
    ]


class Sampling(TypedDict, total=False):
    """How tokens are chosen, and when to stop. `*`: the model's own default comes first."""

    max_tokens: Annotated[int | None, _says("longest answer, tokens [what is left of the context]")]
    min_tokens: Annotated[int | None, _says("no end before so many tokens [0]")]
    temperature: Annotated[
        float | None, _says("randomness: 0 always takes the likeliest token [1*]")
    ]
    top_p: Annotated[
        float | None,
        _says("choose among the likeliest tokens of this total probability, 0 to 1 [1*: all]"),
    ]
    top_k: Annotated[int | None, _says("choose among so many likeliest tokens [0*: all]")]
    min_p: Annotated[
        float | None,
        _says("leave out tokens below this share of the likeliest one's probability [0*: none]"),
    ]
    repetition_penalty: Annotated[
        float | None, _says("above 1, tokens of prompt and answer become less likely [1*: off]")
    ]
    presence_penalty: Annotated[
        float | None, _says("taken from the logits of tokens that the answer has [0: off]")
    ]
    frequency_penalty: Annotated[
        float | None, _says("the same for each time that the answer has them [0: off]")
    ]
    seed: Annotated[int | None, _says("same seed, same answer [random]")]
    stop: Annotated[str | Sequence[str] | None, _says("text that ends the answer [none]")]
    stop_token_ids: Annotated[Sequence[int] | None, _says("token ids that end it [none]")]
    ignore_eos: Annotated[bool | None, _says("go on after the model's own end [no]")]
    include_stop: Annotated[bool | None, _says("leave the stop text in the answer [no]")]
    skip_special_tokens: Annotated[bool | None, _says("leave special tokens out of the text [yes]")]
    keep_special: Annotated[
        Sequence[str] | None, _says("special tokens that stay in the text all the same [none]")
    ]
    logprobs: Annotated[
        int | None,
        _says("log probabilities: of each token and so many likeliest ones [none]"),
    ]
    prompt_logprobs: Annotated[int | None, _says("the same for the tokens of the prompt [none]")]
    echo: Annotated[bool | None, _says("begin the answer with the prompt [no]")]
    logit_bias: Annotated[
        Mapping[int, float] | Mapping[str, float] | Sequence[tuple[int, float]] | None,
        _says("added to the logits of tokens, by token id [none]"),
    ]
    banned_token_ids: Annotated[Sequence[int] | None, _says("tokens that never come [none]")]
    forced_token_ids: Annotated[
        Sequence[int] | None, _says("tokens that the answer begins with [none]")
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
        _says("parameters for which the model's own default counts [those * not given]"),
    ]
    stream_interval: Annotated[int | None, _says("tokens that come at a time [1]")]


class GenerateOptions(Sampling, CallOptions, total=False):
    """What `generate` takes."""


class ChatOptions(Sampling, ConversationOptions, total=False):
    """What `chat` takes."""


class EmbedOptions(CallOptions, total=False):
    """What `embed` takes."""

    pooling: Annotated[
        Literal["mean", "cls", "last", "max"] | None,
        _says("how the tokens' vectors become one [the model's own]"),
    ]
    normalize: Annotated[bool | None, _says("scale each vector to length 1 [the model's own]")]
    dimensions: Annotated[int | None, _says("keep the first so many dimensions [all]")]


def described(options: type) -> dict[str, str]:
    """What each option does, by name."""
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
            # `*given` is how a function takes what follows by its place too.
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
    """As a person would write it: without modules, and None goes without saying."""
    parts = [part for part in get_args(type_) if part is not NoneType]
    return " | ".join(re.sub(r"\b(?:\w+\.)+", "", _name(part)) for part in parts)


def _name(part: Any) -> str:
    return part.__name__ if isinstance(part, type) and not get_args(part) else str(part)


def _taken_apart(options: type) -> dict[str, tuple[Any, Meta]]:
    parts = {name: get_args(hint) for name, hint in options.__annotations__.items()}
    return {name: (type_, meta) for name, (type_, meta) in parts.items()}
