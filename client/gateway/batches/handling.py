"""What the handlers of files, uploads and batches share."""

from __future__ import annotations

import logging
import sqlite3
import time
from typing import Any

import msgspec
from starlette.responses import Response

from broker.protocol.errors import ErrorCode
from client.gateway.batches.folder import NotHere
from client.gateway.batches.jobs import Batches
from client.gateway.context import Handler, RequestContext
from client.gateway.errors import GatewayError

__all__ = ["as_json", "batches_of", "naming", "on_disk", "unix_now"]

log = logging.getLogger("tokenbus.gateway")


def on_disk(handler: Handler) -> Handler:
    """The handler, with failures of the disk told as what they are."""

    async def answer(context: RequestContext) -> Response:
        try:
            return await handler(context)
        except (sqlite3.Error, OSError) as error:
            log.error("the folder of batches cannot be used: %s", error)
            cause = error.strerror if isinstance(error, OSError) else str(error)
            raise GatewayError(
                ErrorCode.ENGINE_ERROR,
                f"The folder of batches cannot be used now: {cause}.",
                status=507,
                retryable=True,
            ) from None

    return answer


def batches_of(context: RequestContext) -> Batches:
    batches = context.gateway.batches
    if batches is None:
        raise GatewayError(
            ErrorCode.INVALID_REQUEST,
            "This gateway keeps no files and runs no batches; start it with --batch-folder FOLDER.",
            status=404,
        )
    return batches


def unix_now() -> int:
    return int(time.time())


class naming:
    """Turns NotHere into an answer that names the id."""

    def __init__(self, param: str, id_: str | None) -> None:
        self._param, self._id = param, id_

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, NotHere):
            raise GatewayError(
                ErrorCode.INVALID_REQUEST,
                f"There is no {self._id!r} here, or it belongs to another key.",
                param=self._param,
                status=404 if self._param == "id" else 400,
            ) from None


def as_json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
