"""The body of `POST /v1/systemone` as a typed value. Must never talk to the bus."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from msgspec import Meta, Struct

from client.gateway.requests import ModelName

__all__ = ["MAX_ASSETS", "Asset", "SystemOneRequest"]

MAX_ASSETS: Final = 4
"""Of one request, as the other servers of this API have it."""


class _Body(Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class Asset(_Body, kw_only=True):
    """An image."""

    #: Base64 of the image's bytes, or a data URL.
    data_base64: str
    type: Literal["image"] = "image"
    #: png, jpeg, ...: the worker looks at the bytes.
    format: str | None = None


class SystemOneRequest(_Body, kw_only=True):
    """Body of `POST /v1/systemone`."""

    model: ModelName
    state: str | dict[str, Any] | list[Any]
    #: Checked by `client.calls.decide`, whose messages name the question.
    questions: dict[str, Any]
    #: By the text that each stands for, in the state or a question.
    assets: Annotated[dict[str, Asset], Meta(max_length=MAX_ASSETS)] = {}
    #: Beyond the API: whose share of the model it takes, and whether it goes before others.
    user: str | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] | None = None
