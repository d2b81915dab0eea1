"""An engine of ours in one process, without link and broker, for `bench.engine`.

    python -m bench.peers.engines.inside_tokenbus '{"engine": NAME, "model_paths": [PATH], ...}'

Speaks the lines of `inside.serve`. The engine is built as the worker builds it, from the same
options (`EngineOptions`); the model's name is "bench".
"""

from __future__ import annotations

import json
import sys
import time

import msgspec

from bench.peers.engines.inside import serve
from broker.protocol.messages import Kind, Params, Request, new_id
from worker.engines import registry
from worker.engines.base import EngineOptions, Failed, Job, Tokens


def main() -> None:
    """Load the model and answer lines."""
    answer = serve()
    options = msgspec.convert(json.loads(sys.argv[1]), EngineOptions)
    engine = registry.load(options.engine)(options, lambda fraction, note: None)

    def run(prompts: list[list[int]], new: int) -> list[list[float]]:
        params = Params(temperature=0.0, max_tokens=new, ignore_eos=True)
        at: dict[bytes, list[float]] = {}
        failed: list[str] = []
        for ids in prompts:
            request = Request(
                model="bench", kind=Kind.COMPLETE, token_ids=ids, params=params, window=1 << 30
            )
            job = Job(new_id(), request)
            at[job.request_id] = []
            engine.add(job)
        while engine.busy:
            events = engine.step()
            now = time.monotonic()
            for event in events:
                if isinstance(event, Tokens):
                    at[event.request_id] += [now] * len(event.token_ids)
                elif isinstance(event, Failed):
                    failed.append(f"{event.error.code}: {event.error.message}")
        if failed:
            raise RuntimeError(f"{len(failed)} of {len(prompts)} requests failed: {failed[0]}")
        return list(at.values())

    answer(run)


if __name__ == "__main__":
    main()
