"""`GET /v1/usage` and `GET /me`: what the caller's own key has used and may use; for operators,
what every key has used."""

from __future__ import annotations

import datetime
from typing import Any, Final

import msgspec
from starlette.responses import Response

from broker.protocol.errors import ErrorCode
from client.gateway.accounts import Accounts, next_month, today
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, invalid
from client.gateway.requests import number_of

__all__ = ["me", "usage"]

_DAYS: Final = 31
_MAX_DAYS: Final = 3660
#: Of which every row is meant, for operators.
_ALL: Final = "*"


async def usage(context: RequestContext) -> Response:
    """Requests and tokens by day and model, the newest first.

    `?days=N`: of so many days, today included. `?key=NAME`, or `*`: of another key, for operators.
    """
    accounts = context.gateway.accounts
    if accounts is None:
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            "This gateway does not count tokens; start it with --usage FILE.",
            status=404,
        )
    query = context.request.query_params
    for name in query:
        if name not in ("days", "key"):
            raise invalid(name, f"`{name}` is not a parameter of this path: days, key.")
    days = number_of(query.get("days", str(_DAYS)))
    if days is None or not 1 <= days <= _MAX_DAYS:
        raise invalid("days", f"`days` is a number from 1 to {_MAX_DAYS}.")
    key: str | None = query.get("key", context.key.name)
    if key != context.key.name:
        context.check_operator()
    since = today() - datetime.timedelta(days=days - 1)
    rows = await accounts.rows(None if key == _ALL else key, since)
    counted = ("requests", "prompt_tokens", "completion_tokens")
    totals = {name: sum(row[name] for row in rows) for name in counted}
    return _json({"object": "list", "since": since.isoformat(), "data": rows, "totals": totals})


async def me(context: RequestContext) -> Response:
    """The caller's key: what it may do, its budgets, and what it has used of them."""
    key, accounts = context.key, context.gateway.accounts
    return _json(
        {
            "object": "key",
            "name": key.name,
            "operator": key.operator,
            "models": None if key.models is None else sorted(key.models),
            "rate_per_minute": key.rate_per_minute,
            "concurrency": key.concurrency,
            "max_priority": key.max_priority,
            "expires": key.expires,
            "tokens": None if accounts is None else await _tokens(context, accounts),
        }
    )


async def _tokens(context: RequestContext, accounts: Accounts) -> dict[str, Any]:
    of_day, of_month = await accounts.used(context.key.name)
    day = today()
    return {
        "day": _span(of_day, context.key.tokens_per_day, day + datetime.timedelta(days=1)),
        "month": _span(of_month, context.key.tokens_per_month, next_month(day)),
    }


def _span(used: int, budget: int | None, ends: datetime.date) -> dict[str, Any]:
    left = None if budget is None else max(budget - used, 0)
    return {"used": used, "budget": budget, "left": left, "resets_at": f"{ends}T00:00:00Z"}


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
