"""A model whose weights are in another library: its facts, its jobs, and what it cannot honour.

`describe` reads configuration, tokenizer and processor with transformers; `LibraryModel` makes jobs
ready exactly as the transformers engine does; `LibraryEngine` runs them. A parameter that the
library cannot honour is refused by name, never ignored. Must never load weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Kind, ModelInfo, Params, Request
from worker.engines.base import Capabilities, EngineLoadError, EngineOptions, Job
from worker.engines.common.generator import Generator, LibraryRunner
from worker.engines.common.images import ImageLimits
from worker.engines.common.processors import load_processor
from worker.engines.common.prompt import PromptBuilder
from worker.engines.common.runner import Runner
from worker.engines.common.sequence import Sequence
from worker.engines.common.template import use_template
from worker.engines.transformers.engine import TransformersEngine, model_name
from worker.engines.transformers.loaded import LoadedModel, wrap_model
from worker.engines.transformers.served import Prepared, ServedModel
from worker.engines.transformers.settings import EngineSettings

__all__ = [
    "LibraryEngine",
    "LibraryModel",
    "describe",
    "explained",
    "named_models",
    "refuse_options",
    "wrap_elsewhere",
]


# --- facts ----------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Elsewhere:
    """Stands where the transformers engine has its model: the weights are in another library."""

    config: Any
    generation_config: Any = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    base_model: Any = None

    def eval(self) -> _Elsewhere:
        return self

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter(())

    def get_output_embeddings(self) -> object:
        return self


def wrap_elsewhere(
    config: Any,
    tokenizer: Any,
    processor: Any = None,
    *,
    settings: EngineSettings,
    generation_config: Any = None,
    details: Mapping[str, Any],
) -> LoadedModel:
    """The facts of a model that another library holds. `details` are told to people."""
    stand_in = _Elsewhere(config, generation_config)
    loaded = wrap_model(stand_in, tokenizer, processor, settings=settings)
    architectures = getattr(config, "architectures", None) or [type(config).__name__]
    loaded.details = {"architecture": architectures[0], **details}
    return loaded


def describe(
    path: str, options: EngineOptions, settings: EngineSettings, *, pictures: bool, library: str
) -> LoadedModel:
    """Read what there is to know of the model at `path` (a folder or a hub id), but no weights.

    `pictures`: the library takes pictures where the model does. Raises `EngineLoadError`.
    """
    common: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    with explained(path, library):
        config = AutoConfig.from_pretrained(path, **common)
        takes_pictures = pictures and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        processor = load_processor(path, config, **common) if takes_pictures else None
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, **common)
        try:
            generation = GenerationConfig.from_pretrained(path, revision=options.revision)
        except OSError:
            # Optional: without it the configuration names the end tokens.
            generation = None
    if getattr(config, "is_encoder_decoder", False):
        raise EngineLoadError(
            f"{path} is an encoder-decoder model, which engine {library} does not serve here: "
            "serve it with --engine transformers"
        )
    loaded = wrap_elsewhere(
        config,
        tokenizer,
        processor,
        settings=settings,
        generation_config=generation,
        details={"library": library},
    )
    use_template(loaded, options.chat_template)
    return loaded


@contextmanager
def explained(path: str, library: str) -> Iterator[None]:
    """Turn whatever loading raises into one clear line."""
    try:
        yield
    except EngineLoadError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise EngineLoadError(f"{library} cannot load {path}: {cause[:400]}") from error


def named_models(options: EngineOptions, *, several: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Each model's path and the names under which it is served. Raises `EngineLoadError`."""
    if not options.model_paths:
        raise EngineLoadError(f"engine {options.engine} needs a model: name it with --model-path")
    if len(options.model_paths) > 1 and not several:
        raise EngineLoadError(
            f"engine {options.engine} serves one model per worker: start a worker for each"
        )
    names = options.model_names or tuple(
        (model_name(path).removesuffix(".gguf"),) for path in options.model_paths
    )
    if len(names) != len(options.model_paths):
        raise EngineLoadError(
            f"{len(names)} names were given for {len(options.model_paths)} models"
        )
    return list(zip(options.model_paths, names, strict=True))


def refuse_options(options: EngineOptions, reasons: Mapping[str, str]) -> None:
    """Refuse options of the worker that this engine cannot honour: name of the field to what to do
    instead. Raises `EngineLoadError`."""
    neutral = EngineOptions()
    for name, reason in reasons.items():
        if getattr(options, name) != getattr(neutral, name):
            flag = "--" + name.replace("_", "-")
            raise EngineLoadError(f"engine {options.engine} does not take {flag}: {reason}")


# --- jobs -----------------------------------------------------------------------------------------

_NEUTRAL = Params()


class LibraryPromptBuilder(PromptBuilder):
    """Prompts as the transformers engine builds them, and pictures for a library to expand."""

    def unexpanded(self, job: Job) -> dict[str, Any]:
        """ "ids": the prompt with one placeholder for each picture; "images": the pictures, in
        order. Raises RequestError."""
        request = job.request
        pictures = self._decode(job)
        with self._lock:
            if request.kind is Kind.COMPLETE:
                text = self._raw_text(request, len(pictures))
            else:
                text = self.template_text(request, pictures)
            ids = self._encoded(self._unmarked(text, len(pictures)))
        return {"ids": ids, "images": [picture.image for picture in pictures]}


class LibraryModel(ServedModel):
    """One model in another library's hands, under its names.

    `unsupported` maps names of `Params` fields that the library cannot honour to the reason.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        names: tuple[str, ...],
        settings: EngineSettings,
        generator: Generator,
        *,
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        self._generator = generator
        self._unsupported = dict(unsupported or {})
        for name in self._unsupported:
            loaded.sampling_defaults.pop(name, None)
        super().__init__(loaded, names, settings, slots=generator.slots)
        limits = ImageLimits(pixels=settings.image_pixels, octets=settings.image_bytes)
        self.builder: LibraryPromptBuilder = LibraryPromptBuilder(loaded, limits)

    def _make_runner(self, settings: EngineSettings, slots: int) -> Runner:
        self.scheduler = str(self.loaded.details.get("library", "library"))
        return LibraryRunner(self._generator)

    def infos(self) -> list[ModelInfo]:
        """One record for each name; embedding is the transformers engine's."""
        kinds = tuple(kind for kind in Kind if kind is not Kind.EMBED)
        return [
            ModelInfo(
                name=info.name,
                kinds=kinds,
                context_tokens=info.context_tokens,
                images=info.images,
                details=info.details,
            )
            for info in super().infos()
        ]

    def prepare(self, job: Job, added_at: float) -> Prepared:
        """Make a job ready, in a preprocessing thread. Raises RequestError."""
        request = job.request
        if request.kind is Kind.EMBED:
            raise RequestError(
                ErrorCode.INVALID_REQUEST,
                f"model {request.model} does not embed on engine {self.scheduler}: serve it with "
                "--engine transformers",
                details={"parameter": "kind"},
            )
        if request.kind in (Kind.CHAT, Kind.COMPLETE):
            self._refuse(request)
        return super().prepare(job, added_at)

    def _refuse(self, request: Request) -> None:
        for name, reason in self._unsupported.items():
            if getattr(request.params, name) != getattr(_NEUTRAL, name):
                raise RequestError(
                    ErrorCode.INVALID_REQUEST,
                    f"{name}: engine {self.scheduler} {reason}",
                    details={"parameter": name},
                )

    def _sequence(self, job: Job, added_at: float) -> Sequence:
        sequence = super()._sequence(job, added_at)
        if sequence.prompt.media:
            # The library makes its own inputs of the pictures.
            sequence.prompt.media = self.builder.unexpanded(job)
            sequence.prompt.aligned = {}
        return sequence


class LibraryEngine(TransformersEngine):
    """Runs jobs on models in another library's hands."""

    def __init__(
        self, engine: str, device: str, served: list[ServedModel], settings: EngineSettings
    ) -> None:
        runners = [model.runner for model in served if model.runner is not None]
        slots = max(runner.slots for runner in runners)
        super().__init__(served, settings, slots=slots)
        self._own = replace(self._capabilities, engine=engine, device=device)

    @property
    def capabilities(self) -> Capabilities:
        return self._own
