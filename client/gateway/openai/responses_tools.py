"""The tools of a response: functions, alone or in groups (`namespace`), and what is left out.

The model knows a function of a group as `GROUP__NAME`, as its chat template has no groups; the
caller reads the group and the name apart. Must never drop a function.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from client.gateway import requests as http
from client.gateway.errors import invalid

__all__ = ["OfferedFunction", "full_name", "functions_of", "told_tools"]


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class FunctionTool(_Body, kw_only=True):
    """A function of the caller."""

    type: Literal["function"]
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None
    cache_control: http.Label = None
    #: The format of the function's answer; the model sees the answer itself.
    output_schema: http.Label = None
    #: Models of the bus make calls in their answer ("direct").
    allowed_callers: http.Label = None
    async_: http.Label = msgspec.field(default=None, name="async")
    #: The model is always given all tools at once.
    defer_loading: http.Label = None


class Namespace(_Body, kw_only=True):
    """A group of functions."""

    type: Literal["namespace"]
    name: Annotated[str, Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    tools: Annotated[list[dict[str, Any]], Meta(min_length=1, max_length=http.MAX_TOOLS)]


#: Kinds of tools that OpenAI runs itself, or whose calls have a special form.
_RUN_ELSEWHERE: Final = (
    "apply_patch",
    "code_interpreter",
    "computer",
    "computer_use_preview",
    "custom",
    "file_search",
    "image_generation",
    "local_shell",
    "mcp",
    "programmatic_tool_calling",
    "shell",
    "tool_search",
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
)


class OfferedFunction(Struct, frozen=True):
    """A function that the model may call."""

    tool: FunctionTool
    #: Its group; None if it stands alone.
    group: Namespace | None = None

    @property
    def name(self) -> str:
        """By which the model knows it."""
        return full_name(None if self.group is None else self.group.name, self.tool.name)

    @property
    def shown(self) -> http.Tool:
        """It in the words of a chat; the description of its group stands before its own."""
        group = None if self.group is None else self.group.description
        description = " ".join(filter(None, (group, self.tool.description)))
        return http.Tool(
            type="function",
            function=http.Function(
                name=self.name,
                description=description or self.tool.description,
                parameters=self.tool.parameters,
                strict=self.tool.strict,
            ),
        )


def full_name(group: str | None, name: str) -> str:
    """By which the model knows a function."""
    return name if group is None else f"{group}__{name}"


def functions_of(tools: list[dict[str, Any]] | None) -> list[OfferedFunction]:
    """The functions that the model may call. Tools that OpenAI runs itself are left out, because
    agents send them along with their functions to any server. Raises GatewayError if there are
    no other tools, or two of one name."""
    functions: list[OfferedFunction] = []
    left_out: list[str] = []
    for index, tool in enumerate(tools or []):
        path = f"tools[{index}]"
        if tool.get("type") != "namespace":
            _take(tool, path, None, functions, left_out)
            continue
        group = http.converted(tool, Namespace, path)
        for place, inner in enumerate(group.tools):
            _take(inner, f"{path}.tools[{place}]", group, functions, left_out)
    if left_out and not functions:
        raise invalid(
            left_out[0],
            f"`{left_out[0]}`: nothing here runs such a tool; send functions, which run at the "
            "caller.",
        )
    if any(one.group is not None for one in functions):
        http.check_count("tools", "functions", len(functions), http.MAX_TOOLS)
        names = [one.name for one in functions]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise invalid("tools", f"`tools`: two functions are called {twice!r} by the model.")
    return functions


def _take(
    tool: dict[str, Any],
    path: str,
    group: Namespace | None,
    functions: list[OfferedFunction],
    left_out: list[str],
) -> None:
    kind = tool.get("type")
    if kind in _RUN_ELSEWHERE:
        left_out.append(f"{path}.type")
        return
    if kind != "function":
        told = (
            f"Invalid value {kind!r}; allowed are 'function', 'namespace' and, beside functions, "
        )
        known = ", ".join(map(repr, _RUN_ELSEWHERE))
        raise invalid(f"{path}.type", f"`{path}.type`: {told}{known}.")
    functions.append(OfferedFunction(http.converted(tool, FunctionTool, path), group))


def told_tools(functions: list[OfferedFunction]) -> list[dict[str, Any]]:
    """The tools as the response repeats them: with the fields that OpenAI's always have."""
    told: list[dict[str, Any]] = []
    for one in functions:
        if one.group is None:
            told.append({**_told(one.tool)})
            continue
        if not (told and told[-1].get("name") == one.group.name and "tools" in told[-1]):
            description = one.group.description or ""
            told.append(
                {
                    "type": "namespace",
                    "name": one.group.name,
                    "description": description,
                    "tools": [],
                }
            )
        told[-1]["tools"].append(_told(one.tool))
    return told


def _told(tool: FunctionTool) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": bool(tool.strict),
    }
