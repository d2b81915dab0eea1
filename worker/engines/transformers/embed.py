"""Embeddings: hidden states of texts, pooled and normalised, in bounded batches.

Pooling, normalisation and dense layers follow the model's sentence-transformers files if it has
them; otherwise an embedding is the normalised mean. Runs on the engine's thread between decode
steps; must never tokenise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from broker.protocol.errors import ErrorCode, RequestError
from worker.engines.base import EngineLoadError
from worker.engines.transformers.loaded import LoadedModel

__all__ = ["BATCH_TOKENS", "EmbedOptions", "Embedder", "batches_by_length", "embed_options"]

BATCH_TOKENS = 4096
"""Most tokens of one batch, padding included: limits how long running streams wait."""

POOLINGS = ("mean", "cls", "last", "max")


@dataclass(frozen=True, slots=True)
class EmbedOptions:
    """Options of one request; None means the model's own."""

    pooling: str | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    #: Whether an input that is too long is cut at its end; otherwise it is refused.
    truncate: bool = False


def embed_options(arguments: dict[str, Any], width: int) -> EmbedOptions:
    """Check a request's `embed_args`; `width`: dimensions of the model's embeddings. Raises
    `RequestError` (INVALID_REQUEST)."""
    unknown = sorted(set(arguments) - set(EmbedOptions.__slots__))
    if unknown:
        raise _invalid(
            f"unknown embed_args {', '.join(unknown)}: {', '.join(EmbedOptions.__slots__)}"
        )
    pooling = arguments.get("pooling")
    if pooling is not None and pooling not in POOLINGS:
        raise _invalid(f"pooling {pooling!r}: choose one of {', '.join(POOLINGS)}")
    normalize = arguments.get("normalize")
    if normalize is not None and not isinstance(normalize, bool):
        raise _invalid("normalize must be true or false")
    dimensions = arguments.get("dimensions")
    if dimensions is not None and (
        not isinstance(dimensions, int)
        or isinstance(dimensions, bool)
        or not 1 <= dimensions <= width
    ):
        raise _invalid(f"dimensions must be an integer between 1 and {width}")
    truncate = arguments.get("truncate", False)
    if not isinstance(truncate, bool):
        raise _invalid("truncate must be true or false")
    return EmbedOptions(pooling, normalize, dimensions, truncate)


def batches_by_length(lengths: list[int], together: int) -> list[list[int]]:
    """Indices of inputs with these lengths, in batches of similar length within `BATCH_TOKENS`. An
    input of more than `together` tokens is a batch of its own."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = lengths[index]
        fits = batches and longest * (len(batches[-1]) + 1) <= BATCH_TOKENS
        if fits and longest <= together:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


class Embedder:
    """Embeds token ids with one model."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._loaded = loaded
        model = loaded.model
        self._base = model
        if loaded.encoder_decoder:
            self._base = model.get_encoder()
        elif not loaded.embedding_only:
            self._base = model.base_model
        self._pooling, self._normalize, self._dense = _sentence_files(loaded.folder)
        config = model.config.get_text_config(decoder=True)
        #: Dimensions of one embedding.
        self.width = (
            self._dense[-1][0].shape[0] if self._dense else int(getattr(config, "hidden_size", 0))
        )

    def batches(self, inputs: list[list[int]]) -> list[list[int]]:
        """Indices of the inputs, in batches of similar length within `BATCH_TOKENS`. If rotary
        frequencies depend on the longest input of a batch, long ones are computed alone."""
        rope = self._loaded.rope
        together = BATCH_TOKENS if rope is None else rope.unchanged_tokens
        return batches_by_length(list(map(len, inputs)), together)

    @torch.inference_mode()
    def embed(
        self, batch: list[list[int]], options: EmbedOptions, adapter: str | None = None
    ) -> list[bytes]:
        """Embeddings of one batch, computed with `adapter`: little-endian float32 each."""
        device = self._loaded.device
        longest = max(map(len, batch))
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        ids, mask = ids.to(device), mask.to(device)
        self._loaded.choose_rows([adapter] * len(batch))
        with self._loaded.any_length():
            output = self._base(input_ids=ids, attention_mask=mask)
        pooled = _pool(output[0].float(), mask, options.pooling or self._pooling)
        for weight, bias, activation in self._dense:
            pooled = activation(
                torch.nn.functional.linear(
                    pooled, weight.to(device), None if bias is None else bias.to(device)
                )
            )
        if options.dimensions is not None:
            pooled = pooled[:, : options.dimensions]
        if self._normalize if options.normalize is None else options.normalize:
            pooled = torch.nn.functional.normalize(pooled, dim=-1)
        return [row.astype("<f4").tobytes() for row in pooled.cpu().numpy()]


def _pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool right-padded states [batch, tokens, width] to [batch, width]."""
    if pooling == "cls":
        return states[:, 0]
    if pooling == "last":
        return states[torch.arange(len(states), device=states.device), mask.sum(1) - 1]
    seen = mask[:, :, None].bool()
    if pooling == "max":
        return states.masked_fill(~seen, -torch.inf).amax(1)
    return states.masked_fill(~seen, 0.0).sum(1) / mask.sum(1, keepdim=True)


Dense = tuple[torch.Tensor, torch.Tensor | None, Any]


def _sentence_files(folder: Path | None) -> tuple[str, bool, list[Dense]]:
    """Pooling, normalisation and dense layers of a sentence-transformers folder; without one,
    normalised means. Raises `EngineLoadError` for modules that are not supported."""
    if folder is None or not (folder / "modules.json").is_file():
        return "mean", True, []
    pooling, normalize = "mean", False
    dense: list[Dense] = []
    for module in json.loads((folder / "modules.json").read_text()):
        kind, path = module["type"].rsplit(".", 1)[-1], folder / module["path"]
        if kind == "Normalize":
            normalize = True
        elif kind == "Pooling":
            pooling = _pooling_mode(path / "config.json")
        elif kind == "Dense":
            dense.append(_dense(path))
        elif kind != "Transformer":
            raise EngineLoadError(
                f"{folder} embeds with a module of type {module['type']}, which is not supported; "
                "only Transformer, Pooling, Dense and Normalize are"
            )
    return pooling, normalize, dense


def _pooling_mode(file: Path) -> str:
    """The pooling of a sentence-transformers module. Raises `EngineLoadError` for an unsupported
    one, and for several combined."""
    config = json.loads(file.read_text())
    stated = config.get("pooling_mode")
    if isinstance(stated, str):
        stated = [stated]
    elif not isinstance(stated, list):
        stated = [
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, value in config.items()
            if name.startswith("pooling_mode_") and value is True
        ]
    names = {"lasttoken": "last"}
    modes = [str(names.get(mode, mode)) for mode in stated] or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        raise EngineLoadError(
            f"{file} asks for pooling {' and '.join(modes)}: only one of {', '.join(POOLINGS)} is "
            "supported"
        )
    return modes[0]


def _dense(path: Path) -> Dense:
    from safetensors.torch import load_file

    config = json.loads((path / "config.json").read_text())
    file = path / "model.safetensors"
    if not file.is_file():
        raise EngineLoadError(f"{path}, a dense layer of the model, has no {file.name}")
    weights = load_file(file)
    name = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    made = getattr(torch.nn, name.rsplit(".", 1)[-1], None)
    if made is None:
        raise EngineLoadError(f"{path} asks for the activation {name}, which torch does not have")
    activation = made()
    return weights["linear.weight"].float(), weights.get("linear.bias"), activation


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message)
