"""llama.cpp's server in one process, without HTTP, for `bench.engine`.

    python inside_llamacpp.py FILE SLOTS CONTEXT [PORT]

Runs in llamacpp/.venv and speaks the lines of `inside.serve`. With PORT it serves HTTP there
instead, until it is killed. CONTEXT is the context of one request, in tokens.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from bench.peers.engines.inside import serve


def _server(file: str, slots: int, context: int, port: int) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.model_alias = ["bench"]
    params.n_parallel = slots
    params.n_ctx = slots * context
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # Weights, keys and values are float32, which its kernels support without flash attention.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_prompt = False
    params.cache_ram_mib = 0
    params.verbosity = 0
    params.hostnames = ["127.0.0.1"]
    params.port = port
    return xllamacpp.Server(params)


def main() -> None:
    """Load the model and answer lines, or serve HTTP."""
    file, slots, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if len(sys.argv) > 4:
        server = _server(file, slots, context, int(sys.argv[4]))
        print("ready", server.listening_address, flush=True)
        threading.Event().wait()
        return
    answer = serve()
    server = _server(file, slots, context, 0)

    def run(prompts: list[list[int]], new: int) -> list[list[float]]:
        at: list[list[float]] = [[] for _ in prompts]

        def ask(number: int, ids: list[int]) -> None:
            def arrived(piece: Any) -> None:
                if "choices" not in piece:
                    raise RuntimeError(f"llama.cpp says {piece}")
                at[number].append(time.monotonic())

            body = {
                "prompt": ids,
                "max_tokens": new,
                "temperature": 0.0,
                "ignore_eos": True,
                "stream": True,
            }
            server.handle_completions(body, arrived)

        threads = [
            threading.Thread(target=ask, args=(number, ids)) for number, ids in enumerate(prompts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # The last piece carries no token.
        return [times[:new] for times in at]

    answer(run)


if __name__ == "__main__":
    main()
