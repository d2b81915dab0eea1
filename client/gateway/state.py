"""State shared by all requests of a gateway: configuration, the bus client, keys, metrics.

Another gateway needs none of it to serve a new request.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from broker.protocol.errors import ErrorCode
from client import AsyncClient
from client.gateway.accounts import Accounts
from client.gateway.anthropic.signature import Signer
from client.gateway.config import Config
from client.gateway.errors import GatewayError
from client.gateway.keys import KeyFile
from client.gateway.metrics import Metrics
from client.gateway.openai.responses_folder import ResponseFolder
from client.gateway.operator_view import Overview
from client.gateway.peers import Peers
from client.gateway.reattach import Store
from client.gateway.refusals import Refusals

if TYPE_CHECKING:
    # Which runs lines through a gateway.
    from client.gateway.batches.jobs import Batches

__all__ = ["Gateway"]


@dataclass(slots=True)
class Gateway:
    """One gateway process."""

    config: Config
    bus: AsyncClient
    keys: KeyFile | None
    store: Store
    peers: Peers
    signer: Signer = field(default_factory=Signer)
    #: Tokens by key; None if they are not counted.
    accounts: Accounts | None = None
    #: Responses that other gateways may read; None if there is no folder for them.
    responses: ResponseFolder | None = None
    #: Files and batches; None if there is no folder for them.
    batches: Batches | None = None
    metrics: Metrics = field(default_factory=Metrics)
    #: Wall clock, seconds: the `created` of models.
    started_at: int = field(default_factory=lambda: int(time.time()))
    overview: Overview = field(default_factory=Overview)
    #: Size of the bodies of running requests.
    bodies_bytes: int = 0
    refusals: Refusals = field(default_factory=Refusals)
    #: OpenTelemetry's tracer; None if traces are off.
    tracer: Any = None
    #: The latest failures of requests, newest last, for the operator's view.
    errors: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=50))

    def hold_body(self, size_bytes: int) -> None:
        """Reserve memory for a body. Raises GatewayError(overloaded) if there is none.
        `release_body` must follow."""
        if self.bodies_bytes + size_bytes > self.config.bodies_bytes:
            raise GatewayError(
                ErrorCode.OVERLOADED,
                f"The bodies of running requests fill the {self.config.bodies_bytes} bytes that "
                "this gateway has for them; try again.",
                retryable=True,
                retry_after_ms=1000,
            )
        self.bodies_bytes += size_bytes

    def release_body(self, size_bytes: int) -> None:
        """Release what `hold_body` reserved."""
        self.bodies_bytes -= size_bytes

    def key_file_problem(self) -> str:
        """Why the current key file is not used; empty if it is, or if there is none."""
        if self.keys is None:
            return ""
        self.keys.refresh()
        return self.keys.problem
