"""Loads a model's folder with every engine on a machine without a network: a program of its own,
since Hugging Face's packages read HF_HUB_OFFLINE when they are imported.

    python -m tests.engines.offline_loading TEXT_MODEL IMAGE_MODEL

prints one JSON object: by engine, the names of the models that it serves, or what went wrong.
Libraries that need hardware or a build of their own are stood in for, as far as loading goes; what
they do with a folder is what they were read to do, and vLLM's arguments look for their model as
vLLM's do (`EngineArgs.__post_init__`).
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from worker.engines import registry
from worker.engines.base import EngineOptions


def no_network(*_: Any, **__: Any) -> Any:
    raise OSError("this machine has no network")


def stand_in(name: str, **members: Any) -> None:
    """A module of a library that is not installed."""
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    vars(module).update(members)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


@dataclass
class VllmArguments:
    """vLLM's `EngineArgs` as far as they are used."""

    model: str = "Qwen/Qwen3-0.6B"
    tokenizer: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        for named in (self.model, self.tokenizer):
            if named is not None and not Path(named).exists():
                raise OSError(f"offline, and {named} is not in the cache")

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        for field in fields(VllmArguments):
            flag = "--" + field.name.replace("_", "-")
            if field.type == "bool":
                parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=False)
            else:
                parser.add_argument(flag, default=field.default)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> VllmArguments:
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def vllm() -> None:
    engine = MagicMock()
    engine.from_engine_args.return_value.vllm_config.model_config.max_model_len = 512
    engine.from_engine_args.return_value.vllm_config.scheduler_config.max_num_seqs = 4
    stand_in("vllm", SamplingParams=MagicMock())
    stand_in("vllm.engine")
    stand_in("vllm.engine.arg_utils", EngineArgs=VllmArguments)
    stand_in("vllm.sampling_params", RequestOutputKind=MagicMock())
    stand_in("vllm.utils")
    stand_in("vllm.utils.argparse_utils", FlexibleArgumentParser=argparse.ArgumentParser)
    stand_in("vllm.config", VllmConfig=MagicMock())
    stand_in("vllm.v1")
    stand_in("vllm.v1.engine")
    stand_in("vllm.v1.engine.llm_engine", LLMEngine=engine)
    stand_in("vllm.v1.sample")
    stand_in("vllm.v1.sample.logits_processor", BatchUpdate=MagicMock(), LogitsProcessor=object)
    stand_in("vllm.v1.sample.logits_processor.builtin", process_dict_updates=MagicMock())


def sglang() -> None:
    stand_in("sglang", Engine=MagicMock())
    stand_in("sglang.srt")
    stand_in("sglang.srt.server_args", ServerArgs=VllmArguments)


def mlx() -> None:
    core = MagicMock()
    core.cpu, core.gpu = "cpu", "gpu"
    core.default_device.return_value = "cpu"
    stand_in("mlx")
    for name, module in (("core", core), ("nn", MagicMock())):
        sys.modules[f"mlx.{name}"] = module
        setattr(sys.modules["mlx"], name, module)
    stand_in("mlx_lm")
    stand_in("mlx_lm.generate", BatchGenerator=MagicMock())
    stand_in("mlx_lm.utils", load=MagicMock(return_value=(MagicMock(), None)))


#: What stands in for the library of an engine, by engine.
ENGINES: dict[str, Callable[[], None] | None] = {
    "transformers": None,
    "vllm": vllm,
    "sglang": sglang,
    "mlx": mlx,
}


def main(text: str, images: str) -> None:
    socket.socket.connect = no_network  # type: ignore[method-assign]
    socket.getaddrinfo = no_network
    told: dict[str, Any] = {}
    for name, library in ENGINES.items():
        if library is not None:
            library()
        for kind, path in (("text", text), ("pictures", images)):
            if (name, kind) == ("mlx", "pictures"):
                continue  # mlx-lm has text models only
            options = EngineOptions(
                engine=name, model_paths=(path,), model_names=((kind,),), device="cpu", slots=2
            )
            try:
                engine = registry.load(name)(options, lambda fraction, note: None)
                served = [model.name for model in engine.capabilities.models]
            except Exception as error:
                served = [f"{type(error).__name__}: {error}"]
            told[f"{name} {kind}"] = served
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
