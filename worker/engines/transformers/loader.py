"""Loads a model with its tokenizer, processor and facts, from a local folder or a hub id.

Every failure to load becomes an `EngineLoadError` with one line that names the cause and the
remedy. Must never run the model: `selftest` does warm-up and self test.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from broker.protocol.install import install_hint
from worker.engines.base import EngineLoadError, EngineOptions, Progress
from worker.engines.common.failures import one_line
from worker.engines.common.processors import load_processor
from worker.engines.paths import local_folder
from worker.engines.transformers.adapter_texts import own_texts
from worker.engines.transformers.adapters import merge_adapter
from worker.engines.transformers.loaded import LoadedModel, wrap_model
from worker.engines.transformers.loading.checkpoint import (
    refuse_left_out,
    refuse_missing,
    weight_names,
)
from worker.engines.transformers.loading.classes import ModelClass, model_class
from worker.engines.transformers.loading.dense import explained_conversion
from worker.engines.transformers.loading.llava import (
    LlavaParts,
    assemble,
    find_parts,
    language_config,
    refuse_incomplete_llava,
)
from worker.engines.transformers.loading.quantise import (
    bitsandbytes_config,
    computes_quantised,
    normalise_skip_names,
    refuse_packed_scales,
    stored_skip_list,
    tell_dense_weights,
    warn_of_lost_rounding,
)
from worker.engines.transformers.memory import host_bytes
from worker.engines.transformers.settings import EngineSettings

__all__ = ["load_model", "pick_device"]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

SMALL_BYTES = 1 << 27
"""On a CPU, `dtype=auto` computes half-precision weights of up to this size in float32: exact, and
fast enough."""

FLOAT32_SHARE = 0.5
"""On a processor without bfloat16 instructions, larger weights are computed in float32 too, if they
then take at most this share of memory: matrix products of a batch in bfloat16 take 3 times as long
there as in float32, and 4 times without AVX-512."""


def pick_device(name: str) -> torch.device:
    """The torch device for `--device`; "auto" means the best one available. Raises
    `EngineLoadError` if it is unknown or not available."""
    if name == "auto":
        for kind in ("cuda", "xpu", "npu", "mps"):
            if _available(kind):
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise EngineLoadError(
            f"unknown device {name!r}: choose auto, cpu, cuda, cuda:1, mps, xpu or npu"
        ) from None
    if device.type != "cpu" and not _available(device.type):
        raise EngineLoadError(
            f"device {name!r} is not available to this torch ({torch.__version__}): "
            "choose another --device or install a build of torch for it"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EngineLoadError(f"there is no {name}: {torch.cuda.device_count()} GPUs are visible")
    return device


def _available(kind: str) -> bool:
    if kind == "mps":
        return torch.backends.mps.is_available()
    backend = getattr(torch, kind, None)
    return backend is not None and bool(backend.is_available())


def load_model(
    path: str, options: EngineOptions, settings: EngineSettings, progress: Progress
) -> LoadedModel:
    """Load one model: a complete one, a PEFT adapter merged into its base (`--model-base`), or
    parts trained by the LLaVA project, assembled with their base.

    Raises `EngineLoadError`.
    """
    adapter: str | None = None
    folder = local_folder(path)
    if folder is not None:
        parts = find_parts(folder, safetensors_only=settings.safetensors_only)
        if parts is not None:
            return _load_llava(parts, options, settings, progress)
    if folder is not None and _is_adapter(folder):
        adapter, path = path, options.model_base or _base_of_adapter(folder)
    elif folder is not None and not (folder / "config.json").is_file():
        raise EngineLoadError(
            f"{folder} holds no config.json: give the folder that save_pretrained wrote"
        )
    elif options.model_base is not None:
        adapter, path = path, options.model_base
    if adapter is not None:
        folder = local_folder(path)
        if folder is not None and _is_adapter(folder):
            raise EngineLoadError(
                f"{folder}, the base of adapter {adapter}, is an adapter itself: merge it into its "
                "own base first"
            )
        if folder is not None and find_parts(folder, safetensors_only=False) is not None:
            raise EngineLoadError(
                f"{adapter} is an incomplete LLaVA: its base {folder} is in the LLaVA project's "
                "format, but config.json and the projector (non_lora_trainables.bin) are missing "
                "beside the adapter; copy the whole folder"
            )
    with _explained(path):
        config = AutoConfig.from_pretrained(
            path, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    # An adapter of a sentence embedding model may have its own pooling and dense layers.
    held = None if adapter is None else local_folder(adapter)
    facts = held if held is not None and (held / "modules.json").is_file() else folder
    chosen = model_class(
        config,
        facts,
        path,
        trust_remote_code=options.trust_remote_code,
        revision=options.revision,
    )
    if held is not None and not chosen.takes_images:
        refuse_incomplete_llava(held)
    device = pick_device(options.device)
    size = _weight_bytes(folder)
    with _explained(path):
        dtype = _pick_dtype(options, config, device, size, chosen.auto)
    progress(0.0, f"loading {path}" + (f" ({size / 2**30:.1f} GiB)" if size else ""))
    with _explained(path):
        model, quantised = _load_weights(
            path, config, chosen.auto, device, dtype, options, settings, progress
        )
        if adapter is not None:
            model = merge_adapter(model, adapter, settings, progress, quantised=quantised)
        tokenizer, processor = _load_tokenizer(path, config, options, chosen)
        if adapter is not None:
            texts = own_texts(
                adapter,
                model,
                tokenizer,
                processor,
                trust_remote_code=options.trust_remote_code,
            )
            if texts is not None:
                tokenizer, processor = texts.tokenizer, texts.processor
    progress(1.0, f"loaded {path}")
    return wrap_model(
        model, tokenizer, processor, settings=settings, folder=facts, quantised=quantised
    )


def _load_llava(
    parts: LlavaParts, options: EngineOptions, settings: EngineSettings, progress: Progress
) -> LoadedModel:
    """A LLaVA assembled from its base, its vision tower and the folder's weights."""
    base = options.model_base
    if parts.whole:
        base = str(parts.folder)
    elif base is None and parts.has_adapter:
        base = _base_of_adapter(parts.folder)
    if base is None:
        raise EngineLoadError(
            f"{parts.folder} holds only {parts.weights[0].name} of a LLaVA: name its language "
            "model with --model-base"
        )
    folder = local_folder(base)
    spread = _is_spread(options, settings)
    if spread and (options.load_8bit or options.load_4bit):
        raise EngineLoadError(
            f"{parts.folder} is assembled from parts: it can only be quantised on a single device "
            "(--device cuda:0, no max_memory)"
        )
    with _explained(base):
        if parts.whole:
            config = language_config(parts)
        else:
            config = AutoConfig.from_pretrained(base, trust_remote_code=options.trust_remote_code)
        # Layers can only be spread over devices once the whole model is known.
        device = torch.device("cpu") if spread else pick_device(options.device)
        dtype = _pick_dtype(options, config, device, _weight_bytes(folder), AutoModelForCausalLM)
        progress(0.0, f"loading {base}")
        own = replace(options, revision=None, device=str(device))
        language_model, quantised = _load_weights(
            base,
            config,
            AutoModelForCausalLM,
            device,
            dtype,
            own,
            replace(settings, max_memory=""),
            progress,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            base, config=config, trust_remote_code=options.trust_remote_code
        )
    with _explained(str(parts.folder)):
        if parts.has_adapter:
            language_model = merge_adapter(
                language_model, str(parts.folder), settings, progress, quantised=quantised
            )
        model, processor = assemble(
            parts,
            language_model,
            tokenizer,
            safetensors_only=settings.safetensors_only,
            attention=None if settings.attention == "auto" else settings.attention,
        )
        if spread:
            model = _spread(model, settings)
    progress(1.0, f"loaded {parts.folder}")
    return wrap_model(
        model, tokenizer, processor, settings=settings, folder=parts.folder, quantised=quantised
    )


# --- where the model is ---------------------------------------------------------------------------


def _is_adapter(folder: Path) -> bool:
    """Whether a folder contains a PEFT adapter, with or without a copy of its base's config.json.
    Raises `EngineLoadError` if it also contains a complete model."""
    if not (folder / "adapter_config.json").is_file():
        return False
    if any(
        file
        for end in ("safetensors", "bin")
        for file in folder.glob(f"*model*.{end}")
        if not file.name.startswith("adapter_")
    ):
        # transformers would apply the adapter to that model, which may already be the merged one.
        raise EngineLoadError(
            f"{folder} holds a complete model and an adapter: move one of them into a folder of "
            "its own"
        )
    return True


def _base_of_adapter(folder: Path) -> str:
    import json

    file = folder / "adapter_config.json"
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise EngineLoadError(f"{file} is damaged: {one_line(error, 200)}") from error
    if not base:
        raise EngineLoadError(f"{folder} is an adapter without a base: name it with --model-base")
    return str(base)


def _weight_bytes(folder: Path | None) -> int:
    """Bytes of a folder's safetensors files; 0 if it has none, or the model is on the hub."""
    if folder is None:
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _half_bytes(size: int, config: Any, auto: Any, options: EngineOptions) -> int:
    """Bytes of the weights in half precision. `size`: those of the files, 0 if not known."""
    if size:
        # 4-bit weights are four times as large in half precision.
        packed = getattr(config, "quantization_config", None) is not None
        return 4 * size if packed else size
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=options.trust_remote_code)
    return 2 * int(sum(parameter.numel() for parameter in model.parameters()))


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn exceptions of transformers into an `EngineLoadError` of one clear line."""
    try:
        yield
    except EngineLoadError:
        raise
    except ImportError as error:
        raise EngineLoadError(
            f"{path} needs a package that is not installed: {one_line(error, 400)}"
        ) from error
    except SafetensorError as error:
        raise EngineLoadError(
            f"cannot load {path}: one of its weight files is damaged or incomplete; download it "
            f"again ({one_line(error, 400)})"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        text = one_line(error, 400)
        if "trust_remote_code" in str(error):
            text = "it comes with its own code: read it, then pass --trust-remote-code"
        elif "does not recognize this architecture" in text or "model type" in text:
            text += " (a newer transformers may know it)"
        elif "couldn't connect to" in text:
            text = (
                "there is no such folder here, and the hub cannot be reached: check the network, "
                "or give the folder of a copy"
            )
        elif "safetensors" in text:
            text += " (pickled weights: --engine-arg safetensors_only=false if you trust them)"
        raise EngineLoadError(f"cannot load {path}: {text}") from error


# --- classes, dtype, weights ----------------------------------------------------------------------


def _pick_dtype(
    options: EngineOptions, config: Any, device: torch.device, size: int, auto: Any
) -> torch.dtype:
    """The dtype to compute in. `size`: bytes of the weights' files, 0 if not known; `auto`: the
    class that makes the model of its config."""
    name = options.dtype
    if name != "auto":
        if name not in DTYPES:
            raise EngineLoadError(f"unknown dtype {name!r}: choose auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = DTYPES.get(stored.removeprefix("torch."))
    if device.type != "cpu":
        return stored or torch.float16
    if stored in (None, torch.float32):
        return torch.float32
    size = _half_bytes(size, config, auto, options)
    if size <= SMALL_BYTES:
        return torch.float32
    if multiplies_bfloat16():
        return torch.bfloat16
    # Total memory, not free memory: the choice must not depend on what else runs.
    room = min(host_bytes(), options.memory_bytes or sys.maxsize)
    if 2 * size <= FLOAT32_SHARE * room:
        return torch.float32
    log.warning(
        "computing in bfloat16, because float32 weights would take more than half of the memory; "
        "this is slow on a processor without bfloat16 instructions (--dtype float32 overrides it)"
    )
    return torch.bfloat16


def multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 multiply instructions (AVX-512 BF16 or AMX)."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def _load_weights(
    path: str,
    config: Any,
    auto_class: Any,
    device: torch.device,
    dtype: torch.dtype,
    options: EngineOptions,
    settings: EngineSettings,
    progress: Progress,
) -> tuple[Any, bool]:
    """The model, and whether it computes like a quantised one. Raises `EngineLoadError`."""
    if options.load_8bit and options.load_4bit:
        raise EngineLoadError("choose one of --load-8bit and --load-4bit")
    common: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    kwargs: dict[str, Any] = dict(
        common,
        config=config,
        dtype=dtype,
        use_safetensors=True if settings.safetensors_only else None,
    )
    if settings.attention != "auto":
        kwargs["attn_implementation"] = settings.attention
    if _is_spread(options, settings):
        kwargs["device_map"] = "auto"
        if settings.max_memory:
            kwargs["max_memory"] = _max_memory(settings.max_memory)
    else:
        kwargs["device_map"] = {"": str(device)}
    stored = getattr(config, "quantization_config", None)
    bits = 8 if options.load_8bit else 4 if options.load_4bit else 0
    if stored is not None:
        if bits:
            raise EngineLoadError(
                f"{path} is quantised already: load it without --load-8bit and --load-4bit"
            )
        as_dict = stored if isinstance(stored, dict) else stored.to_dict()
        config.quantization_config = _stored_quantisation(as_dict, path)
        names = weight_names(path, options.revision)
        if as_dict.get("quant_method") == "bitsandbytes" and names:
            skeleton = _skeleton(auto_class, config, options)
            config.quantization_config = stored_skip_list(as_dict, skeleton, names, path)
    elif bits:
        kwargs["quantization_config"] = bitsandbytes_config(
            _skeleton(auto_class, config, options), bits=bits, dtype=dtype, device=device
        )
    with _weights_progress(progress, path), explained_conversion(path):
        model, loading_info = auto_class.from_pretrained(path, output_loading_info=True, **kwargs)
    refuse_packed_scales(model, path)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise EngineLoadError(f"{path} is an adapter: name its base with --model-base")
    refuse_missing(model, loading_info["missing_keys"], path, quantised=stored is not None)
    if stored is None:
        refuse_left_out(model, loading_info["unexpected_keys"], path)
    if stored is not None:
        warn_of_lost_rounding(model, as_dict, path)
    if bits:
        tell_dense_weights(model, path)
    return model, computes_quantised(model)


def _skeleton(auto_class: Any, config: Any, options: EngineOptions) -> Any:
    """The model on the meta device, without weights and not quantised."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return auto_class.from_config(config, trust_remote_code=options.trust_remote_code)


def _stored_quantisation(stored: dict[str, Any], path: str) -> dict[str, Any]:
    """The quantisation config with which a quantised checkpoint is loaded. Raises
    `EngineLoadError` if this engine cannot read its format."""
    method = str(stored.get("quant_method", "")).lower()
    if method == "awq" and not _installed("gptqmodel"):
        from worker.engines.transformers.loading import awq

        return awq.dequantising_config(stored, path)
    if method == "gptq" and not _installed("gptqmodel", "optimum"):
        from worker.engines.transformers.loading import gptq

        return gptq.dequantising_config(stored, path)
    if method == "compressed-tensors":
        if not _installed("compressed_tensors"):
            raise EngineLoadError(f"{path} needs compressed-tensors: {install_hint('compressed')}")
        from worker.engines.transformers.loading import compressed

        return compressed.keeping_config(stored, path)
    return normalise_skip_names(stored)


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def _is_spread(options: EngineOptions, settings: EngineSettings) -> bool:
    """Whether accelerate spreads the model over several devices."""
    return bool(settings.max_memory) or (
        options.device == "auto" and torch.cuda.is_available() and torch.cuda.device_count() > 1
    )


def _spread(model: Any, settings: EngineSettings) -> Any:
    """Spread a model that is on the CPU, as `device_map="auto"` would."""
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    kept = list(model._no_split_modules or ())
    limits: Any = _max_memory(settings.max_memory) if settings.max_memory else None
    limits = get_balanced_memory(model, max_memory=limits, no_split_module_classes=kept)
    return dispatch_model(
        model, infer_auto_device_map(model, max_memory=limits, no_split_module_classes=kept)
    )


def _max_memory(text: str) -> dict[int | str, str]:
    """Parse `0=20GiB,cpu=64GiB` for accelerate."""
    result: dict[int | str, str] = {}
    for item in text.split(","):
        name, separator, amount = item.partition("=")
        if not separator or not amount:
            raise EngineLoadError(f"max_memory={text}: expected DEVICE=AMOUNT, as in 0=20GiB")
        result[int(name) if name.strip().isdigit() else name.strip()] = amount.strip()
    return result


@contextmanager
def _weights_progress(progress: Progress, path: str) -> Iterator[None]:
    """Report what transformers' weight-loading progress bar shows to `progress`."""

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        if kwargs.get("desc") != "Loading weights":
            return factory(*args, **kwargs)
        return _Reported(args[0] if args else kwargs["iterable"], progress, path)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


class _Reported:
    """Takes the place of a progress bar and reports to `progress`."""

    def __init__(self, items: Any, progress: Progress, path: str) -> None:
        self._items, self._progress, self._path = list(items), progress, path

    def __iter__(self) -> Iterator[Any]:
        reported = 0.0
        for index, item in enumerate(self._items):
            yield item
            fraction = (index + 1) / len(self._items)
            if fraction - reported >= 0.01:
                reported = fraction
                self._progress(fraction, f"loading weights of {self._path}")

    def __getattr__(self, name: str) -> Any:
        # set_postfix, update, close and the like do nothing here.
        return lambda *args, **kwargs: None


def _load_tokenizer(
    path: str, config: Any, options: EngineOptions, chosen: ModelClass
) -> tuple[Any, Any]:
    """The tokenizer, and the processor of a model that accepts images."""
    common: dict[str, Any] = {
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
    }
    processor = None
    if chosen.takes_images:
        processor = load_processor(path, config, **common)
    elif chosen.may_take_images:
        processor = _remote_processor(path, config, common)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(path, **common)
    return tokenizer, processor


def _remote_processor(path: str, config: Any, common: dict[str, Any]) -> Any:
    """The processor that a model's remote code brings; None, with a warning, if it cannot be loaded
    or does not put images into prompts: the model is then served without images."""
    try:
        processor = load_processor(path, config, **common)
    except Exception as error:  # whatever the folder's own code raises
        cause = one_line(error, 400)
    else:
        if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
            return processor
        cause = f"{type(processor).__name__} does not put images into prompts"
    log.warning("%s is served without images: its processor cannot be used: %s", path, cause)
    return None
