"""Lists in pages, as OpenAI's API has them (`after`, `limit`, `order`), and the labels of entries.

Every parameter is honoured or refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, TypeVar

from msgspec import Meta

from client.gateway.context import RequestContext
from client.gateway.errors import invalid
from client.gateway.openai.responses_body import check_include
from client.gateway.requests import number_of

__all__ = ["INCLUDE", "Metadata", "Page", "check_query", "page_of"]

T = TypeVar("T")

#: Labels that a caller gives to what is kept, within OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]

#: What a list of items may be asked to have as well.
INCLUDE: Final = ("include", "include[]")

_MOST: Final = 100


@dataclass(frozen=True, slots=True)
class Page:
    """What of a list a request asks for."""

    #: The id behind which it begins.
    after: str | None
    limit: int
    order: str

    @classmethod
    def asked(
        cls, context: RequestContext, *also: str, order: Literal["asc", "desc"] = "desc"
    ) -> Page:
        """By the query of a request, in which `also` may stand as well; `order` where it says none.
        Raises GatewayError naming the parameter."""
        check_query(context, "after", "limit", "order", *also)
        query = context.request.query_params
        asked, limit = query.get("order", order), number_of(query.get("limit", "20"))
        if asked not in ("asc", "desc"):
            raise invalid("order", "`order` is `asc` or `desc`.")
        if limit is None or not 1 <= limit <= _MOST:
            raise invalid("limit", f"`limit` is a number from 1 to {_MOST}.")
        return cls(query.get("after"), limit, asked)


def page_of(
    kept: Sequence[T], page: Page, id_of: Callable[[T], str], of: str
) -> tuple[list[T], dict[str, Any]]:
    """The entries of a page, of `kept` in the order in which they came, and the list around them
    without its `data`. `of`: what they belong to, in words. Raises GatewayError for an unknown
    `after`."""
    listed = list(kept)
    if page.order == "desc":
        listed.reverse()
    if page.after is not None:
        at = next((i for i, entry in enumerate(listed) if id_of(entry) == page.after), None)
        if at is None:
            raise invalid("after", f"`after` names {page.after!r}, which is not {of}.")
        listed = listed[at + 1 :]
    shown = listed[: page.limit]
    around = {
        "object": "list",
        "first_id": id_of(shown[0]) if shown else None,
        "last_id": id_of(shown[-1]) if shown else None,
        "has_more": len(shown) < len(listed),
    }
    return shown, around


def check_query(context: RequestContext, *known: str) -> None:
    """Raises GatewayError for a parameter that is not known, or a value of `include`."""
    query = context.request.query_params
    for name in query:
        # `beta=true` is what OpenAI's clients send for another version of the same.
        if name not in (*known, "beta"):
            raise invalid(name, f"`{name}` is not a parameter of this endpoint; remove it.")
    for entry in (*query.getlist("include"), *query.getlist("include[]")):
        check_include(entry)
