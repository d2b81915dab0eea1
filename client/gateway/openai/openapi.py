"""`GET /openapi.json`: generated from the types that decode the bodies.

Answers are as in OpenAI's own reference; only their media types and our errors are described.
"""

from __future__ import annotations

import functools
from typing import Any

import msgspec
from starlette.responses import Response

from client import __version__
from client.gateway.anthropic.bodies import CountTokensRequest, MessagesRequest
from client.gateway.batches.records import BatchRequest, CompleteRequest, UploadRequest
from client.gateway.context import RequestContext
from client.gateway.ids import KEPT_ID
from client.gateway.llamacpp.bodies import (
    LLAMACPPS_PATHS,
    CompletionBody,
    EmbeddingBody,
    InfillBody,
)
from client.gateway.ollama.bodies import (
    ChatBody,
    EmbedBody,
    EmbeddingsBody,
    GenerateBody,
    ModelBody,
)
from client.gateway.openai.chat_batch import ChatBatchRequest
from client.gateway.openai.conversations import (
    ConversationItems,
    ConversationRequest,
    ConversationUpdate,
)
from client.gateway.openai.responses_body import INCLUDABLE, ResponseRequest
from client.gateway.openai.responses_compact import CompactRequest
from client.gateway.openai.stored_chats import ChatUpdate
from client.gateway.operator_view import DrainBody
from client.gateway.requests import ChatRequest, CompletionRequest, EmbeddingRequest
from client.gateway.scoring.bodies import ClassifyRequest, RerankRequest, ScoreRequest
from client.gateway.systemone.bodies import SystemOneRequest
from client.gateway.tokens.bodies import (
    DetokenizeRequest,
    InputTokensRequest,
    TemplateRequest,
    TokenizeRequest,
)

__all__ = ["openapi"]

_TAKES = {
    ("post", "/v1/chat/completions"): (ChatRequest, "Answer a conversation."),
    ("post", "/v1/chat/completions/batch"): (ChatBatchRequest, "Answer several conversations."),
    ("post", "/v1/completions"): (CompletionRequest, "Continue raw prompts."),
    ("post", "/v1/embeddings"): (EmbeddingRequest, "Vectors of texts."),
    ("post", "/v1/messages"): (MessagesRequest, "Answer a conversation, as Anthropic's API does."),
    ("post", "/v1/messages/count_tokens"): (
        CountTokensRequest,
        "The length of a conversation's prompt.",
    ),
    ("post", "/v1/systemone"): (SystemOneRequest, "Answer typed questions with probabilities."),
    ("post", "/v1/responses"): (ResponseRequest, "Answer an input."),
    ("post", "/v1/responses/input_tokens"): (InputTokensRequest, "Count the tokens of an input."),
    ("post", "/v1/responses/compact"): (CompactRequest, "Summarise a conversation to go on with."),
    ("post", "/v1/chat/completions/{id}"): (ChatUpdate, "Give a stored chat other labels."),
    ("post", "/v1/conversations"): (ConversationRequest, "Begin a conversation."),
    ("post", "/v1/conversations/{id}"): (ConversationUpdate, "Give a conversation other labels."),
    ("post", "/v1/conversations/{id}/items"): (ConversationItems, "Add items to a conversation."),
    ("post", "/v1/batches"): (BatchRequest, "Begin a batch over a file of requests."),
    ("post", "/v1/uploads"): (UploadRequest, "Begin a file that is sent in parts."),
    ("post", "/v1/uploads/{id}/complete"): (CompleteRequest, "Make a file of the parts."),
    ("post", "/v1/rerank"): (RerankRequest, "Order documents by relevance."),
    ("post", "/v1/score"): (ScoreRequest, "Score pairs of texts."),
    ("post", "/v1/classify"): (ClassifyRequest, "Label texts."),
    ("post", "/tokenize"): (TokenizeRequest, "Tokens of a text or a conversation."),
    ("post", "/detokenize"): (DetokenizeRequest, "The text of tokens."),
    ("post", "/apply-template"): (TemplateRequest, "The prompt that a conversation becomes."),
    ("post", "/completion"): (CompletionBody, "llama.cpp's API: continue prompts."),
    ("post", "/infill"): (InfillBody, "llama.cpp's API: fill in a middle."),
    ("post", "/embedding"): (EmbeddingBody, "llama.cpp's API: vectors of texts."),
    ("post", "/api/chat"): (ChatBody, "Ollama's API: answer a conversation."),
    ("post", "/api/generate"): (GenerateBody, "Ollama's API: answer or continue a prompt."),
    ("post", "/api/embed"): (EmbedBody, "Ollama's API: vectors of texts."),
    ("post", "/api/embeddings"): (EmbeddingsBody, "Ollama's API: the vector of a text."),
    ("post", "/api/show"): (ModelBody, "Ollama's API: one model."),
    ("post", "/api/pull"): (ModelBody, "Ollama's API: whether a model is served."),
    ("post", "/bus/drain"): (DrainBody, "Let a worker finish and leave; for operators."),
}
_TAKES_NOTHING = {
    ("get", "/v1/models"): "The models of the bus.",
    ("get", "/v1/models/{id}"): "One model.",
    ("get", "/v1/chat/completions"): "The key's stored chats, the oldest first.",
    (
        "get",
        "/v1/chat/completions/{id}",
    ): "A stored chat; or continue reading an answer that outlived its connection.",
    ("delete", "/v1/chat/completions/{id}"): "Forget a stored chat.",
    ("get", "/v1/chat/completions/{id}/messages"): "What a stored chat was asked with.",
    ("post", "/v1/chat/completions/{id}/cancel"): "Stop such an answer.",
    ("get", "/v1/messages/{id}"): "Continue reading a message that outlived its connection.",
    ("post", "/v1/messages/{id}/cancel"): "Stop such a message.",
    ("get", "/v1/responses/{id}"): "A kept response.",
    ("delete", "/v1/responses/{id}"): "Forget a response.",
    ("post", "/v1/responses/{id}/cancel"): "Stop a response in the background.",
    ("get", "/v1/responses/{id}/input_items"): "The input of a response.",
    ("get", "/v1/conversations/{id}"): "A conversation.",
    ("delete", "/v1/conversations/{id}"): "Forget a conversation and its items.",
    ("get", "/v1/conversations/{id}/items"): "Its items.",
    ("get", "/v1/conversations/{id}/items/{item}"): "One item.",
    ("delete", "/v1/conversations/{id}/items/{item}"): "Forget an item.",
    ("get", "/v1/files"): "The key's files, the newest first.",
    ("get", "/v1/files/{id}"): "One file.",
    ("delete", "/v1/files/{id}"): "Delete a file.",
    ("get", "/v1/files/{id}/content"): "The bytes of a file.",
    ("get", "/v1/batches"): "The key's batches, the newest first.",
    ("get", "/v1/batches/{id}"): "One batch.",
    ("post", "/v1/batches/{id}/cancel"): "Run no further lines of a batch.",
    ("post", "/v1/uploads/{id}/cancel"): "Give up a file that was sent in parts.",
    ("get", "/props"): "llama.cpp's API: what a model is served with.",
    ("get", "/tokenizer_info"): "What the tokenizer of a model tells about itself.",
    ("get", "/api/tags"): "Ollama's API: the models of the bus.",
    ("get", "/api/ps"): "Ollama's API: the models that are ready.",
    ("get", "/api/version"): "Ollama's API: the release that it follows.",
    ("get", "/v1/usage"): "Requests and tokens of a key by day and model.",
    ("get", "/me"): "What the key may do, and what it has used of its budgets.",
    ("get", "/bus/session"): "What the key may do.",
    ("get", "/bus/overview"): "The current state of the bus; for operators.",
    ("get", "/health"): "Whether the process is alive.",
    ("get", "/ready"): "Whether the broker answers.",
    ("get", "/metrics"): "Metrics in Prometheus' format.",
}
#: Beginnings of paths that stream events.
_STREAMED = (
    "/v1/chat",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/completion",
    "/infill",
)
_INCLUDE = {"type": "array", "items": {"enum": list(INCLUDABLE)}}
_LIMIT = {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}
_QUERY: dict[str, dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "after": {"type": "string"},
        "limit": _LIMIT,
        "order": {"enum": ["asc", "desc"], "default": "asc"},
        "model": {"type": "string"},
    },
    "/v1/chat/completions/{id}": {"stream": {"type": "boolean", "default": False}},
    "/v1/chat/completions/{id}/messages": {
        "after": {"type": "string"},
        "limit": _LIMIT,
        "order": {"enum": ["asc", "desc"], "default": "asc"},
    },
    "/v1/conversations/{id}/items": {
        "after": {"type": "string"},
        "limit": _LIMIT,
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "include": _INCLUDE,
    },
    "/v1/conversations/{id}/items/{item}": {"include": _INCLUDE},
    "/v1/responses/{id}": {
        "stream": {"type": "boolean", "default": False},
        "starting_after": {"type": "integer", "minimum": 0},
        "include": _INCLUDE,
        "include_obfuscation": {"type": "boolean"},
    },
    "/v1/responses/{id}/input_items": {
        "after": {"type": "string"},
        "limit": _LIMIT,
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "include": _INCLUDE,
    },
    "/v1/files": {
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 10_000},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "purpose": {"type": "string"},
    },
    "/v1/batches": {"after": {"type": "string"}, "limit": _LIMIT},
    "/v1/usage": {
        "days": {"type": "integer", "minimum": 1, "maximum": 3660, "default": 31},
        "key": {"type": "string"},
    },
    "/props": {"model": {"type": "string"}},
    "/tokenizer_info": {"model": {"type": "string"}},
    "/metrics": {"scope": {"enum": ["all", "gateway"], "default": "all"}},
}
#: Of a file that is sent, and of a part of one.
_FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_PART_FORM = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "format": "binary"}},
}
_FORMS = {
    "/v1/files": (_FORM, "Keep a file of batch lines."),
    "/v1/uploads/{id}/parts": (_PART_FORM, "Keep a part of a file."),
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
                "details": {"type": "object"},
                "request_id": {"type": "string"},
            },
        }
    },
}
#: Ollama's shape.
_ERROR_TEXT = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {"type": "string"},
        "code": {"type": "string"},
        "param": {"type": "string"},
        "request_id": {"type": "string"},
    },
}
_LLAMACPPS_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["code", "message", "type", "error_code"],
            "properties": {
                "code": {"type": "integer"},
                "message": {"type": "string"},
                "type": {"type": "string"},
                "error_code": {"type": "string"},
                "param": {"type": "string"},
                "request_id": {"type": "string"},
                "n_prompt_tokens": {"type": "integer"},
                "n_ctx": {"type": "integer"},
            },
        }
    },
}
_ANTHROPICS_ERROR = {
    "type": "object",
    "required": ["type", "error", "request_id"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {
                "type": {"type": "string"},
                "message": {"type": "string"},
                "details": {"type": "object"},
            },
        },
        "request_id": {"type": "string"},
    },
}


async def openapi(context: RequestContext) -> Response:
    """The document."""
    return Response(_document(), media_type="application/json")


@functools.cache
def _document() -> bytes:
    bodies = [body for body, _ in _TAKES.values()]
    schemas, components = msgspec.json.schema_components(
        bodies, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for ((method, path), (_, words)), schema in zip(_TAKES.items(), schemas, strict=True):
        content = {"application/json": {"schema": schema}}
        paths.setdefault(path, {})[method] = {
            **_operation(path, words, {}),
            "requestBody": {"required": True, "content": content},
        }
    for (method, path), words in _TAKES_NOTHING.items():
        query = _QUERY.get(path, {}) if method == "get" else {}
        paths.setdefault(path, {})[method] = _operation(path, words, query)
    for path, (form, words) in _FORMS.items():
        paths.setdefault(path, {})["post"] = {
            **_operation(path, words, {}),
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "tokenbus gateway", "version": __version__},
            "paths": paths,
            "components": {
                "schemas": {
                    **components,
                    "Error": _ERROR,
                    "ErrorText": _ERROR_TEXT,
                    "AnthropicsError": _ANTHROPICS_ERROR,
                    "LlamaCppsError": _LLAMACPPS_ERROR,
                },
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
            "security": [{}, {"key": []}],
        }
    )


def _error_at(path: str) -> str:
    name = "Error"
    if path.startswith("/v1/messages"):
        name = "AnthropicsError"
    elif path.startswith("/api/"):
        name = "ErrorText"
    elif path in LLAMACPPS_PATHS:
        name = "LlamaCppsError"
    return f"#/components/schemas/{name}"


def _operation(path: str, words: str, query: dict[str, dict[str, Any]]) -> dict[str, Any]:
    media = ["text/plain"] if path in ("/health", "/metrics") else ["application/json"]
    if path.endswith("/content"):
        media = ["application/octet-stream"]
    if path.startswith(_STREAMED):
        media.append("text/event-stream")
    of_ollama = path.startswith("/api/")
    if of_ollama:
        media.append("application/x-ndjson")
    operation: dict[str, Any] = {
        "summary": words,
        "responses": {
            "200": {"description": "Done.", "content": {kind: {} for kind in media}},
            "default": {
                "description": "Refused or failed; `code` is OpenAI's or the bus's.",
                "content": {"application/json": {"schema": {"$ref": _error_at(path)}}},
            },
        },
    }
    if path == "/ready":
        operation["responses"]["503"] = {
            "description": "Not ready, and why.",
            "content": {"application/json": {}},
        }
    parameters: list[dict[str, Any]]
    parameters = [{"name": name, "in": "query", "schema": schema} for name, schema in query.items()]
    if "{id}" in path:
        schema: dict[str, Any] = {"type": "string"}
        if not path.startswith(("/v1/models/", "/v1/files/", "/v1/uploads/", "/v1/batches/")):
            schema["pattern"] = f"^{KEPT_ID}$"
        parameters.append({"name": "id", "in": "path", "required": True, "schema": schema})
    if "{item}" in path:
        schema = {"type": "string", "minLength": 1}
        parameters.append({"name": "item", "in": "path", "required": True, "schema": schema})
    if parameters:
        operation["parameters"] = parameters
    return operation
