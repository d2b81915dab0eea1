"""The tools of a request as the caller gives them, and tool calls as the caller receives them.

Pure. The arguments of a call are parsed and checked when the application asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from client.core.shapes import Shape, read_json, shape_of
from client.errors import InvalidAnswer, InvalidRequest

__all__ = ["Reading", "Tool", "ToolCall", "tool_from"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    #: The JSON schema of its arguments; None if it takes none.
    parameters: Mapping[str, Any] | None
    #: Set if the tool was given as a class.
    shape: Shape | None = None

    def check(self, arguments: Any, where: str) -> dict[str, Any]:
        """The arguments, if they fit the schema. Raises `InvalidAnswer`."""
        if not isinstance(arguments, dict):
            raise InvalidAnswer(f"{where} are not an object")
        if not self.parameters:
            return arguments
        try:
            import jsonschema_rs  # an extra, needed only by users of tools
        except ImportError:
            raise ImportError(
                "the arguments of a tool call are checked by the package jsonschema-rs: install "
                "tokenbus[tools], or read the unchecked `call.arguments_json`"
            ) from None
        try:
            validator = jsonschema_rs.validator_for(
                dict(self.parameters), retriever=_nothing_is_fetched
            )
        except ValueError as error:
            why = str(error).partition("\n")[0]
            raise InvalidRequest(
                f"the parameters of tool {self.name!r} are not a JSON schema: {why}"
            ) from None
        for wrong in validator.iter_errors(arguments):
            path = ".".join(str(step) for step in wrong.instance_path)
            raise InvalidAnswer(
                f"{where} do not fit its schema{path and f' at {path}'}: {wrong.message}"
            )
        return arguments


def _nothing_is_fetched(uri: str) -> Any:
    raise ValueError(f"it refers to {uri}, which stands outside of it")


def tool_from(given: Any) -> tuple[Mapping[str, Any], Tool | None]:
    """A tool as a caller gives it: the form that is sent, and the `Tool`; None for a form that only
    the model's chat template understands. Raises `InvalidRequest`."""
    if isinstance(given, Mapping):
        function = given.get("function", given)
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str):
            return given, None
        parameters = function.get("parameters")
        return given, Tool(name, parameters if isinstance(parameters, Mapping) else None)
    if not isinstance(given, type):
        raise InvalidRequest(
            f"a tool cannot be of type {type(given).__name__}; give OpenAI's form, "
            '{"type": "function", "function": {"name": ..., "parameters": ...}}, or a class'
        )
    shape = shape_of(given)
    schema = dict(shape.schema or {})
    function = {"name": shape.name, "parameters": schema}
    # Without a docstring, pydantic has no description, and a dataclass has one that says nothing.
    if description := schema.pop("description", None):
        function["description"] = description
    return {"type": "function", "function": function}, Tool(shape.name, schema, shape)


@dataclass(frozen=True)
class ToolCall:
    """A complete call of a tool. Its arguments are checked when they are asked for."""

    #: Give this back as `tool_call_id` in the message with the tool's result.
    id: str
    name: str
    #: As the model wrote them.
    arguments_json: str
    tool: Tool
    #: The answer ended in the middle of the call.
    cut: bool = False

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, checked against the tool's schema.

        Raises `InvalidAnswer` for JSON that is cut off, malformed or does not fit the schema, and
        `ImportError` without the extra `tools`, which checks it.
        """
        where = f"the arguments of the call of {self.name!r}"
        if self.cut:
            raise InvalidAnswer(f"{where} are cut off: the answer ended there; raise max_tokens")
        if self.tool.shape is not None:
            self.parsed  # noqa: B018  # the class is the check
            found: dict[str, Any] = read_json(self.arguments_json, where)
            return found
        return self.tool.check(read_json(self.arguments_json, where), where)

    @cached_property
    def parsed(self) -> Any:
        """The arguments as an instance of the class that the tool was given as; `arguments` if it
        was not a class. Raises like `arguments`."""
        if self.tool.shape is None or self.cut:
            return self.arguments
        try:
            return self.tool.shape.read(self.arguments_json)
        except InvalidAnswer as error:
            why = str(error).removeprefix("the answer does not fit ")
            raise InvalidAnswer(
                f"the arguments of the call of {self.name!r} do not fit {why}"
            ) from error.__cause__


@dataclass(frozen=True, slots=True)
class Reading:
    """How to find calls in an answer."""

    tools: tuple[Tool, ...]
    #: The answer consists of calls only.
    forced: bool
    #: Special tokens are part of the text.
    shows_special: bool
    #: The caller asked for prompt token ids or logprobs as well.
    shows_prompt: bool
