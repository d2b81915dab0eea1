"""A model's chat template over a client's messages.

Each message is given to the template in the form that the template reads for its role (a string or
a list of parts), which is found by trying. No string from the client becomes a control token (see
`control`). Called by one thread at a time for each model. Must never tokenize.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from jinja2 import TemplateSyntaxError

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.limits import MAX_NESTING
from broker.protocol.messages import Message, Request, TextPart, VideoPart
from worker.engines.base import EngineLoadError
from worker.engines.common.control import Breaker, ControlTokens, mark_text, rewritten
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import one_line
from worker.engines.common.thinking_words import EFFORT, Asked, ThinkingWords, find_words

__all__ = [
    "RAW_PLACEHOLDER",
    "ChatTemplate",
    "continues_message",
    "template_source",
    "use_template",
]

RAW_PLACEHOLDER = "<image>"
"""The placeholder for an image in a raw prompt, as LLaVA's clients write it."""

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles accepted for any template; others are accepted if the template names them."""

_NO_ROLES = ("text", "image", "image_url", "video", "audio")
"""Names in templates that are content types, not roles: `<|image|>` may be an image placeholder."""

_OURS = frozenset(("chat_template", "conversation", "messages", "tools"))
"""Arguments not allowed in `template_args`: the first belongs to the model, the others have their
own fields in a request."""

_TAKEN = ("add_generation_prompt", "continue_final_message", "documents")
"""Parameters of `apply_chat_template` that a client may set. The others (`tokenize`, ...) choose
the form of the result, which is not up to the client: they are ignored."""

_FIRST, _SECOND = "qfirst", "qsecond"
"""Words for probes: no template writes them or reads them as a command."""

_LISTING = re.compile(rf"""["']text["']\s*:\s*["']{_FIRST}""")
"""What a template prints for a list when it expects a string."""


@dataclass(frozen=True, slots=True)
class _Forms:
    """Whether each form of a role's content reaches the prompt unchanged."""

    #: A string.
    text: bool
    #: A list of one text part; of several.
    part: bool
    parts: bool


class ChatTemplate:
    """The chat template of one model. Methods raise `RequestError` for what it cannot render."""

    def __init__(self, facts: ModelFacts) -> None:
        self._processor = facts.processor
        self._holder = _holder(facts.tokenizer, facts.processor)
        self._source = _source(self._holder)
        #: The placeholder for an image in text; None without a processor.
        self.image_token = self._find_image_token()
        self._tokenizer = facts.tokenizer
        self._forms: dict[tuple[str, bool], _Forms] = {}

    @property
    def present(self) -> bool:
        """Whether the model has a chat template."""
        return bool(_source(self._holder))

    def render(self, request: Request, images: int | None) -> str:
        """The text of a request's messages; `images`: how many it must show (None for any)."""
        if request.messages is None:
            raise _invalid(f"a {request.kind} request needs messages")
        if not self.present:
            raise _invalid(
                f"model {request.model} has no chat template: start its worker with "
                "--chat-template FILE or NAME, or send a raw prompt (/v1/completions, "
                "Client.generate, `generate --raw` on the command line)"
            )
        self._check(request)
        control = self._control
        plain = self._arguments(request, control.broken, control.all_broken)
        text = self._apply(plain)
        # The template may join strings that are harmless on their own into a control token. Then,
        # and only then, those strings are broken up too.
        apart = self._arguments(
            request,
            lambda piece: control.edges_broken(control.broken(piece)),
            lambda piece: control.edges_broken(control.all_broken(piece)),
        )
        if apart != plain:
            other = self._apply(apart)
            if control.found(other) != control.found(text):
                text = other
        if images is not None:
            self._check_images(request.model, text, images)
        return text

    def probed(self, turns: list[dict[str, Any]], *, begins: bool = False) -> str | None:
        """Render turns that have a text or `tool_calls`; None: the template refuses them. `begins`:
        add what begins an answer."""
        conversation: list[dict[str, Any]] = []
        for turn in turns:
            text = turn.get("content")
            if text is None:
                content = self._no_words
            elif self._forms_of(turn["role"], called=False).text:
                content = text
            else:
                content = [{"type": "text", "text": text}]
            conversation.append(turn if content is None else turn | {"content": content})
        try:
            return str(
                self._holder.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=begins
                )
            )
        except Exception:
            return None  # a template is a program, and may raise anything

    def wants_silence(self, request: Request) -> bool:
        """Whether the request turns thinking off and the template has no variable for that."""
        return self.present and self._asked(request).silent

    def image(self) -> str:
        """The image placeholder with what the template writes around it (Qwen-VL's markers)."""
        token = self.image_token or RAW_PLACEHOLDER
        between = self._shown_image.partition(_FIRST)[2].partition(_SECOND)[0]
        return between.strip() if token in between else token

    @cached_property
    def _control(self) -> ControlTokens:
        marks = () if self._processor is None else (self.image_token or "", RAW_PLACEHOLDER)
        return ControlTokens(self._tokenizer, self._processor, self._source, marks, self._turns)

    # --- what a client may send -------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        for message in request.messages or ():
            role = message.role
            if role not in _ROLES and not self._names(role):
                raise _invalid(
                    f"a message of role {role!r}: send {', '.join(_ROLES[:-1])}, or a role that "
                    "the model's chat template names"
                )
        for name in sorted(_OURS.intersection(request.template_args)):
            raise _invalid(
                f"template_args cannot contain {name}: it comes from the model or has its own field"
            )

    def _names(self, role: str) -> bool:
        """Whether the template compares roles with this one."""
        quoted = (f"'{role}'", f'"{role}"')
        return role not in _NO_ROLES and any(text in self._source for text in quoted)

    def _asked(self, request: Request) -> Asked:
        try:
            return self._thinking_words.asked(request.template_args)
        except ValueError as error:
            raise _invalid(str(error), parameter=EFFORT) from None

    @cached_property
    def _thinking_words(self) -> ThinkingWords:
        def render(variables: dict[str, Any]) -> str | None:
            question = {"role": "user", "content": self._question}
            try:
                return str(
                    self._holder.apply_chat_template(
                        [question], tokenize=False, add_generation_prompt=True, **variables
                    )
                )
            except Exception:
                return None

        return find_words(self._source, render)

    @cached_property
    def _passed_over(self) -> frozenset[str]:
        parameters = inspect.signature(self._holder.apply_chat_template).parameters
        return frozenset(parameters).difference(_TAKEN)

    def _check_images(self, model: str, text: str, images: int) -> None:
        """Raise unless every image has a placeholder, if this template writes placeholders."""
        token = self.image_token
        if token is None or self._shown_image.count(token) != 1:
            return
        shown = text.count(token)
        if shown != images:
            raise _invalid(
                f"the chat template of model {model} shows {shown} of {images} images: put "
                "images into messages of role user"
            )

    # --- messages as the template reads them ------------------------------------------------------

    def _arguments(self, request: Request, turn: Breaker, other: Breaker) -> dict[str, Any]:
        """The arguments of `apply_chat_template`. `turn` rewrites the text of turns, `other` every
        other string from the client."""
        arguments = {
            name: rewritten(value, other)
            for name, value in self._asked(request).variables.items()
            if name not in self._passed_over
        }
        arguments.pop("continue_final_message", None)
        continue_final: bool | str = continues_message(request)
        if continue_final and _ends_in_thought(request):
            continue_final = "reasoning_content"
        add_prompt = bool(arguments.pop("add_generation_prompt", not continue_final))
        if request.tool_choice is not None:
            arguments["tool_choice"] = rewritten(request.tool_choice, other)
        result: dict[str, Any] = {
            "conversation": [
                self._message(message, turn, other) for message in request.messages or ()
            ],
            "tools": rewritten(_shown_tools(request.tools), other),
            "tokenize": False,
            "add_generation_prompt": add_prompt,
            "continue_final_message": continue_final,
        }
        return arguments | result

    def _apply(self, arguments: dict[str, Any]) -> str:
        try:
            return self._applied(arguments)
        except RequestError:
            conversation = _with_short_ids(arguments["conversation"])
            if conversation == arguments["conversation"]:
                raise
            try:
                return self._applied(arguments | {"conversation": conversation})
            except RequestError:
                pass  # the ids were not the cause, so report the first error
            raise

    def _applied(self, arguments: dict[str, Any]) -> str:
        try:
            return str(self._holder.apply_chat_template(**arguments))
        except MemoryError:
            raise
        except Exception as error:
            # A template is a program; whatever it raises fails only this request.
            raise _invalid(
                f"the model's chat template refuses these messages: {one_line(error)}"
            ) from None

    def _message(self, message: Message, turn: Breaker, other: Breaker) -> dict[str, Any]:
        """One message as templates expect it."""
        result: dict[str, Any] = {"role": message.role}
        speech = other if message.role in ("tool", "function") else turn
        called = message.tool_calls is not None
        content = self._content(message, self._forms_of(message.role, called=called), speech)
        if content is None and called:
            content = self._no_words
        if content is not None:
            result["content"] = content
        for name in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                result[name] = other(value)
        if message.tool_calls is not None:
            result["tool_calls"] = rewritten(_parsed_calls(message.tool_calls), other)
        return result

    def _content(self, message: Message, forms: _Forms, speech: Breaker) -> Any:
        if message.content is None and message.tool_calls is not None:
            return None
        # No content becomes empty text, because some templates read the first part (SmolVLM's).
        content = message.content or ""
        if isinstance(content, str):
            text = speech(content)
            return text if forms.text else [{"type": "text", "text": text}]
        pieces = list(_pieces(message))
        if forms.parts or (forms.part and not forms.text and None in pieces):
            return [
                {"type": "image"} if piece is None else {"type": "text", "text": speech(piece)}
                for piece in pieces
            ]
        # Join neighbouring texts first: together they may form a control token.
        joined = "".join(
            self.image_token or "" if piece is None else speech(piece) for piece in _joined(pieces)
        )
        return joined if forms.text else [{"type": "text", "text": joined}]

    # --- what the template reads ------------------------------------------------------------------

    def _forms_of(self, role: str, *, called: bool) -> _Forms:
        """The forms that a role's content may have; those of users if no attempt succeeds."""
        key = (role, called)
        if key not in self._forms:
            forms = self._tried(role, called=called)
            if not (forms.text or forms.part):
                if called:
                    forms = self._forms_of(role, called=False)
                elif role != "user":
                    forms = self._forms_of("user", called=False)
                else:
                    forms = _Forms(text=True, part=False, parts=False)
            self._forms[key] = forms
        return self._forms[key]

    def _tried(self, role: str, *, called: bool) -> _Forms:
        one, two = ({"type": "text", "text": word} for word in (_FIRST, _SECOND))
        return _Forms(
            text=self._reaches(role, _FIRST, [_FIRST], called=called),
            part=self._reaches(role, [one], [_FIRST], called=called),
            parts=self._reaches(role, [one, two], [_FIRST, _SECOND], called=called),
        )

    def _reaches(self, role: str, content: Any, words: list[str], *, called: bool) -> bool:
        """Whether the words of this content appear in the prompt as text, not as a printed list."""
        for conversation in self._conversations(role, content, called=called):
            for tools in (None, [_TOOL]):
                try:
                    text = str(
                        self._holder.apply_chat_template(conversation, tools=tools, tokenize=False)
                    )
                except Exception:
                    # Templates refuse an unknown order of turns.
                    continue
                if all(word in text for word in words) and not _LISTING.search(text):
                    return True
        return False

    def _conversations(
        self, role: str, content: Any, *, called: bool
    ) -> Iterator[list[dict[str, Any]]]:
        """Short conversations with a message of this role, in orders that templates accept."""
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "user":
            yield [message]
            return
        asked = {"role": "user", "content": self._question}
        if called:
            message["tool_calls"] = [_CALL]
        elif role not in ("system", "developer", "assistant"):
            calling = {"role": "assistant", "tool_calls": [_CALL]}
            if self._no_words is not None:
                calling["content"] = self._no_words
            yield [asked, calling, message | {"tool_call_id": _CALL["id"], "name": "f"}]
        yield [message, asked]
        yield [asked, message]
        yield [asked, message, asked]
        yield [message]

    @cached_property
    def _no_words(self) -> Any:
        """The content of a tool call without text: the first of no content, an empty string or
        list, and an empty text part that the template accepts."""
        calling = {"role": "assistant", "tool_calls": [_CALL]}
        whole = self._forms_of("assistant", called=False).text
        contents: list[dict[str, Any]] = [{}, {"content": ""}]
        if not whole:
            contents[1:] = [{"content": []}, {"content": [{"type": "text", "text": ""}]}]
        for content in contents:
            for tools in (None, [_TOOL]):
                try:
                    asked = {"role": "user", "content": self._question}
                    self._holder.apply_chat_template(
                        [asked, calling | content], tools=tools, tokenize=False
                    )
                except Exception:
                    continue
                return content.get("content")
        return None

    @cached_property
    def _turns(self) -> str:
        """Plain conversations as the template renders them, one after the other."""
        question = {"role": "user", "content": self._question}
        answer = {"role": "assistant", "content": self._plain("assistant")}
        system = {"role": "system", "content": self._plain("system")}
        rendered = []
        for turns in ([question], [system, question], [question, answer, question]):
            try:
                rendered.append(str(self._holder.apply_chat_template(turns, tokenize=False)))
            except Exception:
                # Templates refuse unknown roles.
                continue
        return "\n".join(rendered)

    def _plain(self, role: str) -> Any:
        """One word as the content of a role."""
        text = self._forms_of(role, called=False).text
        return "q" if text else [{"type": "text", "text": "q"}]

    @cached_property
    def _question(self) -> Any:
        """The content of the user's turn in probes of other roles."""
        return self._plain("user")

    @cached_property
    def _shown_image(self) -> str:
        """A user's image between two words, as the template renders them; empty if it fails."""
        content: Any = [{"type": "text", "text": _FIRST}, {"type": "image"}]
        content.append({"type": "text", "text": _SECOND})
        forms = self._forms_of("user", called=False) if self.present else None
        if self._processor is None or forms is None or not (forms.parts or forms.text):
            return ""
        if not forms.parts:
            content = f"{_FIRST}{self.image_token or ''}{_SECOND}"
        try:
            messages = [{"role": "user", "content": content}]
            return str(self._holder.apply_chat_template(messages, tokenize=False))
        except Exception:
            return ""

    def _find_image_token(self) -> str | None:
        if self._processor is None:
            return None
        # Gemma 3's placeholder is its start-of-image token; the processor expands it.
        return mark_text(self._processor, "boi_token") or mark_text(self._processor, "image_token")


def use_template(facts: ModelFacts, source: str) -> None:
    """Replace a model's chat template; an empty `source` changes nothing.

    Raises `EngineLoadError` for a template that Jinja cannot parse.
    """
    if not source:
        return
    for holder in (facts.tokenizer, facts.processor):
        if holder is not None:
            holder.chat_template = source
    try:
        facts.tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise EngineLoadError(f"--chat-template: line {error.lineno}: {error.message}") from None
    except Exception:
        # The template may need other messages than this one.
        return


def template_source(tokenizer: Any, processor: Any) -> str:
    """The source of a model's chat template; empty without one."""
    return _source(_holder(tokenizer, processor))


def continues_message(request: Request) -> bool:
    """Whether the answer continues the last message instead of starting a new one."""
    return request.messages is not None and bool(
        request.template_args.get("continue_final_message", False)
    )


def _ends_in_thought(request: Request) -> bool:
    """Whether the last message is a thought without content after it."""
    last = (request.messages or [Message(role="user")])[-1]
    return bool(last.reasoning_content) and not last.content and not last.tool_calls


# --- helpers --------------------------------------------------------------------------------------

#: Mistral's templates require nine letters or digits.
_CALL: dict[str, Any] = {
    "id": "abcdefgh1",
    "type": "function",
    "function": {"name": "f", "arguments": {"a": 1}},
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


def _holder(tokenizer: Any, processor: Any) -> Any:
    """The object that holds the chat template."""
    own = getattr(processor, "chat_template", None) is not None
    return processor if own else tokenizer


def _source(holder: Any) -> str:
    """The source of a chat template; if there are several named ones, all of them."""
    template = getattr(holder, "chat_template", None)
    if isinstance(template, dict):
        return "\n".join(map(str, template.values()))
    return template if isinstance(template, str) else ""


def _pieces(message: Message) -> Iterator[str | None]:
    """The texts of a message's parts; None for each image."""
    for part in message.content or ():
        if isinstance(part, str):
            yield part
        elif isinstance(part, TextPart):
            yield part.text
        elif isinstance(part, VideoPart):
            yield from (None for _ in part.attachments)
        else:
            yield None


def _joined(pieces: list[str | None]) -> Iterator[str | None]:
    """Joins neighbouring texts."""
    for images, run in groupby(pieces, lambda piece: piece is None):
        if images:
            yield from run
        else:
            yield "".join(piece or "" for piece in run)


def _with_short_ids(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with tool call ids of nine letters and digits, as Mistral's templates require.
    An id only has to be the same in a call and in its result."""

    def short(call_id: Any) -> str:
        return hashlib.blake2b(str(call_id).encode()).hexdigest()[:9]

    made = []
    for message in conversation:
        message = dict(message)
        if "tool_call_id" in message:
            message["tool_call_id"] = short(message["tool_call_id"])
        if "tool_calls" in message:
            calls = message["tool_calls"]
            message["tool_calls"] = [{**call, "id": short(call.get("id"))} for call in calls]
        made.append(message)
    return made


def _parsed_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls as templates expect them, with arguments as a map."""
    parsed = []
    for call in calls:
        function = call.get("function")
        if isinstance(function, dict):
            arguments = _argument_map(function.get("arguments"))
            call = {**call, "function": {**function, "arguments": arguments}}
        parsed.append(call)
    return parsed


def _argument_map(arguments: Any) -> dict[str, Any]:
    """The arguments of a call, which clients send as JSON text. Text that is cut off or malformed
    is kept under the name "arguments", so that the conversation can continue."""
    value = arguments
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            value = arguments
        if _nested_beyond(value, MAX_NESTING):
            value = arguments  # no template could render it
    if value is None:
        return {}
    return value if isinstance(value, dict) else {"arguments": value}


def _shown_tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools without `strict`, which concerns the engine and not the model."""
    shown = []
    for tool in tools or ():
        function = tool.get("function")
        if isinstance(function, dict):
            function = {key: value for key, value in function.items() if key != "strict"}
            shown.append(tool | {"function": function})
        else:
            shown.append({key: value for key, value in tool.items() if key != "strict"})
    return shown if tools else tools


def _nested_beyond(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_nested_beyond(item, levels - 1) for item in inner)


def _invalid(message: str, **details: Any) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message, details=details)
