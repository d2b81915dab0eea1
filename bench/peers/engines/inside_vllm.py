"""vLLM's `LLMEngine` in one process, for `bench.engine`.

    python inside_vllm.py FOLDER DTYPE SLOTS CONTEXT

Runs in vllm/.venv and speaks the lines of `inside.serve`. Engine core, scheduler and model share
this process and its thread: vLLM without any server.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from bench.peers.engines.inside import serve


def main() -> None:
    """Load the model and answer lines."""
    folder, dtype, slots, context = sys.argv[1:5]
    answer = serve()
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.llm_engine import LLMEngine

    arguments = EngineArgs(
        model=folder,
        dtype=dtype,
        max_num_seqs=int(slots),
        max_model_len=int(context),
        enable_prefix_caching=False,
    )
    engine = LLMEngine.from_engine_args(arguments)

    def run(prompts: list[list[int]], new: int) -> list[list[float]]:
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        at: dict[str, list[float]] = {}
        for number, ids in enumerate(prompts):
            at[str(number)] = []
            prompt: Any = {"prompt_token_ids": ids}
            engine.add_request(str(number), prompt, sampling)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.monotonic()
            for output in outputs:
                at[output.request_id] += [now] * len(output.outputs[0].token_ids)
        return list(at.values())

    answer(run)


if __name__ == "__main__":
    main()
