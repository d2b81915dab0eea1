"""An adapter's own tokenizer, chat template and added tokens.

Training programs save them with the adapter, which was trained with them. Must never change those
of the base.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import cached_file

from worker.engines.base import EngineLoadError
from worker.engines.common.failures import one_line
from worker.engines.common.processors import load_processor

__all__ = ["OwnTexts", "own_texts"]

_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True, slots=True)
class OwnTexts:
    """A tokenizer that differs from the base's, and its processor if there is one."""

    tokenizer: Any
    processor: Any
    #: Whether every token has the same id as in the base.
    same_tokens: bool


def own_texts(
    path: str, model: Any, tokenizer: Any, processor: Any, *, trust_remote_code: bool = False
) -> OwnTexts | None:
    """The tokenizer and processor in an adapter's folder (or hub id), or None if it has none or
    they are the same as the base's (`tokenizer`, `processor`).

    `model` is the base with the adapter. Raises `EngineLoadError` for a tokenizer that cannot be
    read, or that has tokens without embeddings in the model.
    """
    own = _read(path, model, tokenizer, trust_remote_code=trust_remote_code)
    if own is None:
        return None
    same_tokens = own.get_vocab() == tokenizer.get_vocab()
    if not same_tokens:
        _refuse_without_rows(path, model, tokenizer, own)
    own_processor = None
    if processor is not None:
        if any(_has(path, name) for name in _PROCESSOR_FILES):
            own_processor = load_processor(path, model.config, trust_remote_code=trust_remote_code)
        else:
            own_processor = copy.copy(processor)
            own_processor.tokenizer = own
            if own.chat_template is not None:
                own_processor.chat_template = own.chat_template
    elif same_tokens and _facts(own) == _facts(tokenizer):
        return None
    return OwnTexts(own, own_processor, same_tokens)


def _read(path: str, model: Any, tokenizer: Any, *, trust_remote_code: bool) -> Any:
    if any(_has(path, name) for name in _TOKENIZER_FILES):
        try:
            return AutoTokenizer.from_pretrained(
                path, config=model.config, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # from tokenizers, the template or remote code
            raise EngineLoadError(
                f"adapter {path} comes with a tokenizer that cannot be read: {one_line(error, 300)}"
            ) from error
    if _has(path, _TEMPLATE):
        own = copy.deepcopy(tokenizer)
        own.chat_template = Path(_file(path, _TEMPLATE)).read_text()
        return own
    return None


def _file(path: str, name: str) -> Any:
    """The path of a file in a folder or of a hub id; None if there is none."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    return cached_file(
        path,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _has(path: str, name: str) -> bool:
    return _file(path, name) is not None


def _refuse_without_rows(path: str, model: Any, tokenizer: Any, own: Any) -> None:
    rows = int(model.get_input_embeddings().weight.shape[0])
    known = tokenizer.get_vocab()
    rowless = sorted(
        token
        for token, token_id in own.get_vocab().items()
        if token_id >= rows and token not in known
    )
    if rowless:
        raise EngineLoadError(
            f"adapter {path} cannot be served: its tokenizer adds {', '.join(rowless[:3])}"
            f"{', ...' if len(rowless) > 3 else ''}, but its weights have no embeddings for them. "
            "Save it with save_embedding_layers=True"
        )


def _facts(tokenizer: Any) -> tuple[Any, ...]:
    """Properties other than the vocabulary that affect how texts are tokenised."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    return (
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        core.to_str() if core is not None else None,
    )
