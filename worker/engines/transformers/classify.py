"""Rerank and classify: scores of sequence classifiers, computed in bounded batches between decode
steps.

Scores are the model's own logits after its own activation, and do not depend on the batch: loading
compares batched logits with those of single inputs, and if they differ, every input is computed
alone. Must never tokenise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final

import torch

from broker.protocol.errors import ErrorCode, RequestError
from worker.engines.base import EngineLoadError
from worker.engines.common.failures import one_line
from worker.engines.common.prompt import Encoded
from worker.engines.transformers.embed import BATCH_TOKENS, batches_by_length
from worker.engines.transformers.loaded import LoadedModel

__all__ = ["Classifier", "ClassifyOptions", "classify_options"]

log = logging.getLogger(__name__)

TOLERANCE: Final = {torch.float32: 1e-4}
"""Largest change of a logit by batching, relative to the largest logit; beyond it, inputs are
computed alone."""

_HALF_TOLERANCE: Final = 0.05
"""The same in half precision, where the order of additions matters more."""


@dataclass(frozen=True, slots=True)
class ClassifyOptions:
    """Options of one request."""

    #: Whether the model's activation is applied to its logits.
    activation: bool = True
    #: Whether an input that is too long is cut; otherwise it is refused.
    truncate: bool = False


def classify_options(arguments: dict[str, Any]) -> ClassifyOptions:
    """Check a request's `classify_args`. Raises RequestError(INVALID_REQUEST)."""
    known = ClassifyOptions.__slots__
    if set(arguments) - set(known) or not all(isinstance(v, bool) for v in arguments.values()):
        raise RequestError(
            ErrorCode.INVALID_REQUEST,
            f"classify_args may only contain {' and '.join(known)}, each true or false",
        )
    return ClassifyOptions(**arguments)


class Classifier:
    """Scores token ids with one model."""

    def __init__(self, loaded: LoadedModel, examples: list[Encoded]) -> None:
        """Run the model on `examples`, which differ in length, alone and in one batch. Raises
        `EngineLoadError` if that fails."""
        self._loaded = loaded
        self.labels = loaded.labels
        self._activation = _activation(loaded.model.config, len(self.labels))
        self._pad_id = _pad_id(loaded)
        #: Why inputs are computed alone; empty if they are batched.
        self.serial = self._why_alone(examples)

    def batches(self, inputs: list[Encoded]) -> list[list[int]]:
        """Indices of the inputs, in batches of similar length."""
        if self.serial:
            return [[index] for index in range(len(inputs))]
        rope = self._loaded.rope
        together = BATCH_TOKENS if rope is None else rope.unchanged_tokens
        return batches_by_length([len(one.ids) for one in inputs], together)

    def score(
        self, batch: list[Encoded], options: ClassifyOptions, adapter: str | None = None
    ) -> list[bytes]:
        """The scores of each input: little-endian float32, one for each label."""
        logits = self._logits(batch, adapter)
        if options.activation:
            logits = self._activation(logits)
        return [row.astype("<f4").tobytes() for row in logits.cpu().numpy()]

    @torch.inference_mode()
    def _logits(self, batch: list[Encoded], adapter: str | None = None) -> torch.Tensor:
        longest = max(len(one.ids) for one in batch)
        shape = (len(batch), longest)
        ids = torch.full(shape, self._pad_id or 0, dtype=torch.long)
        mask, types = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, one in enumerate(batch):
            ids[row, : len(one.ids)] = torch.tensor(one.ids)
            mask[row, : len(one.ids)] = 1
            if one.types is not None:
                types[row, : len(one.types)] = torch.tensor(one.types)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if any(one.types is not None for one in batch):
            inputs["token_type_ids"] = types
        device = self._loaded.device
        self._loaded.choose_rows([adapter] * len(batch))
        with self._loaded.any_length():
            output = self._loaded.model(
                **{name: value.to(device) for name, value in inputs.items()}
            )
        logits: torch.Tensor = output.logits.float()
        if logits.shape != (len(batch), len(self.labels)):
            raise RuntimeError(f"logits of shape {tuple(logits.shape)} for {shape[0]} inputs")
        return logits

    def _why_alone(self, examples: list[Encoded]) -> str:
        if self._pad_id is None:
            return "it has no padding token"
        try:
            alone = torch.cat([self._logits([one]) for one in examples])
            together = self._logits(examples)
        except Exception as error:
            raise EngineLoadError(f"the classifier fails on a text: {one_line(error)}") from error
        moved = (together - alone).abs().max().item()
        limit = TOLERANCE.get(self._loaded.dtype, _HALF_TOLERANCE)
        if moved <= limit * max(1.0, alone.abs().max().item()):
            return ""
        log.warning("classifier inputs are not batched: batching changes logits by %.2g", moved)
        return f"batching changes its logits by {moved:.2g}"


def _activation(config: Any, labels: int) -> Any:
    """The activation that turns logits into scores: the one that sentence-transformers saved with a
    cross-encoder, else the one that transformers uses for the problem type, else a sigmoid for one
    label and a softmax for several."""
    noted = (getattr(config, "sentence_transformers", None) or {}).get("activation_fn")
    noted = noted or getattr(config, "sbert_ce_default_activation_function", None)
    if noted:
        name = str(noted).rsplit(".", 1)[-1]
        if not str(noted).startswith("torch.nn.") or not hasattr(torch.nn, name):
            raise EngineLoadError(
                f"the classifier's activation is {noted}: only those in torch.nn are supported"
            )
        return torch.nn.Softmax(-1) if name == "Softmax" else getattr(torch.nn, name)()
    if config.problem_type == "regression":
        return torch.nn.Identity()
    if labels == 1 or config.problem_type == "multi_label_classification":
        return torch.nn.Sigmoid()
    return torch.nn.Softmax(-1)


def _pad_id(loaded: LoadedModel) -> int | None:
    """The id that pads a batch; None if there is none. A configuration without one gets the
    tokenizer's: decoder models score the last token that is not padding, and find it by this id."""
    config = loaded.model.config.get_text_config(decoder=True)
    if config.pad_token_id is None:
        config.pad_token_id = getattr(loaded.tokenizer, "pad_token_id", None)
    return None if config.pad_token_id is None else int(config.pad_token_id)
