"""The models of the bus as Ollama describes its own.

Must never invent a fact: what the bus does not tell is empty or 0. The digest names the model and
what is known of it; it is no checksum of its weights.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from broker.protocol.errors import ErrorCode
from broker.protocol.messages import Kind
from client.gateway.context import RequestContext
from client.gateway.errors import GatewayError, invalid
from client.gateway.ollama.answers import moment
from client.gateway.openai.models import visible_models
from client.gateway.state import Gateway

__all__ = [
    "API_VERSION",
    "check_thinks",
    "entry",
    "find",
    "name_of",
    "running",
    "shown",
]

API_VERSION: Final = "0.21.0"
"""The release of Ollama whose API this is: programs ask for it to know what they may send."""

LATEST: Final = ":latest"
"""The tag that Ollama adds to a name without one."""

#: A model stays until its worker leaves.
_NEVER: Final = "9999-12-31T23:59:59Z"

_BYTES: Final = {"float32": 4, "float16": 2, "bfloat16": 2}


async def name_of(context: RequestContext, given: str) -> str:
    """The name on the bus of a model: `NAME:latest` is NAME where no model has the tag."""
    if not given:
        raise invalid("model", "`model` is required.")
    if not given.endswith(LATEST):
        return given
    names = [model["name"] for model in await visible_models(context)]
    bare = given.removesuffix(LATEST)
    return bare if given not in names and bare in names else given


def find(models: list[dict[str, Any]], name: str, given: str) -> dict[str, Any]:
    """The model of that name. Raises GatewayError(model_unavailable) in Ollama's words."""
    for model in models:
        if model["name"] == name:
            return model
    raise GatewayError(ErrorCode.MODEL_UNAVAILABLE, f"model '{given}' not found", param="model")


async def check_thinks(context: RequestContext, given: str, name: str) -> None:
    """Raise where a model that is asked to think cannot: programs ask again without."""
    model = find(await visible_models(context), name, given)
    if not model["details"].get("reasoning"):
        raise invalid("think", f'"{given}" does not support thinking')


def entry(gateway: Gateway, model: dict[str, Any]) -> dict[str, Any]:
    """A model in the list of `/api/tags`."""
    return {
        "name": model["name"],
        "model": model["name"],
        "modified_at": moment(gateway.started_at),
        "size": _size_bytes(model),
        "digest": _digest(model),
        "details": _details(model),
    }


def running(gateway: Gateway, model: dict[str, Any]) -> dict[str, Any]:
    """A model in the list of `/api/ps`."""
    plain = entry(gateway, model)
    del plain["modified_at"]
    return {
        **plain,
        "expires_at": _NEVER,
        "size_vram": plain["size"],
        "context_length": model["context_tokens"] or 0,
    }


def shown(gateway: Gateway, model: dict[str, Any], takes_tools: bool) -> dict[str, Any]:
    """The answer of `/api/show`."""
    details = model["details"]
    family = _family(model)
    facts: dict[str, Any] = {"general.architecture": family}
    if isinstance(details.get("parameters"), int):
        facts["general.parameter_count"] = details["parameters"]
    if model["context_tokens"]:
        facts[f"{family}.context_length"] = model["context_tokens"]
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "details": _details(model),
        "model_info": facts,
        "capabilities": _capabilities(model, takes_tools),
        "modified_at": moment(gateway.started_at),
    }


def _capabilities(model: dict[str, Any], takes_tools: bool) -> list[str]:
    kinds, generates = model["kinds"], Kind.CHAT in model["kinds"]
    found = {
        "completion": generates,
        "embedding": Kind.EMBED in kinds,
        "vision": bool(model["images"]),
        "tools": generates and takes_tools,
        "thinking": generates and bool(model["details"].get("reasoning")),
    }
    return [name for name, has in found.items() if has]


def _family(model: dict[str, Any]) -> str:
    architecture = str(model["details"].get("architecture") or "")
    return architecture.partition("For")[0].lower() or "unknown"


def _details(model: dict[str, Any]) -> dict[str, Any]:
    family, details = _family(model), model["details"]
    count = details.get("parameters")
    return {
        "parent_model": "",
        "format": "",
        "family": family,
        "families": [family],
        "parameter_size": _written(count) if isinstance(count, int) else "",
        "quantization_level": str(details.get("dtype") or "").upper(),
    }


def _written(count: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.1f}{letter}"
    return str(count)


def _size_bytes(model: dict[str, Any]) -> int:
    """Of the weights, where they are stored as they are."""
    details = model["details"]
    count, width = details.get("parameters"), _BYTES.get(str(details.get("dtype")))
    if not isinstance(count, int) or width is None or details.get("quantised"):
        return 0
    return count * width


def _digest(model: dict[str, Any]) -> str:
    facts = msgspec.json.encode([model["name"], model["details"]], order="deterministic")
    return hashlib.sha256(facts).hexdigest()
