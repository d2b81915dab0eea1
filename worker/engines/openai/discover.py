"""Finds out what a server is and what it serves: asks it, and tries what it does not say.

What can be tried for the price of a few tokens is tried, not believed: whether it takes images and
token ids, embeds, and continues an answer where it was cut. Must never try models that are not to
be served: a server with many models loads each one that is asked for.
"""

from __future__ import annotations

import base64
import struct
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from broker.protocol.messages import Continuation, Kind, ModelInfo, kind_fields
from worker.engines.base import EngineLoadError, EngineOptions, Progress
from worker.engines.openai.bodies import Dialect
from worker.engines.openai.http import Answer, Server, Unreachable
from worker.engines.openai.settings import Settings

__all__ = ["Found", "Model", "discover"]

FIRST_WAIT_S: Final = 0.5
LONGEST_WAIT_S: Final = 10.0
PROBE_S: Final = 300.0
"""Time-out of a probe of a few tokens, for which the server may have to load the model."""
TRIED_TOKENS: Final = 16


def _grey_image() -> str:
    """A data URL of a grey PNG, 56 by 56 pixels: some models refuse images smaller than their
    patches."""
    side = 56

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = zlib.compress((b"\0" + b"\x80" * 3 * side) * side)
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@dataclass(slots=True)
class Model:
    """A model of the server."""

    #: As the server names it, and the names under which the bus serves it.
    id: str
    names: tuple[str, ...]
    context_tokens: int | None = None
    images: bool = False
    chat: bool = True
    complete: bool = False
    embed: bool = False
    #: How a chat continues a text: `flag`, `last`, or empty if it cannot.
    manner: str = ""
    #: Whether it takes token ids as a prompt, and returns the ids of its answer.
    ids: bool = False
    #: The path or hub id of its weights, if the server reports it.
    root: str = ""
    #: Whether its tokenizer is known here, so that requests go by token ids if they can.
    exact: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def infos(self) -> list[ModelInfo]:
        """One record for each name."""
        offers = {Kind.CHAT: self.chat, Kind.COMPLETE: self.complete, Kind.EMBED: self.embed}
        texts = (Kind.COUNT, Kind.TOKENIZE, Kind.DETOKENIZE, Kind.TEMPLATE)
        kinds = [kind for kind in Kind if offers.get(kind) or (self.exact and kind in texts)]
        continuation = Continuation.IDS if self.exact else Continuation.TEXT
        return [
            ModelInfo(
                name=name,
                **kind_fields(kinds),
                context_tokens=self.context_tokens,
                images=self.images,
                details=self.details,
                resume=continuation.value,
            )
            for name in self.names
        ]


@dataclass(slots=True)
class Found:
    """A server and its models."""

    server: str
    version: str
    #: Number of requests that it runs at once; 0 if it does not say.
    slots: int
    #: The path of its health check.
    health: str
    dialect: Dialect
    models: list[Model]


def discover(
    server: Server, settings: Settings, options: EngineOptions, progress: Progress
) -> Found:
    """Wait for the server, and find out what it serves. Raises `EngineLoadError` for what waiting
    does not mend."""
    listed = _await(server, progress)
    kind, version = _kind(server, settings, listed)
    props = server.ask("/props").map if kind == "llamacpp" else {}
    health = "/health" if server.ask("/health").status == 200 else "models"
    rows = _rows(listed)
    models = [
        _described(server, kind, rows.get(id_, {}), id_, names, props, settings)
        for id_, names in _wanted(options, rows, server.where)
    ]
    dialect = Dialect(kind, settings.passes)
    if settings.probe and kind != "ollama":
        for number, model in enumerate(models):
            progress(number / len(models), f"trying {model.id} at {server.where}")
            _try(server, model, dialect, settings)
    for model in models:
        if settings.continues:
            model.manner = "" if settings.continues == "none" else settings.continues
        if settings.images is not None:
            model.images = settings.images
        if settings.context_tokens:
            model.context_tokens = settings.context_tokens
    slots = _whole(props.get("total_slots"))
    if kind == "sglang":
        info = server.ask("/get_server_info").map
        slots = _whole(info.get("max_running_requests"))
    return Found(kind, version, slots, health, dialect, models)


def _await(server: Server, progress: Progress) -> Any:
    """The list of models, once the server is there."""
    wait_s = FIRST_WAIT_S
    while True:
        try:
            answer = server.ask("models", timeout_s=30.0)
        except Unreachable as error:
            why = str(error)
        else:
            if answer.status == 200:
                return answer.body
            if answer.status in (401, 403):
                raise EngineLoadError(
                    f"the server at {server.where} refuses the key (HTTP {answer.status}): give a "
                    "valid one with --engine-arg api_key_file=PATH or api_key_env=NAME"
                )
            if answer.status in (404, 405):
                raise EngineLoadError(
                    f"the server at {server.where} has no {server.url}/models (HTTP "
                    f"{answer.status}): check base_url, which ends with /v1 for most servers"
                )
            why = f"HTTP {answer.status}"
        progress(None, f"waiting for {server.where}: {why}")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _rows(listed: Any) -> dict[str, Mapping[str, Any]]:
    rows = listed.get("data") if isinstance(listed, dict) else listed
    found = [row for row in rows or () if isinstance(row, dict) and isinstance(row.get("id"), str)]
    return {row["id"]: row for row in found}


def _wanted(
    options: EngineOptions, rows: Mapping[str, Any], where: str
) -> list[tuple[str, tuple[str, ...]]]:
    """The server's names for the models to serve, and ours. A model that the operator names need
    not be listed: some servers load what is asked for."""
    paths = options.model_paths
    if not paths:
        if not rows:
            raise EngineLoadError(
                f"the server at {where} lists no models: name one with --model-path NAME"
            )
        if not options.model_names:
            return [(id_, (id_,)) for id_ in rows]
        if len(rows) != 1:
            raise EngineLoadError(
                f"--model-name: the server at {where} has {len(rows)} models "
                f"({', '.join(list(rows)[:8])}): say which with --model-path, once for each name"
            )
        return [(next(iter(rows)), options.model_names[0])]
    if rows and (missing := [path for path in paths if path not in rows]) and len(rows) < 100:
        known = ", ".join(list(rows)[:8])
        if not any(row.get("owned_by") in (None, "") for row in rows.values()) and (
            len(missing) == len(paths) and any(row.get("root") for row in rows.values())
        ):
            raise EngineLoadError(
                f"the server at {where} has no model {missing[0]}; it has {known}"
            )
    names = options.model_names or tuple((path,) for path in paths)
    return list(zip(paths, names, strict=True))


def _kind(server: Server, settings: Settings, listed: Any) -> tuple[str, str]:
    """Which server software it is, and its version."""
    rows = list(_rows(listed).values())
    owners = {str(row.get("owned_by", "")).lower() for row in rows}
    version = str(server.ask("/version").map.get("version", ""))
    if settings.server:
        return settings.server, version
    for owner in ("vllm", "sglang", "llamacpp", "lmdeploy", "fastchat"):
        if owner in owners:
            return owner, version
    if "llama.cpp" in server.ask("/health").headers.get("server", "").lower():
        return "llamacpp", version
    ollama = server.ask("/api/version")
    if ollama.status == 200 and "version" in ollama.map:
        return "ollama", str(ollama.map["version"])
    if server.ask("/openapi.json").map.get("paths", {}).get("/load_model"):
        return "transformers", version
    return "other", version


def _described(
    server: Server,
    kind: str,
    row: Mapping[str, Any],
    id_: str,
    names: tuple[str, ...],
    props: Mapping[str, Any],
    settings: Settings,
) -> Model:
    """What the server says about a model."""
    model = Model(id_, names, root=str(row.get("root") or ""))
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    settings_of = props.get("default_generation_settings") or {}
    for told in (
        row.get("max_model_len"),
        row.get("context_length"),
        settings_of.get("n_ctx") if isinstance(settings_of, dict) else None,
        (meta or {}).get("n_ctx"),
        (meta or {}).get("n_ctx_train"),
    ):
        model.context_tokens = model.context_tokens or _whole(told) or None
    modalities = props.get("modalities")
    if isinstance(modalities, dict):
        model.images = bool(modalities.get("vision"))
    if kind == "ollama":
        shown = server.ask("/api/show", {"model": id_}).map
        info = shown.get("model_info") if isinstance(shown.get("model_info"), dict) else {}
        lengths = [v for k, v in (info or {}).items() if k.endswith(".context_length")]
        model.context_tokens = _whole(lengths[0]) if lengths else None
        can = shown.get("capabilities") or ["completion"]
        model.images = "vision" in can
        model.embed = "embedding" in can
        model.chat = model.complete = "completion" in can
        model.manner = "last"  # its chat endpoint continues a last message of the assistant's
    model.details = {"server": kind, "behind": server.where, "model": id_}
    return model


def _try(server: Server, model: Model, dialect: Dialect, settings: Settings) -> None:
    """Find out by sending requests what a model can do. Raises EngineLoadError."""
    hello = [{"role": "user", "content": "Count from one to ten in words."}]
    body: dict[str, Any] = {"model": model.id, "max_tokens": TRIED_TOKENS, "temperature": 0}
    chat = _ask(server, "chat/completions", body | {"messages": hello})
    model.chat = chat.status == 200
    plain = _ask(server, "completions", body | {"prompt": "One, two,", "max_tokens": 1})
    model.complete = plain.status == 200
    if not model.chat and not model.complete:
        embedded = _ask(server, "embeddings", {"model": model.id, "input": ["a"]})
        model.embed = embedded.status == 200
        if not model.embed:
            raise EngineLoadError(
                f"model {model.id} at {server.where} answers neither chats nor completions (HTTP "
                f"{chat.status}, {plain.status}): {str(chat.body)[:200]}"
            )
        return
    if model.chat:
        text = _text(chat)
        model.manner = _manner(server, body | {"messages": hello}, hello, text)
        if settings.images is None and not model.images:
            model.images = _sees(server, body)
    if model.complete:
        told = _ask(
            server,
            "completions",
            body | {"prompt": [1, 2, 3], "max_tokens": 1, "return_token_ids": True},
        )
        choices = told.map.get("choices") or [{}]
        model.ids = told.status == 200 and bool(choices[0].get("token_ids"))
    dialect.usage = dialect.usage and dialect.server != "transformers"


def _sees(server: Server, body: dict[str, Any]) -> bool:
    """Whether it takes images. Some servers silently drop them, so an image must make the prompt
    longer."""
    counts: list[int] = []
    for more in ([], [{"type": "image_url", "image_url": {"url": _grey_image()}}]):
        content = [{"type": "text", "text": "What is this?"}, *more]
        asked = body | {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        answer = _ask(server, "chat/completions", asked)
        if answer.status != 200:
            return False
        counts.append(_whole((answer.map.get("usage") or {}).get("prompt_tokens")))
    return counts[1] > counts[0]


def _manner(server: Server, body: dict[str, Any], messages: list[dict[str, Any]], text: str) -> str:
    """How it continues a text of its own that was cut: the way that yields the rest of the text,
    or empty."""
    half = text[: len(text) // 2]
    rest = text[len(half) :]
    if len(rest) < 4 or not half.strip():
        return ""
    cut = [*messages, {"role": "assistant", "content": half}]
    for manner, extra in (
        ("flag", {"continue_final_message": True, "add_generation_prompt": False}),
        ("last", {}),
    ):
        answer = _ask(server, "chat/completions", body | {"messages": cut} | extra)
        said = _text(answer) if answer.status == 200 else ""
        length = min(len(rest), len(said))
        if length >= 4 and said[:length] == rest[:length]:
            return manner
    return ""


def _ask(server: Server, path: str, body: dict[str, Any]) -> Answer:
    """Ask the server. Raises EngineLoadError if it is gone, so that it is waited for again."""
    try:
        return server.ask(path, body, timeout_s=PROBE_S)
    except Unreachable as error:
        raise EngineLoadError(f"the server at {server.where} went away: {error}") from None


def _text(answer: Answer) -> str:
    choices = answer.map.get("choices") or [{}]
    message = choices[0].get("message") or {}
    content = message.get("content")
    return content if isinstance(content, str) else ""


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
