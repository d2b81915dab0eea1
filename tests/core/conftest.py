"""What tests of the client's session begin with."""

from __future__ import annotations

import pytest

from broker.protocol import messages
from tests.core.client_wire import T, Wire, toks


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def running(wire: Wire) -> tuple[Wire, bytes]:
    """A request that worker w1 runs and of which "abc" has arrived."""
    id_ = wire.ask()
    wire.connect()
    wire.message(T.ACCEPTED, id_, messages.Accepted(position=2))
    wire.message(T.ACCEPTED, id_, messages.Accepted(worker="w1"))
    wire.output(toks(id_, 0, "abc"))
    wire.take_sent()
    return wire, id_
