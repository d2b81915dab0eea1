"""The `--engine-arg` options of the openai engine, checked.

Parses text and reads the key's file; must never open a connection.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from worker.engines.base import EngineLoadError
from worker.engines.common.arguments import boolean

__all__ = ["EXTENSIONS", "SERVERS", "Settings", "read"]

SERVERS: Final = (
    "vllm",
    "sglang",
    "llamacpp",
    "lmdeploy",
    "ollama",
    "transformers",
    "fastchat",
    "other",
)
"""Kinds of server, which differ in what they take besides OpenAI's own parameters."""

_SAMPLING: Final = {"top_k": "top_k", "min_p": "min_p", "repetition_penalty": "repetition_penalty"}
_LIKE_VLLM: Final = _SAMPLING | {
    "min_tokens": "min_tokens",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "template_args": "chat_template_kwargs",
}

EXTENSIONS: Final[Mapping[str, Mapping[str, str]]] = {
    "vllm": _LIKE_VLLM,
    "sglang": _LIKE_VLLM,
    "llamacpp": {
        "top_k": "top_k",
        "min_p": "min_p",
        "repetition_penalty": "repeat_penalty",
        "ignore_eos": "ignore_eos",
        "template_args": "chat_template_kwargs",
    },
    "lmdeploy": _SAMPLING
    | {
        "ignore_eos": "ignore_eos",
        "skip_special_tokens": "skip_special_tokens",
        "template_args": "chat_template_kwargs",
    },
    "fastchat": {"top_k": "top_k"},
}
"""Parameters of the bus that a server takes besides OpenAI's, with the server's names for them."""

_DEFAULT_SLOTS: Final = {"vllm": 64, "sglang": 64, "lmdeploy": 64, "ollama": 4, "transformers": 1}
"""Number of requests sent at once if the server does not say: what each kind by default runs
without queueing."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Where the server is and what is known about it beforehand."""

    #: Including `/v1` or its equivalent, without a slash at the end.
    base_url: str
    api_key: str = ""
    #: One of `SERVERS`; empty: to be found out.
    server: str = ""
    #: How it continues an answer in a chat: `flag`, `last`, `none`; empty: to be tried.
    continues: str = ""
    #: Whether it takes images; None: to be found out.
    images: bool | None = None
    #: Longest prompt plus answer, tokens; 0: as the server says.
    context_tokens: int = 0
    #: Whether to find out by test requests what it can do.
    probe: bool = True
    #: Folder or hub id of the model's tokenizer, with which requests go by token ids; `none`: they
    #: never do.
    tokenizer: str = ""
    #: A server that sends nothing for this long, not even to a health check, is lost.
    silent_s: float = 120.0
    #: Parameters of the bus that it takes under the same name, besides those known.
    passes: tuple[str, ...] = ()
    #: Whether its certificate is checked; or the path of the authority's certificate.
    verify: bool | str = True

    @property
    def root(self) -> str:
        """The address without `/v1`."""
        return self.base_url.removesuffix("/v1")

    def slots(self, server: str) -> int:
        """Number of requests sent at once if neither the operator nor the server says."""
        return _DEFAULT_SLOTS.get(server, 8)


def read(arguments: Mapping[str, str]) -> Settings:
    """Parse the arguments. Raises `EngineLoadError` that names the bad one."""
    given = {name.replace("-", "_"): text for name, text in arguments.items()}
    known = {
        "base_url",
        "api_key_file",
        "api_key_env",
        "server",
        "continues",
        "images",
        "context_tokens",
        "probe",
        "tokenizer",
        "silent_s",
        "passes",
        "verify",
    }
    for name in given:
        if name == "api_key":
            raise EngineLoadError(
                "--engine-arg api_key=...: a key in the command line can be read by every user of "
                "the machine: use api_key_file=PATH or api_key_env=NAME"
            )
        if name not in known:
            raise EngineLoadError(
                f"unknown --engine-arg {name!r}: engine openai knows {', '.join(sorted(known))}"
            )
    return Settings(
        base_url=_address(given.get("base_url", "")),
        api_key=_key(given),
        server=_choice(given, "server", SERVERS),
        continues=_choice(given, "continues", ("flag", "last", "none")),
        images=_flag(given, "images"),
        context_tokens=int(_number(given, "context_tokens", 0)),
        probe=_flag(given, "probe") is not False,
        tokenizer=given.get("tokenizer", ""),
        silent_s=_number(given, "silent_s", 120.0),
        passes=tuple(filter(None, given.get("passes", "").split(","))),
        verify=_verify(given),
    )


def _address(text: str) -> str:
    if not text:
        raise EngineLoadError(
            "engine openai needs the server's address: --engine-arg base_url=http://HOST:8000/v1"
        )
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineLoadError(
            f"--engine-arg base_url={text}: expected http://HOST:PORT/v1 or https://..."
        )
    if parts.username or parts.password:
        raise EngineLoadError("--engine-arg base_url: a key belongs in api_key_file=PATH")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _key(given: Mapping[str, str]) -> str:
    if "api_key_file" in given:
        try:
            return Path(given["api_key_file"]).read_text().strip()
        except OSError as error:
            raise EngineLoadError(
                f"--engine-arg api_key_file={given['api_key_file']}: {error.strerror}"
            ) from None
    name = given.get("api_key_env", "")
    if name and name not in os.environ:
        raise EngineLoadError(f"--engine-arg api_key_env={name}: there is no such variable")
    # No variable is read unasked: a key for one server must not be sent to another.
    return os.environ[name] if name else ""


def _choice(given: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = given.get(name, "")
    if value and value not in choices:
        raise EngineLoadError(f"--engine-arg {name}={value}: choose one of {', '.join(choices)}")
    return value


def _flag(given: Mapping[str, str], name: str) -> bool | None:
    value = given.get(name, "").lower()
    if not value or value == "auto":
        return None
    try:
        return boolean(value)
    except ValueError:
        raise EngineLoadError(f"--engine-arg {name}={value}: expected yes or no") from None


def _verify(given: Mapping[str, str]) -> bool | str:
    value = given.get("verify", "yes")
    try:
        return boolean(value)
    except ValueError:
        if not Path(value).is_file():
            raise EngineLoadError(
                f"--engine-arg verify={value}: expected yes, no or a file of certificates"
            ) from None
        return value


def _number(given: Mapping[str, str], name: str, default: float) -> float:
    try:
        value = float(given.get(name, default))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise EngineLoadError(f"--engine-arg {name}={given[name]}: expected a number, 0 or more")
    return value
