"""A GGUF file loaded by llama.cpp: its metadata, and its tokenizer with transformers' interface.

Tokenizer and chat template are those in the file; nothing else is read. Must never touch a context:
`engine` runs the model.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import llama_cpp as ll
from transformers.utils.chat_template_utils import render_jinja_template

from worker.engines.base import EngineLoadError, Progress

__all__ = ["GgufTokenizer", "load_weights", "metadata"]

PIECE_BYTES = 64
"""Most tokens are shorter; for longer ones llama.cpp returns the size needed."""


def load_weights(path: str, gpu_layers: int, progress: Progress) -> Any:
    """Load llama.cpp's model, which the caller frees with `llama_model_free`. Raises
    `EngineLoadError`."""

    def report(fraction: float, _: Any) -> bool:
        progress(fraction, f"loading {path}")
        return True

    params = ll.llama_model_default_params()
    params.n_gpu_layers = gpu_layers
    callback = ll.llama_progress_callback(report)
    params.progress_callback = callback
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise EngineLoadError(
            f"llama.cpp cannot load {path}: it is not a GGUF file that llama.cpp supports"
        )
    return model


def metadata(model: Any, key: str) -> str:
    """A value from the file's header; empty if it has none."""
    buffer = ctypes.create_string_buffer(256)
    length = ll.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode(errors="replace") if length >= 0 else ""


class GgufTokenizer:
    """The file's own tokenizer, with the part of transformers' interface that tokenbus uses.

    llama.cpp's vocabulary is never written to, so any thread may read it.
    """

    def __init__(self, model: Any) -> None:
        self._vocab = ll.llama_model_get_vocab(model)
        self._size = int(ll.llama_vocab_n_tokens(self._vocab))
        template = ll.llama_model_chat_template(model, None)
        self.chat_template = template.decode() if template else None
        bos, eos = ll.llama_vocab_bos(self._vocab), ll.llama_vocab_eos(self._vocab)
        self.bos_token_id = int(bos) if bos >= 0 else None
        self.eos_token_id = int(eos) if eos >= 0 else None
        self.bos_token = self._text(self.bos_token_id)
        self.eos_token = self._text(self.eos_token_id)
        self.all_special_ids = self._where(ll.llama_vocab_is_control)
        self.all_special_tokens = [
            text for text in map(self._text, self.all_special_ids) if text is not None
        ]
        #: Every token that ends a turn or a text.
        self.end_ids = self._where(ll.llama_vocab_is_eog)

    def __len__(self) -> int:
        return self._size

    def __deepcopy__(self, memo: dict[int, Any]) -> GgufTokenizer:
        return self

    def _where(self, test: Callable[[Any, int], bool]) -> list[int]:
        return [token_id for token_id in range(self._size) if test(self._vocab, token_id)]

    def _text(self, token_id: int | None) -> str | None:
        if token_id is None:
            return None
        return self.convert_ids_to_tokens(token_id).decode(errors="replace")

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Token ids of a text; special tokens written in it are recognised."""
        data = text.encode()
        room = len(data) + 8
        while True:
            tokens = (ll.llama_token * room)()
            count = ll.llama_tokenize(
                self._vocab, data, len(data), tokens, room, add_special_tokens, True
            )
            if count >= 0:
                return {"input_ids": list(tokens[:count])}
            room = -count

    def convert_ids_to_tokens(self, token_id: int) -> bytes:
        """The bytes of a token, or the name of a special one. Raises IndexError."""
        if not 0 <= token_id < self._size:
            raise IndexError(token_id)
        room = PIECE_BYTES
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = ll.llama_token_to_piece(self._vocab, token_id, buffer, room, 0, True)
            if count >= 0:
                return buffer.raw[:count]
            room = -count

    def decode(
        self,
        ids: Iterable[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool = False,
    ) -> str:
        """Text of token ids; spaces are never cleaned up."""
        ids = list(ids)
        tokens = (ll.llama_token * len(ids))(*ids)
        room = 16 * len(ids) + 16
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = ll.llama_detokenize(
                self._vocab,
                tokens,
                len(ids),
                buffer,
                room,
                False,
                not skip_special_tokens,
            )
            if count >= 0:
                return buffer.raw[:count].decode(errors="replace")
            room = -count

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, tools: Any = None, **arguments: Any
    ) -> str:
        """Render the file's template. Raises whatever the template raises."""
        arguments.pop("tokenize", None)
        rendered, _ = render_jinja_template(
            conversations=[conversation],
            tools=tools,
            chat_template=self.chat_template,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            **arguments,
        )
        return str(rendered[0])
