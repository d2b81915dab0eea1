"""`--no-register`: load the engine as a worker would, let each model answer one prompt, report.

For trying a model before its worker joins a bus. Serves nobody. Must never import zmq or torch.
"""

from __future__ import annotations

import select
import time

from broker.protocol import codec
from broker.protocol.messages import Kind, Params, Request, new_id
from worker.core import events
from worker.engines import events as engine_events
from worker.engines.base import Capabilities, Ended, EngineOptions, Failed, Tokens
from worker.process.display import LoadingDisplay
from worker.process.supervisor import Supervisor

ANSWER_TOKENS = 8
ANSWER_TIMEOUT_S = 120.0


class CheckFailed(Exception):
    """The engine cannot be loaded, or does not answer; the message says why."""


def check_engine(
    options: EngineOptions, environment: dict[str, str], display: LoadingDisplay
) -> str:
    """Load the engine and let each model answer. Returns a report. Raises CheckFailed."""
    supervisor = Supervisor(options, environment)
    supervisor.start()
    try:
        capabilities = _load(supervisor, display)
        return "\n".join(_ask(supervisor, capabilities, name) for name in _names(capabilities))
    finally:
        display.done()
        supervisor.stop()


def _names(capabilities: Capabilities) -> list[str]:
    return [
        model.name
        for model in capabilities.models
        if Kind.COMPLETE in model.kinds or Kind.CHAT in model.kinds
    ]


def _read(supervisor: Supervisor, timeout_s: float | None) -> list[events.Event]:
    if supervisor.pipe is not None:
        select.select([supervisor.pipe], [], [], timeout_s)
    arrived = supervisor.read(time.monotonic())
    for event in arrived:
        if isinstance(event, events.EngineLost | events.WorkerFailed):
            raise CheckFailed(event.message)
    return arrived


def _load(supervisor: Supervisor, display: LoadingDisplay) -> Capabilities:
    while True:
        for event in _read(supervisor, None):
            match event:
                case events.EngineLoading(progress, note):
                    display.show(progress, note)
                case events.EngineReady(capabilities):
                    display.done()
                    return capabilities


def _ask(supervisor: Supervisor, capabilities: Capabilities, model: str) -> str:
    request = Request(
        model=model,
        kind=Kind.COMPLETE,
        prompt="The quick brown fox",
        params=Params(max_tokens=ANSWER_TOKENS, temperature=0.0),
        window=1 << 20,
    )
    begin_s = time.monotonic()
    supervisor.add(new_id(), codec.encode(request), ())
    tokens = 0
    while (left_s := begin_s + ANSWER_TIMEOUT_S - time.monotonic()) > 0:
        for event in _read(supervisor, left_s):
            for item in event.events if isinstance(event, events.EngineStepped) else ():
                match engine_events.decode(item):
                    case Tokens(token_ids=token_ids):
                        tokens += len(token_ids)
                    case Ended():
                        took_ms = (time.monotonic() - begin_s) * 1000
                        return (
                            f"{model}: answers ({tokens} tokens in {took_ms:.0f} ms) on "
                            f"{capabilities.device}, {capabilities.capacity} slots, "
                            f"engine {capabilities.engine}; joined no broker"
                        )
                    case Failed(error=error):
                        raise CheckFailed(f"{model} does not answer: {error.message}")
    raise CheckFailed(f"{model} did not answer within {ANSWER_TIMEOUT_S:.0f} s")
