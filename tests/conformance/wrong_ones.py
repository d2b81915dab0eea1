"""Our parties with deliberate bugs, as subjects of the kit.

`python -m tests.conformance.wrong_ones NAME MODULE [ARGUMENT ...]` runs a module with the bug NAME.
"""

from __future__ import annotations

import runpy
import sys
from typing import Final

from broker.core import recovery
from broker.core.controller import BrokerCore
from broker.peer.connection import PeerConnection
from client.core.exchange import Exchange
from client.core.requests import Requests
from tests.simulation.mutants import Mutant
from worker.core.requests import Requests as WorkerRequests
from worker.core.streams import Stream

BUGS: Final = (
    # The mistake of the first sample client in SPEC.md.
    Mutant(
        "client sends no heartbeats while it hears",
        PeerConnection,
        "receive",
        "self._liveness.heard(now_s)",
        "self._liveness.heard(now_s); self._liveness.sent(now_s)",
    ),
    Mutant(
        "client counts bytes as characters",
        Exchange,
        "accept",
        "self.text_characters += len(event.text)",
        "self.text_characters += len(event.text.encode())",
    ),
    Mutant(
        "client believes any route",
        Requests,
        "_is_foreign",
        "exchange.route is not None and",
        "False and",
    ),
    Mutant(
        "worker sends one token past the window",
        Stream,
        "send_ready",
        "limit = min(total, self.window)",
        "limit = min(total, self.window + 1)",
    ),
    Mutant(
        "worker does not answer CANCEL of an unknown request",
        WorkerRequests,
        "cancel",
        "self._tell_over(connection, request_id)\n    elif route is None:\n        self._log",
        "pass\n    elif route is None:\n        self._log",
    ),
    Mutant(
        "worker resumes one token too far",
        Stream,
        "attach",
        "self.sent = self.attached_at = count",
        "self.sent = self.attached_at = min(count + 1, len(self.token_ids))",
    ),
    Mutant(
        "broker accepts a lower grant",
        BrokerCore,
        "_grant",
        "if granted > worker.granted:",
        "if True:",
    ),
    Mutant(
        "broker accepts an older epoch",
        recovery,
        "_resume",
        "if facts.epoch < existing.epoch:",
        "if False:",
    ),
    Mutant(
        "broker blames a request for every death",
        BrokerCore,
        "_on_worker_goodbye",
        'lost = goodbye.reason in ("engine_dead", "stalled")',
        "lost = True",
    ),
)


def main() -> None:
    name, module, *arguments = sys.argv[1:]
    (bug,) = [bug for bug in BUGS if bug.name == name]
    sys.argv = [module, *arguments]
    with bug.alive():
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
