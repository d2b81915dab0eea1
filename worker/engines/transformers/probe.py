"""A small batch of ordinary tokens and a model's output for it, by which adapters are compared.

Must never change a model.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.engines.transformers.loading.adapter_files import explained

__all__ = ["PROBE_ANSWER", "PROBE_ROWS", "PROBE_TOKENS", "outputs_of", "probe_of"]

PROBE_ROWS, PROBE_TOKENS, PROBE_ANSWER = 3, 5, 2
"""All different, so that swapped dimensions are noticed."""


def probe_of(model: Any) -> dict[str, torch.Tensor]:
    """Arguments of a forward over `PROBE_ROWS` rows of ordinary tokens; for an encoder-decoder
    model, with `PROBE_ANSWER` tokens for the decoder."""
    count = int(model.config.get_text_config(decoder=True).vocab_size)
    numbers = torch.arange(PROBE_ROWS * PROBE_TOKENS, device=model.device)
    # Away from both ends of the vocabulary, where special tokens are.
    ids = (count // 3 + numbers * max(count // (3 * len(numbers)), 1)) % count
    ids = ids.reshape(PROBE_ROWS, PROBE_TOKENS)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :PROBE_ANSWER]
    return inputs


@torch.inference_mode()
def outputs_of(model: Any, inputs: dict[str, torch.Tensor], path: str) -> torch.Tensor:
    """The model's first output as float32: logits, or hidden states of a model that only embeds.
    Raises `EngineLoadError`, which names the adapter at `path`."""
    with explained(path):
        outputs: torch.Tensor = model(**inputs)[0]
    return outputs.float()
