"""How a model writes a tool call, described so that a grammar can hold the model to it.

A `Form` is the text around names and arguments. The model's own chat template shows it: probes are
rendered and taken apart (`shown_form`). For models whose template writes no calls there is a table,
keyed by the mark that begins them. `call_families` reads what is written in a form; a form that it
cannot read back is useless, see `reads_back`. Must never see a token or a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

__all__ = [
    "ID",
    "INDEX",
    "Form",
    "Read",
    "Style",
    "probe_schemas",
    "reads_back",
    "shared_start",
    "shown_form",
    "table_forms",
    "usual_forms",
]

ID: Final = "\x00"
"""Placeholder in a form for the nine letters and digits of a call's id."""
INDEX: Final = "\x01"
"""Placeholder in a form for the number of a call."""

Style = Literal["json", "text", "python", "gemma"]
"""How arguments are written: as one JSON object, or one by one: as bare text, whose type the tool's
schema gives, as Python keyword arguments, or with Gemma's own quotes."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a model writes around the names and arguments of its calls."""

    #: Before the name of the first call.
    opens: str
    #: Between the end of a call and the name of the next; None: a turn has one call.
    between: str | None
    #: After the last call.
    closes: str
    style: Style = "json"
    #: Between a name and its arguments, or the first of their keys.
    middle: str = ""
    #: Arguments one by one: between a key and a text, and what ends the text.
    text_begins: str = ""
    text_ends: str = ""
    #: Between a key and any other value.
    value_begins: str = ""
    #: Between a value and the next key; after the last value.
    separator: str = ""
    ends: str = ""
    #: After the name of a call without arguments.
    none: str = ""

    def written(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """The calls as a model with this form writes them."""
        text = self.opens
        for number, (name, arguments) in enumerate(calls):
            if number:
                text += self.between or ""
            text += name + self._arguments(arguments)
            text = text.replace(INDEX, str(number))
        return (text + self.closes).replace(ID, "a1b2c3d4e")

    def _arguments(self, arguments: Mapping[str, Any]) -> str:
        if self.style == "json":
            return self.middle + _json(arguments)
        if not arguments:
            return self.none
        said = []
        for key, value in arguments.items():
            if isinstance(value, str) and self.style != "python":
                said.append(key + self.text_begins + value + self.text_ends)
            else:
                said.append(key + self.value_begins + self._value(value))
        return self.middle + self.separator.join(said) + self.ends

    def _value(self, value: Any) -> str:
        if self.style == "python":
            return _PYTHON_WORDS[value] if _is_word(value) else _json(value)
        if self.style == "gemma" and isinstance(value, str):
            return self.text_ends + value + self.text_ends
        if self.style == "gemma" and isinstance(value, list):
            return f"[{','.join(map(self._value, value))}]"
        if self.style == "gemma" and isinstance(value, dict):
            inner = (f"{key}:{self._value(one)}" for key, one in value.items())
            return f"{{{','.join(inner)}}}"
        return _json(value)


_PYTHON_WORDS: Final = {True: "True", False: "False", None: "None"}


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- the table ------------------------------------------------------------------------------------


def _objects(opens: str, closes: str, between: str | None, arguments: str = "arguments") -> Form:
    """JSON objects with name and arguments, between marks."""
    head = opens + '{"name": "'
    after = None if between is None else "}" + between + '{"name": "'
    return Form(head, after, "}" + closes, middle=f'", "{arguments}": ')


def _named(opens: str, middle: str, ends: str, between: str, closes: str) -> Form:
    """Name and JSON arguments between marks of their own."""
    return Form(opens, ends + between, ends + closes, middle=middle)


def _elements(opens: str, closes: str, between: str, *, breaks: str = "\n") -> Form:
    """`<function=NAME><parameter=KEY>...`, with `breaks` before and after each value."""
    return Form(
        opens + "<function=",
        f"</function>{between}<function=",
        "</function>" + closes,
        "text",
        middle=">\n<parameter=",
        text_begins=">" + breaks,
        value_begins=">" + breaks,
        separator=f"{breaks}</parameter>\n<parameter=",
        ends=breaks + "</parameter>\n",
        none=">\n",
    )


def _invoked(opens: str, prefix: str, closes: str, between: str = "", **says: str) -> Form:
    """`<invoke name="NAME"><parameter name="KEY">...`."""
    gap = says.get("gap", "\n")
    end, invoke, parameter = (
        f"</{prefix}invoke>",
        f'<{prefix}invoke name="',
        f'<{prefix}parameter name="',
    )
    return Form(
        opens + invoke,
        end + between + invoke,
        end + closes,
        "text",
        middle=f'">{gap}{parameter}',
        text_begins=says.get("text", '">'),
        value_begins=says.get("value", '">'),
        separator=f"</{prefix}parameter>{gap}{parameter}",
        ends=f"</{prefix}parameter>{gap}",
        none=f'">{gap}',
    )


def _python(opens: str, closes: str, between: str) -> Form:
    """`NAME(KEY="...", ...)`."""
    return Form(
        opens,
        ")" + between,
        ")" + closes,
        "python",
        middle="(",
        text_begins="=",
        value_begins="=",
        separator=", ",
        none="(",
    )


_GLM: Final = Form(
    "<tool_call>",
    "\n</tool_call>\n<tool_call>",
    "\n</tool_call>",
    "text",
    middle="\n<arg_key>",
    text_begins="</arg_key>\n<arg_value>",
    value_begins="</arg_key>\n<arg_value>",
    separator="</arg_value>\n<arg_key>",
    ends="</arg_value>",
)
_GEMMA: Final = Form(
    "<|tool_call>call:",
    "}<tool_call|><|tool_call>call:",
    "}<tool_call|>",
    "gemma",
    middle="{",
    text_begins=':<|"|>',
    text_ends='<|"|>',
    value_begins=":",
    separator=",",
    none="{",
)
_DEEPSEEK: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")


def _dsml(calls: str) -> Form:
    """DeepSeek V3.2 and later. `calls`: the region's tag, including a blank before it if any."""
    blank = calls[: len(calls) - len(calls.lstrip())]
    return _invoked(
        f"<｜DSML｜{calls}>\n",
        f"｜DSML｜{blank}",
        f"\n</｜DSML｜{calls}>",
        "\n",
        text='" string="true">',
        value='" string="false">',
    )


_TABLE: Final[dict[str, tuple[tuple[str, Form], ...]]] = {
    "<tool_call>": (
        ("<arg_key>", _GLM),
        (
            "<function=",
            _elements("<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n"),
        ),
        ("", _objects("<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")),
    ),
    "<function=": (
        ("<parameter=", _elements("", "", "\n")),
        ("", _named("<function=", ">", "</function>", "<function=", "")),
    ),
    "<|tool_call|>": (
        ("<|/tool_call|>", _objects("<|tool_call|>[", "]<|/tool_call|>", ", ")),
        ("", _objects("<|tool_call|>[", "]", ", ")),
    ),
    "<tool_calls>": (("", _objects("<tool_calls>\n", "\n</tool_calls>", "\n")),),
    "<TOOLCALL>": (("", _objects("<TOOLCALL>[", "]</TOOLCALL>", ", ")),),
    "<|START_ACTION|>": (
        (
            "",
            Form(
                f'<|START_ACTION|>[\n    {{"tool_call_id": "{INDEX}", "tool_name": "',
                f'}},\n    {{"tool_call_id": "{INDEX}", "tool_name": "',
                "}\n]<|END_ACTION|>",
                middle='", "parameters": ',
            ),
        ),
    ),
    "<|action_start|>": (
        ("", _objects("<|action_start|><|plugin|>\n", "<|action_end|>", None, "parameters")),
    ),
    "<seed:tool_call>": (
        (
            "",
            _elements(
                "<seed:tool_call>\n",
                "\n</seed:tool_call>",
                "\n</seed:tool_call>\n<seed:tool_call>\n",
                breaks="",
            ),
        ),
    ),
    "<minimax:tool_call>": (
        ("", _invoked("<minimax:tool_call>\n", "", "\n</minimax:tool_call>", "\n")),
    ),
    "<｜DSML｜function_calls>": (("", _dsml("function_calls")),),
    "<｜DSML｜tool_calls>": (("", _dsml("tool_calls")),),
    "<｜DSML｜ calls>": (("", _dsml(" calls")),),
    _DEEPSEEK[0]: (
        (
            "```json",
            _named(
                f"{_DEEPSEEK[0]}{_DEEPSEEK[1]}function<｜tool▁sep｜>",
                "\n```json\n",
                f"\n```{_DEEPSEEK[2]}",
                f"\n{_DEEPSEEK[1]}function<｜tool▁sep｜>",
                "<｜tool▁calls▁end｜>",
            ),
        ),
        (
            "",
            _named(
                _DEEPSEEK[0] + _DEEPSEEK[1],
                "<｜tool▁sep｜>",
                _DEEPSEEK[2],
                _DEEPSEEK[1],
                "<｜tool▁calls▁end｜>",
            ),
        ),
    ),
    "<|tool_calls_section_begin|>": (
        (
            "",
            _named(
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.",
                f":{INDEX}<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
                "<|tool_call_begin|>functions.",
                "<|tool_calls_section_end|>",
            ),
        ),
    ),
    "<|tool_call>": (("", _GEMMA),),
    "<|tool_call_start|>": (("", _python("<|tool_call_start|>[", "]<|tool_call_end|>", ", ")),),
    "<function_calls>": (("", _python("<function_calls>\n", "\n</function_calls>", "\n")),),
    "<|python_start|>": (("", _python("<|python_start|>[", "]<|python_end|>", ", ")),),
    "<|channel|>": (
        (
            "",
            Form(
                "<|channel|>commentary to=functions.",
                None,
                "<|call|>",
                middle=" <|constrain|>json<|message|>",
            ),
        ),
    ),
    "<|tools_prefix|>": (
        (
            "",
            Form('<|tools_prefix|>[{"', '}, {"', "}]<|tools_suffix|>", middle='": '),
        ),
    ),
    "<｜tool_calls_begin｜>": (
        (
            "",
            _invoked(
                "<｜tool_calls_begin｜><｜tool_call_begin｜>function<｜tool_sep｜>",
                "steptml:",
                "<｜tool_call_end｜><｜tool_calls_end｜>",
                "<｜tool_call_end｜>\n<｜tool_call_begin｜>function<｜tool_sep｜>",
                gap="",
            ),
        ),
    ),
    ">>>": (("", _named(">>>", "\n", "", ">>>", "")),),
    "[TOOL_CALLS]": (
        (
            "[CALL_ID]",
            _named("[TOOL_CALLS]", f"[CALL_ID]{ID}[ARGS]", "", "[TOOL_CALLS]", ""),
        ),
        ("[ARGS]", _named("[TOOL_CALLS]", "[ARGS]", "", "[TOOL_CALLS]", "")),
        ("", _objects("[TOOL_CALLS][", "]", ", ")),
    ),
    "<|python_tag|>": (("", _objects("<|python_tag|>", "", "; ", "parameters")),),
    # Without a mark: Llama 4 and 3.2, whose templates ask for it; Llama 3.
    "[": (("", _python("[", "]", ", ")),),
    "{": (
        ("", _objects("", "", None, "parameters")),
        ("", _objects("", "", None)),
    ),
}
"""Forms by the mark that begins calls, each with a text that the template or the vocabulary must
contain. The first that fits is taken."""


def usual_forms() -> Iterator[tuple[str, str, Form]]:
    """The rows of the table: mark, what else a model must show, form."""
    for mark, forms in _TABLE.items():
        for hint, form in forms:
            yield mark, hint, form


def table_forms(mark: str, shown: Callable[[str], bool]) -> tuple[Form, ...]:
    """The usual form of calls that begin with this mark; for a bare "{", several. `shown`: whether
    the model's template or vocabulary contains a text."""
    found = tuple(form for hint, form in _TABLE.get(mark, ()) if not hint or shown(hint))
    return found if mark == "{" else found[:1]


# --- what a template shows ------------------------------------------------------------------------

_QUESTION, _WORDS = "probe question", "probe words"
_NAMES: Final = ("probe_alpha", "probe_beta", "probe_gamma")
_KEYS: Final = ("probe_one", "probe_two", "probe_three")
_VALUES: Final = ("probe value", 70717, "probe end")
_IDS: Final = ("pr0beid01", "pr0beid02")
_NUMBERED: Final = re.compile(r'("tool_call_id"\s*:\s*")\d+(?=")')

Render = Callable[[list[dict[str, Any]]], str | None]
"""Renders messages with a model's chat template, without the prompt for an answer; None: the
template refuses them. A message has a text or `tool_calls`."""


def probe_schemas() -> dict[str, dict[str, Any]]:
    """The tools that probes call."""
    types = ("string", "integer", "string")
    properties = {key: {"type": type_} for key, type_ in zip(_KEYS, types, strict=True)}
    return {name: {"type": "object", "properties": properties} for name in _NAMES}


def shown_form(render: Render, marks: Collection[str], stops: Collection[str]) -> Form | None:
    """The form in which a chat template writes calls; None: it writes none, or in a way that is not
    understood. `marks` begin calls; `stops` are special tokens that are not marks of calls."""
    question = {"role": "user", "content": _QUESTION}
    plain = render([question, {"role": "assistant", "content": _WORDS}])
    if plain is None or _WORDS not in plain:
        return None
    header, _, turn_ends = plain.partition(_WORDS)

    def shown(*calls: int) -> tuple[str, str] | None:
        """What stands before the first name and after it, up to the end of the turn."""
        calling = {"role": "assistant", "tool_calls": [_call(n) for n in calls]}
        text = render([question, calling])
        if text is None or _NAMES[calls[0]] not in text.partition(_QUESTION)[2]:
            return None
        before, _, behind = text.rpartition(_NAMES[calls[0]])
        if turn_ends:
            behind = behind.removesuffix(turn_ends)
        places = [behind.find(stop) for stop in stops if stop in behind]
        behind = behind[: min(places)] if places else behind
        return _opening(before, header, marks), behind.rstrip()

    one, empty, two = shown(0), shown(2), shown(0, 1)
    if one is None or empty is None:
        return None
    opens, whole = one
    if two is not None and _NAMES[1] in two[1]:
        between_calls = two[1].partition(_NAMES[1])[0]
    else:
        between_calls = None
    form = _taken_apart(whole, empty[1], between_calls)
    return None if form is None else _numbered(replace(form, opens=opens))


def _call(number: int) -> dict[str, Any]:
    arguments = dict(zip(_KEYS, _VALUES, strict=True)) if number < 2 else {}
    function = {"name": _NAMES[number], "arguments": arguments}
    return {"id": _IDS[number % 2], "type": "function", "function": function}


def _opening(before: str, header: str, marks: Collection[str]) -> str:
    """The part of the text before a call's name that belongs to the call."""
    turn = before.partition(_QUESTION)[2]
    found = [turn.find(mark) for mark in marks if mark in turn]
    if found:
        return turn[min(found) :]
    same = header.rstrip()
    return before[len(same) :].lstrip() if before.startswith(same) else before


def _taken_apart(whole: str, empty: str, between_calls: str | None) -> Form | None:
    """The form shown by a call with three arguments (`whole`), one with none (`empty`), each from
    the end of its name on, and the first of two (`between_calls`, up to the second name)."""
    at = whole.find("{")
    if at >= 0:
        try:
            value, end = json.JSONDecoder().raw_decode(whole, at)
        except ValueError:
            value = None
        if value == dict(zip(_KEYS, _VALUES, strict=True)):
            if not empty.startswith(whole[:at]):
                return None
            between = None if between_calls is None else between_calls[end:]
            return Form("", between, whole[end:], middle=whole[:at])
    return _one_by_one(whole, empty, between_calls)


def _one_by_one(whole: str, empty: str, between_calls: str | None) -> Form | None:
    pieces = []
    rest = whole
    for key, value in zip(_KEYS, _VALUES, strict=True):
        for text in (key, str(value)):
            piece, found, rest = rest.partition(text)
            if not found:
                return None
            pieces.append(piece)
    middle, text_begins, after_text, value_begins, after_value, _ = pieces
    if not after_text.endswith(after_value):
        return None
    text_ends = after_text.removesuffix(after_value)
    if not rest.startswith(text_ends):
        return None
    rest = rest.removeprefix(text_ends)
    closes = shared_start(rest[::-1], empty[::-1])[::-1]
    ends = rest.removesuffix(closes) if closes else rest
    between = None
    if between_calls is not None:
        said = between_calls.partition(str(_VALUES[-1]))[2].removeprefix(text_ends)
        if not said.startswith(ends):
            return None
        between = said.removeprefix(ends)
    style: Style = "text"
    if text_ends == '"' and text_begins == value_begins + '"':
        style, text_begins, text_ends = "python", value_begins, ""
    elif text_ends:
        style = "gemma"
    elif not shared_start(after_value, ends).strip():
        return None  # nothing tells where a text ends
    return Form(
        "",
        between,
        closes,
        style,
        middle=middle,
        text_begins=text_begins,
        text_ends=text_ends,
        value_begins=value_begins,
        separator=after_value,
        ends=ends,
        none=empty.removesuffix(closes) if closes else empty,
    )


def shared_start(one: str, other: str) -> str:
    """The longest common prefix of two texts."""
    same = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        same += 1
    return one[:same]


def _numbered(form: Form) -> Form:
    """The form with the ids and numbers of its calls left open."""

    def open_(text: str) -> str:
        for call_id in _IDS:
            text = text.replace(call_id, ID)
        return _NUMBERED.sub(rf"\g<1>{INDEX}", text)

    between = None if form.between is None else open_(form.between)
    made = replace(
        form,
        opens=open_(form.opens),
        between=between,
        middle=open_(form.middle),
        closes=open_(form.closes),
    )
    return made


# --- checked --------------------------------------------------------------------------------------

Read = Callable[[str], list[tuple[str, str]]]
"""The names and the JSON arguments of the calls that a model's own parser finds in a text."""

_HARD: Final = "a \"b\" 'c' \\ {é} [d], <e>; f=1"
"""A text that some notations would have to escape."""


def reads_back(form: Form, read: Read) -> bool:
    """Whether a parser correctly reads calls that are written in this form."""
    full = dict(zip(_KEYS, (_HARD, 7, "g"), strict=True))
    for calls in _checks(full, several=form.between is not None):
        try:
            found = [(name, json.loads(arguments)) for name, arguments in read(form.written(calls))]
        except ValueError:
            return False
        if found != calls:
            return False
    return True


def _checks(full: dict[str, Any], *, several: bool) -> Iterator[list[tuple[str, dict[str, Any]]]]:
    yield [(_NAMES[0], full)]
    yield [(_NAMES[0], {})]
    if several:
        yield [(_NAMES[0], full), (_NAMES[1], {}), (_NAMES[2], full)]
