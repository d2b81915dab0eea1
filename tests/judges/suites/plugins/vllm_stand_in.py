"""A pytest plugin that lets vLLM's black-box tests run where vLLM is not installed.

`tests.utils.RemoteOpenAIServer` becomes an object with the URL of GATEWAY_URL; what the tests
import of `vllm` and torch becomes names without a meaning, but for the tokenizer, which is that of
the model that is served. Tests that never talk to a server are left out: they test vLLM's own
functions.

It imports nothing of tokenbus, which is not installed there.
"""

from __future__ import annotations

import base64
import importlib.abc
import importlib.machinery
import inspect
import io
import os
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest

URL = os.environ["GATEWAY_URL"]
TOKENIZER = os.environ["TOKENIZER_FOLDER"]
KEY = "token-abc123"
MOCKS = "tests.entrypoints.openai.chat_completion.test_serving_chat"
#: Roots that are stood in for.
ABSENT = ("vllm", "torch")


class RemoteOpenAIServer:
    """The parts of vLLM's helper that tests use, for a server that runs already."""

    DUMMY_API_KEY = KEY
    url_root = URL

    def __init__(self, *_: Any, **__: Any) -> None:
        self.uds = None
        place = urlsplit(URL)
        self.host, self.port = place.hostname, place.port

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def url_for(self, *parts: str) -> str:
        return "/".join((URL, *(part.strip("/") for part in parts)))

    def get_client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(**self._how(options))

    def get_async_client(self, **options: Any) -> Any:
        import openai

        return openai.AsyncOpenAI(**self._how(options))

    def get_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.Anthropic(**{**self._how(options), "base_url": URL})

    def get_async_client_anthropic(self, **options: Any) -> Any:
        import anthropic

        return anthropic.AsyncAnthropic(**{**self._how(options), "base_url": URL})

    def _how(self, options: dict[str, Any]) -> dict[str, Any]:
        base = {"base_url": f"{URL}/v1", "api_key": KEY, "max_retries": 0, "timeout": 600}
        return {**base, **options}


def get_tokenizer(*_: Any, **__: Any) -> Any:
    """The tokenizer of the model that is served, whatever name is asked for."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


class ModelConfig:
    """What tests ask of a model's configuration."""

    def __init__(self, *_: Any, **__: Any) -> None:
        return

    def get_vocab_size(self) -> int:
        return len(get_tokenizer())


class ImageAsset:
    """An image of a test: any serves."""

    def __init__(self, *_: Any) -> None:
        from PIL import Image

        self.pil_image = Image.new("RGB", (32, 32), "red")


def encode_image_url(image: Any, *_: Any) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


class _Integers:
    """Of torch: the range of 64 bits."""

    min, max = -(1 << 63), (1 << 63) - 1

    def __init__(self, *_: Any) -> None:
        return


#: What has a meaning, whatever module it is imported from.
MEANT: dict[str, Any] = {
    "get_tokenizer": get_tokenizer,
    "ModelConfig": ModelConfig,
    "ImageAsset": ImageAsset,
    "encode_image_url": encode_image_url,
    "iinfo": _Integers,
    "download_weights_from_hf": lambda *_, **__: "a/model",
}


class _Nothing(types.ModuleType):
    """A module with every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__dict__["__path__"] = []  # a package

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in MEANT:
            return MEANT[name]
        # Named in `pytest.raises` and `except`.
        made = type(name, (Exception,), {}) if name.endswith("Error") else MagicMock(name=name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: object, target: object = None) -> Any:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Nothing(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return


def _stand_in() -> None:
    import transformers  # noqa: F401  # before: it looks whether there is a torch

    sys.meta_path.insert(0, _Finder())
    utils = _Nothing("tests.utils")
    named: dict[str, Any] = {
        "RemoteOpenAIServer": RemoteOpenAIServer,
        "ROCM_EXTRA_ARGS": [],
        "VLLM_PATH": Path(),
    }
    for name, value in named.items():
        setattr(utils, name, value)
    needs_gpus = pytest.mark.skip(reason="it needs GPUs")
    setattr(utils, "requires_fp8", needs_gpus)  # noqa: B010
    setattr(utils, "multi_gpu_only", lambda **_: needs_gpus)  # noqa: B010
    sys.modules["tests.utils"] = utils
    # Tests of functions, of which others import what they mock.
    sys.modules[MOCKS] = _Nothing(MOCKS)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    talking = [item for item in items if _talks(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in talking])
    items[:] = talking


def _talks(item: Any) -> bool:
    """Whether a test, or a fixture that it asks for, makes a server."""
    fixtures = item._fixtureinfo.name2fixturedefs.values()
    functions = [item.function, *(one.func for many in fixtures for one in many)]
    return any("RemoteOpenAIServer(" in _source(function) for function in functions)


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


# Before the suite's own conftests, which import it.
_stand_in()
