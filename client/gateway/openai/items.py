"""Items of a conversation as they are kept and read again: with an id, a status, and every field
that OpenAI's clients expect there.

Must never change what a model is shown: `responses_body` makes chat messages of kept items just as
of those that a caller sends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from client.gateway import requests as http
from client.gateway.errors import invalid
from client.gateway.openai.answers import new_id
from client.gateway.openai.responses_body import turns_of, typed
from client.gateway.openai.responses_input import Item, ItemReference

__all__ = ["bytes_of", "kept_items"]

_PREFIXES: Final = {
    "message": "msg_",
    "function_call": "fc_",
    "function_call_output": "fco_",
    "reasoning": "rs_",
    "compaction": "cmp_",
}


def kept_items(
    given: str | Iterable[dict[str, Any]], path: str, taken: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """What a caller sent as `path`, as items that are kept; one with an id that is `taken` gets
    another. Raises GatewayError naming the field."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    ids = set(taken)
    kept = []
    for index, raw in enumerate(given):
        where = f"{path}[{index}]"
        item = typed(raw)
        checked = http.converted(item, Item, where)
        http.refuse_unserved(checked, where)
        if isinstance(checked, ItemReference):
            raise invalid(where, f"`{where}` refers to an item; send the item itself.")
        item = {name: value for name, value in item.items() if value is not None}
        if item.get("id", "") in ids or "id" not in item:
            item["id"] = new_id(_PREFIXES[item["type"]])
        ids.add(item["id"])
        kept.append(_whole(item))
    # What a model could not be shown is refused now, and not by each response that stands on it.
    turns_of(kept, path)
    return kept


def bytes_of(items: Iterable[dict[str, Any]]) -> int:
    """What items take, as JSON."""
    return sum(len(msgspec.json.encode(item)) for item in items)


def _whole(item: dict[str, Any]) -> dict[str, Any]:
    """An item with the fields that its kind always has."""
    match item["type"]:
        case "message":
            said = "output_text" if item["role"] == "assistant" else "input_text"
            content = item["content"]
            parts = [{"type": said, "text": content}] if isinstance(content, str) else content
            return {"status": "completed", **item, "content": [_whole_part(part) for part in parts]}
        case "function_call_output":
            output = item["output"]
            if not isinstance(output, str):
                output = [_whole_part(part) for part in output]
            return {"status": "completed", **item, "output": output}
        case "function_call":
            return {"status": "completed", **item}
        case "reasoning":
            return {"summary": [], **item}
        case _:
            return item


def _whole_part(part: dict[str, Any]) -> dict[str, Any]:
    match part["type"]:
        case "output_text":
            return {"annotations": [], "logprobs": [], **part}
        case "input_image":
            return {"detail": "auto", **part}
        case _:
            return part
