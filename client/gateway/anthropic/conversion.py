"""From a body of the Messages API to a chat of OpenAI's form, so that only one conversion to the
bus is needed, and back to the body's own fields where an error names one.

* Turns of one role in a row are one message, as Anthropic has it: chat templates want them to
  alternate.
* The results of tools become messages of role `tool`. Their images follow in the user's message,
  numbered: few chat templates show an image anywhere else.
* A thought is checked against its signature and becomes the turn's reasoning.
* A message of role `system` behind the first turn is shown in the user's, marked: most chat
  templates refuse one there, and Claude Code sends one in every conversation.
* A system block that begins with `x-anthropic-billing-header:` is left out: Claude Code sends it
  for Anthropic's accounting, with a number that changes at every request, so that no prefix of
  the prompt could be reused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from client.gateway import requests as http
from client.gateway.anthropic.bodies import (
    AnyChoice,
    Base64Source,
    Citations,
    ContentSource,
    CountTokensRequest,
    DocumentBlock,
    FileSource,
    ImageBlock,
    InputMessage,
    MessagesRequest,
    NamedChoice,
    NoChoice,
    RedactedThinkingBlock,
    SearchResultBlock,
    TextBlock,
    TextSource,
    ThinkingBlock,
    ThinkingDisabled,
    ThinkingTurns,
    Tool,
    ToolResultBlock,
    ToolUseBlock,
    UrlSource,
)
from client.gateway.anthropic.signature import Signer
from client.gateway.errors import GatewayError, invalid

__all__ = ["Conversation", "as_conversation", "thinks"]

_BILLING: Final = "x-anthropic-billing-header:"
#: Types of tools that Anthropic runs or defines: they have a date, but for one.
_NOT_OURS: Final = re.compile(r"[a-z0-9_]+_20\d{6}|mcp_toolset")
_JSON: Final = msgspec.json.encode


@dataclass(slots=True)
class Conversation:
    """A body as a chat."""

    chat: http.ChatRequest
    #: For fields of the chat's messages, the fields of the body that they come from.
    places: dict[str, str]

    def named(self, error: GatewayError) -> GatewayError:
        """An error about a field of the chat, changed to name the field of the body."""
        param = error.param or ""
        for end in range(len(param), 0, -1):
            if (place := self.places.get(param[:end])) is not None:
                told = place + param[end:]
                words = error.info.message.replace(f"`{param}`", f"`{told}`")
                return GatewayError(error.info.code, words, param=told, status=error.status)
        return error


def thinks(body: CountTokensRequest) -> bool:
    """The model is asked to think, and its thoughts are part of the answer."""
    return body.thinking is not None and not isinstance(body.thinking, ThinkingDisabled)


def as_conversation(body: CountTokensRequest, signer: Signer) -> Conversation:
    """The equivalent chat. Raises GatewayError naming the field of the body."""
    http.refuse_unserved(body)
    turns = _Turns(signer)
    turns.system(body.system)
    for index, message in enumerate(body.messages):
        turns.add(message, f"messages[{index}]")
    _clear_thoughts(body, turns.messages)
    template_args: dict[str, Any] = {"enable_thinking": thinks(body)}
    if turns.messages[-1].role == "assistant":
        if turns.messages[-1].tool_calls:
            last = f"messages[{len(body.messages) - 1}]"
            raise invalid(last, f"`{last}` calls tools; their results must follow.")
        template_args["continue_final_message"] = True
    chat = http.ChatRequest(
        model=body.model,
        messages=turns.messages,
        tools=_tools(body),
        tool_choice=_tool_choice(body),
        parallel_tool_calls=_parallel(body),
        response_format=_format(body),
        # The models of the bus have an effort of their thoughts alone.
        reasoning_effort=body.output_config.effort if body.output_config and thinks(body) else None,
        service_tier="fast" if body.speed == "fast" else None,
        user=body.metadata.user_id if body.metadata else None,
        chat_template_kwargs=template_args | (body.chat_template_kwargs or {}),
        **{name: getattr(body, name) for name in http.Extensions.__struct_fields__},
    )
    if isinstance(body, MessagesRequest):
        stop = [chat.stop] if isinstance(chat.stop, str) else chat.stop or []
        chat.stop = [*(body.stop_sequences or []), *stop]
        chat.stream = body.stream
        chat.temperature = body.temperature
        chat.top_p = body.top_p
        chat.max_tokens = max(body.max_tokens, 1)
    return Conversation(chat, turns.places)


# --- turns ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turns:
    """The chat's messages in the making."""

    signer: Signer
    messages: list[http.ChatMessage] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    #: Images of the results of tools, to be shown in the user's message.
    _shown: list[tuple[str, str, str]] = field(default_factory=list)

    def system(self, system: str | list[TextBlock] | None) -> None:
        """The system prompt."""
        if isinstance(system, str):
            system = [TextBlock(text=system)] if system else []
        for index, block in enumerate(system or []):
            if not block.text.startswith(_BILLING):
                self._say("system", block.text, f"system[{index}]")

    def add(self, message: InputMessage, path: str) -> None:
        """A message. Raises GatewayError."""
        if message.role == "system" and any(one.role != "system" for one in self.messages):
            for text, at in _system_texts(message, path):
                self._say("user", f"<system>\n{text}\n</system>", at)
            return
        if isinstance(message.content, str):
            self._say(message.role, message.content, f"{path}.content")
            return
        if message.role != "user" or not message.content:
            # Also where nothing of it is for the model: turns alternate.
            self._parts(message.role, path)
        for index, block in enumerate(message.content):
            at = f"{path}.content[{index}]"
            match block:
                case ThinkingBlock() | RedactedThinkingBlock() | ToolUseBlock():
                    if message.role != "assistant":
                        raise _misplaced(at, "assistant")
                    self._of_assistant(block, at)
                case ToolResultBlock():
                    if message.role != "user":
                        raise _misplaced(at, "user")
                    self._result(block, at)
                case ImageBlock():
                    self._show_results()
                    self._image(message.role, block, at)
                case _:
                    self._show_results()
                    for part in _texts(block, at):
                        if isinstance(part, str):
                            self._say(message.role, part, at)
                        else:
                            self._image(message.role, *part)
        self._show_results()

    def _of_assistant(
        self, block: ThinkingBlock | RedactedThinkingBlock | ToolUseBlock, path: str
    ) -> None:
        self._parts("assistant", path)
        turn = self.messages[-1]
        if isinstance(block, ToolUseBlock):
            function = http.CalledFunction(name=block.name, arguments=_JSON(block.input).decode())
            turn.tool_calls = [
                *(turn.tool_calls or []),
                http.ToolCall(id=block.id, function=function),
            ]
        elif isinstance(block, ThinkingBlock):
            thought = self.signer.read(block.thinking, block.signature)
            if thought is None:
                where = f"{path}.signature"
                raise invalid(
                    where,
                    f"`{where}` does not fit the thought: the block was altered, or another server "
                    "signed it. Send it as it came, or leave it out.",
                )
            turn.reasoning_content = (turn.reasoning_content or "") + thought

    def _result(self, block: ToolResultBlock, path: str) -> None:
        texts: list[str] = []
        content = block.content or ""
        for index, one in enumerate([] if isinstance(content, str) else content):
            at = f"{path}.content[{index}]"
            shown = [(one, at)] if isinstance(one, ImageBlock) else _texts(one, at)
            for part in shown:
                if isinstance(part, str):
                    texts.append(part)
                else:
                    label = f"[image {len(self._shown) + 1}]"
                    texts.append(label)
                    self._shown.append((label, *_address(*part)))
        text = content if isinstance(content, str) else "\n".join(texts)
        if block.is_error and not text.lower().startswith("error"):
            text = f"Error: {text}"
        self.places[f"messages[{len(self.messages)}]"] = path
        self.messages.append(
            http.ChatMessage(role="tool", tool_call_id=block.tool_use_id, content=text)
        )

    def _show_results(self) -> None:
        """The images of the results so far."""
        shown, self._shown = self._shown, []
        for label, url, place in shown:
            self._say("user", label, place)
            self._append_image("user", url, place)

    # --- messages and parts ---

    def _begin(self, role: Any, path: str) -> None:
        self.places[f"messages[{len(self.messages)}]"] = path.partition(".")[0]
        self.messages.append(http.ChatMessage(role=role, content=[]))

    def _parts(self, role: Any, path: str) -> list[http.ContentPart]:
        if not self.messages or self.messages[-1].role != role:
            self._begin(role, path)
        content = self.messages[-1].content
        assert isinstance(content, list)
        return content

    def _say(self, role: Any, text: str, path: str) -> None:
        self._parts(role, path).append(http.TextPart(text=text))

    def _image(self, role: str, block: ImageBlock, path: str) -> None:
        if role != "user":
            raise _misplaced(path, "user")
        self._append_image(role, *_address(block, path))

    def _append_image(self, role: str, url: str, place: str) -> None:
        parts = self._parts(role, place)
        where = f"messages[{len(self.messages) - 1}].content[{len(parts)}].image_url.url"
        self.places[where] = place
        parts.append(http.ImagePart(image_url=http.ImageUrl(url=url)))


def _system_texts(message: InputMessage, path: str) -> list[tuple[str, str]]:
    """The texts of a message of role `system`, with their paths. Raises GatewayError."""
    if isinstance(message.content, str):
        return [(message.content, f"{path}.content")]
    texts = []
    for index, block in enumerate(message.content):
        at = f"{path}.content[{index}]"
        if not isinstance(block, TextBlock):
            raise invalid(at, f"`{at}`: a message of role `system` holds text alone.")
        texts.append((block.text, at))
    return texts


def _misplaced(path: str, role: str) -> GatewayError:
    return invalid(path, f"`{path}`: a block of this type belongs in a message of role `{role}`.")


def _address(block: ImageBlock, path: str) -> tuple[str, str]:
    """The URL of an image and the field that holds it. Raises GatewayError."""
    match block.source:
        case Base64Source(media_type=media_type, data=data):
            return f"data:{media_type};base64,{data}", f"{path}.source.data"
        case UrlSource(url=url):
            return url, f"{path}.source.url"
        case FileSource():
            where = f"{path}.source.file_id"
            raise invalid(where, f"`{where}`: no files are kept here; send the image as base64.")


def _texts(block: Any, path: str) -> list[str | tuple[ImageBlock, str]]:
    """A block that is read as text: its text, and the images in it with their paths. Raises
    GatewayError."""
    match block:
        case TextBlock(text=text):
            return [text]
        case SearchResultBlock():
            _check_citations(block.citations, path)
            text = "\n".join(one.text for one in block.content)
            head = f"<source>{block.source}</source>\n<title>{block.title}</title>\n"
            return [f"<search_result>\n{head}{text}\n</search_result>"]
        case DocumentBlock():
            return _document(block, path)
    raise _misplaced(path, "user or assistant, and not in here")


def _document(block: DocumentBlock, path: str) -> list[str | tuple[ImageBlock, str]]:
    _check_citations(block.citations, path)
    inside: list[str | tuple[ImageBlock, str]]
    match block.source:
        case TextSource(data=text):
            inside = [text]
        case ContentSource(content=content):
            inside = []
            blocks = [TextBlock(text=content)] if isinstance(content, str) else content
            for index, one in enumerate(blocks):
                at = f"{path}.source.content[{index}]"
                inside.append((one, at) if isinstance(one, ImageBlock) else one.text)
        case _:
            where = f"{path}.source"
            raise invalid(
                where,
                f"`{where}`: models of the bus read no files. Send the document's text (a source "
                "of type `text`), or its pages as images.",
            )
    head = f"<title>{block.title}</title>\n" if block.title else ""
    head += f"<context>{block.context}</context>\n" if block.context else ""
    return [f"<document>\n{head}".rstrip("\n"), *inside, "</document>"]


def _check_citations(citations: Citations | None, path: str) -> None:
    if citations is not None and citations.enabled:
        where = f"{path}.citations.enabled"
        raise invalid(where, f"`{where}`: models of the bus do not cite; leave it out.")


def _clear_thoughts(body: CountTokensRequest, messages: list[http.ChatMessage]) -> None:
    """Drop the thoughts that the edits of `context_management` clear."""
    for edit in (body.context_management.edits if body.context_management else None) or []:
        if edit.keep is None or isinstance(edit.keep, ThinkingTurns):
            kept = edit.keep.value if edit.keep is not None else 1
            for message in [one for one in messages if one.reasoning_content][:-kept]:
                message.reasoning_content = None


# --- tools and format -----------------------------------------------------------------------------


def _tools(body: CountTokensRequest) -> list[http.Tool]:
    """The tools that the model may call. Raises GatewayError if there are only others."""
    functions: list[http.Tool] = []
    left_out: list[str] = []
    for index, raw in enumerate(body.tools or []):
        path = f"tools[{index}]"
        kind = raw.get("type")
        if isinstance(kind, str) and _NOT_OURS.fullmatch(kind):
            left_out.append(f"{path}.type")
            continue
        tool = http.converted(raw, Tool, path)
        parameters = tool.input_schema
        if tool.input_examples:
            parameters = {**parameters, "examples": tool.input_examples}
        functions.append(
            http.Tool(
                type="function",
                function=http.Function(
                    name=tool.name,
                    description=tool.description,
                    parameters=parameters,
                    strict=tool.strict,
                ),
            )
        )
    if left_out and not functions:
        raise invalid(
            left_out[0],
            f"`{left_out[0]}`: nothing here runs or defines such a tool; send tools with an "
            "`input_schema`, which run at the caller.",
        )
    return functions


def _tool_choice(body: CountTokensRequest) -> http.ToolChoice | None:
    match body.tool_choice:
        case AnyChoice():
            return "required"
        case NoChoice():
            return "none"
        case NamedChoice(name=name):
            return http.NamedTool(function=http.NamedFunction(name=name))
    return None


def _parallel(body: CountTokensRequest) -> bool | None:
    if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
        return False
    return None


def _format(body: CountTokensRequest) -> http.ResponseFormat | None:
    wanted = (body.output_config.format if body.output_config else None) or body.output_format
    if wanted is None:
        return None
    return http.JsonSchemaFormat(json_schema=http.JsonSchema(name="answer", schema=wanted.schema))
