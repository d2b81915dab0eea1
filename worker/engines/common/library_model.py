"""A model run by another library: its facts, its jobs, and the parameters that it cannot honour.

`describe` reads configuration, tokenizer and processor with transformers; `LibraryModel` prepares
jobs as for every engine (`served`); `LibraryEngine` runs them. A parameter that the library cannot
honour is refused by name, never ignored. Must never load weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Kind, Params, Request
from worker.engines.base import EngineLoadError, EngineOptions, Job
from worker.engines.common.arguments import SharedSettings, refuse_options
from worker.engines.common.engine import BatchEngine
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import one_line
from worker.engines.common.generator import Generator, LibraryRunner
from worker.engines.common.processors import load_processor
from worker.engines.common.sequence import Sequence
from worker.engines.common.served import BatchModel, Prepared
from worker.engines.common.template import use_template
from worker.naming import name_from_path

__all__ = [
    "LibraryEngine",
    "LibraryModel",
    "architecture",
    "describe",
    "explained",
    "named_models",
    "refuse_options",
]


# --- facts ----------------------------------------------------------------------------------------


def describe(
    path: str, options: EngineOptions, settings: SharedSettings, *, images: bool, library: str
) -> ModelFacts:
    """Read the facts of the model at `path` (a folder or a hub id), without its weights.

    `images`: whether the library accepts images, if the model does. Raises `EngineLoadError`.
    """
    common: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    with explained(path, library):
        config = AutoConfig.from_pretrained(path, **common)
        takes_images = images and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        processor = load_processor(path, config, **common) if takes_images else None
        tokenizer = getattr(processor, "tokenizer", None)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, **common)
        try:
            generation = GenerationConfig.from_pretrained(path, revision=options.revision)
        except OSError:
            # Optional: without it the end tokens come from the configuration.
            generation = None
    if getattr(config, "is_encoder_decoder", False):
        raise EngineLoadError(
            f"{path} is an encoder-decoder model, which engine {library} does not serve here: "
            "serve it with --engine transformers"
        )
    facts = ModelFacts.gather(
        config,
        tokenizer,
        processor,
        settings=settings,
        generation_config=generation,
        details={"architecture": architecture(config), "library": library},
    )
    use_template(facts, options.chat_template)
    facts.reasoning_parser = options.reasoning_parser
    return facts


def architecture(config: Any) -> str:
    """The architecture that a configuration names, for people."""
    named = getattr(config, "architectures", None) or [type(config).__name__]
    return str(named[0])


@contextmanager
def explained(path: str, library: str) -> Iterator[None]:
    """Turn any exception raised by loading into one clear line."""
    try:
        yield
    except EngineLoadError:
        raise
    except Exception as error:
        raise EngineLoadError(f"{library} cannot load {path}: {one_line(error, 400)}") from error


def named_models(options: EngineOptions, *, several: bool) -> list[tuple[str, tuple[str, ...]]]:
    """Each model's path and the names under which it is served. Raises `EngineLoadError`."""
    if not options.model_paths:
        raise EngineLoadError(f"engine {options.engine} needs a model: name it with --model-path")
    if len(options.model_paths) > 1 and not several:
        raise EngineLoadError(
            f"engine {options.engine} serves one model per worker: start a worker for each"
        )
    names = options.model_names or tuple(
        (name_from_path(path).removesuffix(".gguf"),) for path in options.model_paths
    )
    if len(names) != len(options.model_paths):
        raise EngineLoadError(
            f"{len(names)} names were given for {len(options.model_paths)} models"
        )
    return list(zip(options.model_paths, names, strict=True))


# --- jobs -----------------------------------------------------------------------------------------

_NEUTRAL = Params()


class LibraryModel(BatchModel):
    """One model run by another library, under its names.

    `unsupported` maps names of `Params` fields that the library cannot honour to the reason.
    """

    def __init__(
        self,
        facts: ModelFacts,
        names: tuple[str, ...],
        settings: SharedSettings,
        generator: Generator,
        *,
        unsupported: Mapping[str, str] | None = None,
    ) -> None:
        self._unsupported = dict(unsupported or {})
        for name in self._unsupported:
            facts.sampling_defaults.pop(name, None)
        super().__init__(facts, names, settings)
        self.forces_tokens = "thinking_tokens" not in self._unsupported
        self.constrains = "constraint" not in self._unsupported
        self.scheduler = str(facts.details.get("library", "library"))
        self.runner: LibraryRunner = LibraryRunner(generator)

    def prepare(self, job: Job, added_at: float) -> Prepared:
        """Prepare a job, in a preprocessing thread. Raises RequestError."""
        if job.request.kind in (Kind.CHAT, Kind.COMPLETE):
            self._refuse(job.request)
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
            # The library makes its own inputs from the images.
            sequence.prompt.media = self._texts.builder.unexpanded(job)
            sequence.prompt.aligned = {}
        return sequence


class LibraryEngine(BatchEngine):
    """Runs jobs on models that another library runs."""

    def __init__(
        self, engine: str, device: str, models: list[LibraryModel], settings: SharedSettings
    ) -> None:
        slots = max(model.runner.slots for model in models)
        super().__init__(engine, device, models, settings, slots=slots)
