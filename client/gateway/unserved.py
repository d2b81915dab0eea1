"""Fields that are known and not served: what each is refused with, and what else asks for it.

Beside OpenAI's own there are those of other servers that their clients send along, mostly with the
value that asks for nothing. Must never take a field silently that would change the answer.
"""

from __future__ import annotations

import functools
from typing import Annotated, Any, Final, get_type_hints

from msgspec import Meta, Struct

from client.gateway.errors import invalid
from client.gateway.structured import OutputWords

__all__ = ["Label", "OtherServers", "Refused", "refuse_unserved"]

#: A known field that this gateway does not serve; see `_UNSERVED`.
Refused = Annotated[Any, Meta(extra_json_schema={"type": "null"})]
#: A cache hint, or a field that SDK objects have: any value, without effect on the answer.
Label = Any


class OtherServers(OutputWords, kw_only=True):
    """Fields of vLLM, SGLang and llama.cpp for whatever generates text."""

    #: -1: the oldest tokens of a prompt that is too long are dropped.
    truncate_prompt_tokens: int | None = None
    #: What a server's log calls the request; here that is the header `x-request-id`.
    request_id: Label = None
    rid: Label = None
    #: Fast tokenizers, which all models here have, put nothing between them.
    spaces_between_special_tokens: Label = None
    add_special_tokens: Refused = None
    #: SGLang's name of `include_stop_str_in_output`.
    no_stop_trim: bool | None = None
    allowed_token_ids: Refused = None
    bad_words: Refused = None
    beam_width: Refused = None
    cache_salt: Refused = None
    chat_template: Refused = None
    documents: Refused = None
    kv_transfer_params: Refused = None
    length_penalty: Refused = None
    logprob_token_ids: Refused = None
    logits_processors: Refused = None
    lora_path: Refused = None
    media_io_kwargs: Refused = None
    mm_processor_kwargs: Refused = None
    post_sampling_probs: Refused = None
    return_cached_tokens_details: Refused = None
    return_hidden_states: Refused = None
    return_meta_info: Refused = None
    return_progress: Refused = None
    return_routed_experts: Refused = None
    stop_regex: Refused = None
    structural_tag: Refused = None
    timings_per_token: Refused = None
    use_beam_search: Refused = None
    vllm_xargs: Refused = None


_UNSERVED: Final = {
    "add_special_tokens": "a prompt gets what its model expects; send token ids instead",
    "allowed_token_ids": "engines are told which tokens are biased or forbidden, not which alone "
    "are allowed; use `structured_outputs` (`choice`, `regex`)",
    "bad_words": "use `logit_bias` with the ids of their tokens",
    "beam_width": "there is no beam search here",
    "cache_salt": "prefixes are shared by all who use a worker",
    "documents": "write them into a message, or into `chat_template_kwargs`",
    "kv_transfer_params": "the bus moves no KV cache between servers",
    "length_penalty": "there is no beam search here",
    "logprob_token_ids": "the most likely tokens are told, by `top_logprobs` or `logprobs`",
    "logits_processors": "use `logit_bias` or `structured_outputs`",
    "lora_path": "an adapter is a model of its own: name it in `model`",
    "structural_tag": "use `tools`, or `structured_outputs`",
    "use_beam_search": "there is no beam search here",
    "vllm_xargs": "they are arguments of one server's plug-ins",
    "audio": "the bus serves text and images, not audio",
    "chat_template": "the chat template is the model's own",
    "context_management": "send the part of the conversation that the model should see",
    "container": "nothing here runs code",
    "fallbacks": "send the request again, to another model",
    "file": "send text, or an image as `image_url`",
    "file_id": "no files are kept here; send an image as `image_url`",
    "function_call": "it is the deprecated form of `tool_choice`",
    "functions": "it is the deprecated form of `tools`",
    "input_audio": "the bus serves text and images, not audio",
    "mcp_servers": "connect to them in your program and send their tools",
    "max_chunks_per_doc": "documents are scored whole; `truncate_prompt_tokens: -1` cuts them",
    "max_tokens_per_doc": "documents are scored whole; `truncate_prompt_tokens: -1` cuts them",
    "media_io_kwargs": "images are read as they are",
    "mm_processor_kwargs": "images are read as the model's own files say",
    "moderation": "this gateway has no moderation model",
    "prompt": "prompt templates are not stored here; send `input` and `instructions`",
    "rank_fields": "send the text of each document",
    "post_sampling_probs": "log probabilities are those before sampling",
    "return_cached_tokens_details": "`usage` has the number of cached tokens",
    "return_hidden_states": "workers send tokens, no states of the model",
    "return_meta_info": "the answer has its usage, and the headers name the requests of the bus",
    "return_progress": "`/completion`, llama.cpp's own path, tells it",
    "return_routed_experts": "workers send tokens, no states of the model",
    "timings_per_token": "`/completion`, llama.cpp's own path, tells them",
    "stop_regex": "use `stop`, or a `regex` for the whole answer",
    "task_budget": "use `max_tokens` and `thinking.budget_tokens`",
    "toolset_name": "nothing here defines a toolset",
    "transformations": "send the image as the model should see it",
    "web_search_options": "the bus has no access to the web",
}

#: Values of unserved fields that do not change the answer.
_ASKING_NOTHING: Final[dict[str, tuple[Any, ...]]] = {
    "function_call": ("none", "auto"),
    "length_penalty": (1, 0),
    "beam_width": (1,),
    "use_beam_search": (False,),
    # The servers' own defaults.
    "add_special_tokens": (True,),
    **dict.fromkeys(
        (
            *("post_sampling_probs", "return_cached_tokens_details", "return_hidden_states"),
            *("return_meta_info", "return_progress", "return_routed_experts"),
            "timings_per_token",
        ),
        (False,),
    ),
}


def refuse_unserved(body: Struct, path: str = "") -> None:
    """Raise for the first known but unserved field that is set, in the body or nested in it."""
    refused = _refused_fields(type(body))
    for field in body.__struct_fields__:
        value = getattr(body, field)
        if value is None:  # most of them, in every request
            continue
        here = f"{path}.{field}" if path else field
        if field in refused and value not in (
            *([], {}, ""),
            *_ASKING_NOTHING.get(field, ()),
        ):
            raise invalid(here, f"`{here}` is not served: {_UNSERVED[field]}.")
        if isinstance(value, Struct):
            refuse_unserved(value, here)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, Struct):
                    refuse_unserved(item, f"{here}[{index}]")


@functools.cache
def _refused_fields(kind: type[Struct]) -> frozenset[str]:
    hints = get_type_hints(kind, include_extras=True)
    return frozenset(field for field, hint in hints.items() if hint == Refused)
