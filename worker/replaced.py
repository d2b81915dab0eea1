"""Options of the workers that this one replaces, and what to use instead. Texts only."""

from __future__ import annotations

from typing import Final

_RECOGNISED: Final = (
    "not needed: a quantised checkpoint is recognised by its config.json; give its folder with "
    "--model-path"
)
_NO_SERVER: Final = "not needed: a worker does not listen, it connects to --broker"
_CURVE: Final = "the bus encrypts with CURVE: see --server-key and --key"

REPLACED: Final = {
    **dict.fromkeys(("--host", "--port", "--worker-address", "--worker"), _NO_SERVER),
    "--num-gpus": "a model is spread over all GPUs that the worker sees; choose them with --gpus",
    "--max-gpu-memory": "--engine-arg max_memory=0=20GiB,1=20GiB limits the use of each GPU",
    "--cpu-offloading": "--engine-arg max_memory=0=20GiB,cpu=64GiB puts the rest on the CPU",
    "--stream-interval": "not needed: tokens are sent in one message per step; a request may set "
    "its own stream_interval",
    "--use-flash-attn": "--engine-arg attention=flash_attention_2",
    **dict.fromkeys(
        ("--multi-modal", "--multimodal"),
        "not needed: whether a model takes images is read from its configuration",
    ),
    **dict.fromkeys(
        (
            *("--awq-ckpt", "--awq-wbits", "--awq-groupsize"),
            *("--gptq-ckpt", "--gptq-wbits", "--gptq-groupsize", "--gptq-act-order"),
            *("--enable-exllama", "--exllama-max-seq-len", "--exllama-gpu-split"),
            *("--exllama-cache-8bit", "--quant-path", "--model-type", "--precision"),
        ),
        _RECOGNISED,
    ),
    **dict.fromkeys(
        ("--enable-xft", "--xft-max-seq-len", "--xft-dtype"),
        "there is no xFasterTransformer engine; --device cpu runs on the CPU",
    ),
    "--embed-in-truncate": "an embedding request that is too long is refused; cut it in the client",
    "--seed": "every request has its own seed, which the client may set",
    "--debug": "--log-level debug",
    "--ssl": _CURVE,
    "--tokenizer-path": "the tokenizer is the one in the model's folder",
    "--gpu-memory-utilization": "--engine vllm --engine-arg gpu_memory_utilization=0.9",
    "--mem-fraction-static": "--engine sglang --engine-arg mem_fraction_static=0.9",
    "--sgl-endpoint": "--engine sglang --model-path PATH runs SGLang inside the worker",
    "--model-info-file": "models behind another HTTP API are not served; see --model-path",
}
