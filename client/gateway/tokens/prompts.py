"""Prompts of every form that llama.cpp takes: texts, token ids, both mixed, objects.

Texts among token ids are looked up by a worker of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from client.gateway.context import RequestContext
from client.gateway.errors import invalid
from client.gateway.requests import MAX_TEXTS
from client.gateway.tokens.asking import ids_of

__all__ = ["Prompt", "prompts_of", "written"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: texts and token ids, one after the other."""

    pieces: tuple[str | list[int], ...] = field(default_factory=tuple)

    @property
    def single(self) -> str | list[int] | None:
        """Its text or its ids, where it is not mixed."""
        return self.pieces[0] if len(self.pieces) == 1 else None


def prompts_of(field_name: str, value: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they were a list of several. Raises GatewayError."""
    is_list = isinstance(value, list)
    if not is_list or any(_is_id(item) for item in value):
        return [_prompt(field_name, value)], False
    if not value:
        raise invalid(field_name, f"`{field_name}` is empty.")
    if len(value) > MAX_TEXTS:
        raise invalid(
            field_name,
            f"`{field_name}` holds {len(value)} prompts; {MAX_TEXTS} are allowed.",
        )
    return [_prompt(f"{field_name}[{place}]", item) for place, item in enumerate(value)], True


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _prompt(path: str, value: Any) -> Prompt:
    if isinstance(value, str):
        return Prompt((value,))
    if isinstance(value, dict):
        if value.get("multimodal_data"):
            raise invalid(
                f"{path}.multimodal_data",
                f"`{path}.multimodal_data` is not served here: send images in a message to "
                "/v1/chat/completions.",
            )
        if unknown := set(value) - {"prompt_string", "multimodal_data", "content"}:
            name = f"{path}.{min(unknown)}"
            raise invalid(name, f"`{name}` is not a field of this endpoint.")
        if "content" in value:
            return Prompt((_text(f"{path}.content", value["content"]),))
        text = value.get("prompt_string")
        if not isinstance(text, str):
            raise invalid(f"{path}.prompt_string", f"`{path}.prompt_string` must be a text.")
        return Prompt((text,))
    if not isinstance(value, list) or not value:
        raise invalid(path, f"`{path}` must be a text, token ids, both mixed, or several of these.")
    pieces: list[str | list[int]] = []
    for place, item in enumerate(value):
        if isinstance(item, str):
            pieces.append(item)
        elif _is_id(item) and 0 <= item < 1 << 31:
            if not pieces or isinstance(pieces[-1], str):
                pieces.append([])
            last = pieces[-1]
            assert isinstance(last, list)
            last.append(item)
        else:
            name = f"{path}[{place}]"
            raise invalid(name, f"`{name}` must be a text or a token id.")
    return Prompt(tuple(pieces))


def _text(path: str, parts: Any) -> str:
    """The text of the parts of a message."""
    if not isinstance(parts, list) or not parts:
        raise invalid(path, f"`{path}` must be a list of parts of type `text`.")
    for place, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise invalid(f"{path}[{place}]", f"`{path}[{place}]` must be a part of type `text`.")
    return "".join(part["text"] for part in parts)


async def written(
    context: RequestContext, model: str, prompt: Prompt, field: str
) -> str | list[int]:
    """The prompt as the bus takes it: a text, or token ids. Texts among ids are looked up, the
    first of them with the tokens that begin a prompt if nothing stands before it."""
    if prompt.single is not None:
        return prompt.single
    ids: list[int] = []
    for place, piece in enumerate(prompt.pieces):
        if isinstance(piece, str):
            ids += await ids_of(context, model, piece, field, add_special=place == 0)
        else:
            ids += piece
    return ids
