"""Prompts for filling in a middle: what stands before and behind it, between the tokens that the
model was trained with. A model whose tokenizer has none of them is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from client.gateway.context import RequestContext
from client.gateway.convert import Generation, checked
from client.gateway.errors import invalid
from client.gateway.tokens.asking import facts_of, ids_of

__all__ = ["InfillForm", "infill_form", "with_suffix"]

#: What llama.cpp calls the repository of the files that it is told of.
_REPOSITORY = "myproject\n"
#: And the file that is written in.
_FILE = "filename\n"
_SNIPPET = "\n\n--- snippet ---\n\n"


@dataclass(frozen=True, slots=True)
class InfillForm:
    """How a model is shown a middle to fill in."""

    context: RequestContext
    model: str
    #: Ids by role: prefix, suffix, middle, and those that the model has of pad, end, repository and
    #: file.
    marks: dict[str, int]
    #: What every prompt begins with.
    begins: list[int]

    @property
    def ends(self) -> list[int]:
        """Tokens that end the middle."""
        roles = ("pad", "end", "repository", "file")
        return [self.marks[role] for role in roles if role in self.marks]

    async def ids_of(self, text: str, field: str) -> list[int]:
        """The tokens of a text without those that begin a prompt. Raises GatewayError for one that
        has a mark itself."""
        ids = await ids_of(self.context, self.model, text, field, add_special=False) if text else []
        if not set(ids).isdisjoint(self.marks.values()):
            raise invalid(field, f"`{field}` holds a mark of model {self.model!r} for infilling.")
        return ids

    async def extra(self, files: Sequence[tuple[str, str]], field: str) -> list[int]:
        """What is shown before the prefix: names and texts of other files."""
        if not files:
            return []
        found: list[int] = []
        repository, file = self.marks.get("repository"), self.marks.get("file")
        if repository is not None:
            found += [repository, *await self.ids_of(_REPOSITORY, field)]
        for name, text in files:
            if file is not None:
                found += [file, *await self.ids_of(f"{name}\n", field)]
            else:
                found += await self.ids_of(_SNIPPET, field)
            found += await self.ids_of(text, field)
        if file is not None:
            found += [file, *await self.ids_of(_FILE, field)]
        return found

    def prompt(self, before: list[int], after: list[int], extra: Sequence[int] = ()) -> list[int]:
        """The prompt whose answer is the middle."""
        marks = self.marks
        return [
            *(*self.begins, *extra, marks["prefix"], *before),
            *(marks["suffix"], *after, marks["middle"]),
        ]


async def infill_form(context: RequestContext, model: str, field: str) -> InfillForm:
    """The model's form. Raises GatewayError naming `field` if it has none."""
    marks = await facts_of(context, model, "infill", field)
    if not marks:
        raise invalid(
            field,
            f"`{field}` is not served for model {model!r}: its tokenizer has no tokens for filling "
            "in a middle (such as <|fim_prefix|>, <|fim_suffix|> and <|fim_middle|>).",
        )
    begins = marks.pop("begins", [])
    return InfillForm(context, model, marks, begins)


async def with_suffix(
    context: RequestContext, asked: Sequence[Generation], suffix: str
) -> list[Generation]:
    """Completions of one model whose prompts stand before the middle that is asked for, and the
    suffix behind it. Raises GatewayError."""
    form = await infill_form(context, asked[0].request.model, "suffix")
    after = await form.ids_of(suffix, "suffix")
    found: list[Generation] = []
    for one in asked:
        request = one.request
        before = request.token_ids
        if before is None:
            before = await form.ids_of(request.prompt or "", "prompt")
        stops = [*request.params.stop_token_ids, *form.ends]
        request = msgspec.structs.replace(
            request,
            prompt=None,
            token_ids=form.prompt(before, after),
            params=msgspec.structs.replace(request.params, stop_token_ids=stops),
        )
        found.append(replace(one, request=checked(request)))
    return found
