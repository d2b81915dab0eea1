"""PEFT adapters: checked against their base, and served exactly.

An adapter's file must match its configuration and the modules of the base: every weight in the file
must have a place, and every place a weight. How it is served depends on what it changes:

* Plain LoRA on layers that see the rows of a batch is chosen per row, alongside the base and the
  other adapters (`RowAdapters`).
* Anything else becomes a model of its own that shares the base's weights: it is merged into copies
  of the layers that it changes or, if the weights are quantised and would be rounded a second time,
  computed separately next to them.
* What neither way can reproduce is refused by name.

In the first two cases the result is compared with peft's own forward of that adapter alone. Must
never write to a weight that another model uses.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from worker.engines.base import EngineLoadError, Progress, adapter_paths
from worker.engines.transformers.adapter_texts import OwnTexts, own_texts
from worker.engines.transformers.loaded import LoadedModel, wrap_model
from worker.engines.transformers.loading.adapter_files import (
    Adapter,
    explained,
    peft_library,
    read_adapter,
    refusal,
    refuse_over_quantised,
)
from worker.engines.transformers.loading.llava import refuse_incomplete_llava
from worker.engines.transformers.probe import (
    PROBE_ANSWER,
    PROBE_ROWS,
    PROBE_TOKENS,
    outputs_of,
    probe_of,
)
from worker.engines.transformers.rows import RowAdapters
from worker.engines.transformers.selftest import relative_error, tolerance
from worker.engines.transformers.settings import EngineSettings

__all__ = [
    "Examined",
    "add_adapters",
    "attach",
    "examine",
    "merge_adapter",
    "refuse_second_layer",
    "shared_copy",
]

ALONE = "alone"
"""The adapter's name inside peft, in a model with only one. Served names may contain dots, which
peft does not allow, and a name that is part of a weight's name would confuse it."""

SMALL_BUFFER_BYTES = 1 << 20
"""Buffers below this size are copied, because models write into some of them; larger ones are
packed weights of some quantisers."""


@dataclass(frozen=True, slots=True)
class Attached:
    """A model with an adapter attached."""

    #: peft's wrapper model.
    outer: Any
    #: Names of the base's weights that the adapter's file replaces (biases, embeddings).
    written: frozenset[str]

    @property
    def model(self) -> Any:
        """The transformers model itself; its forward applies the adapter."""
        return self.outer.get_base_model()


@dataclass(frozen=True, slots=True)
class Examined:
    """An adapter that fits its base, attached to a copy that shares the base's weights."""

    adapter: Adapter
    attached: Attached
    texts: OwnTexts | None
    #: Whether it can be chosen per row, in one batch with others.
    fits_rows: bool
    #: The model's facts with the adapter's own tokenizer and template, if it is chosen per row and
    #: has some.
    own_facts: LoadedModel | None


# --- used by the loader ---------------------------------------------------------------------


def merge_adapter(
    model: Any, path: str, settings: EngineSettings, progress: Progress, *, quantised: bool
) -> Any:
    """`model` with the adapter at `path` merged into its weights, or computed separately if these
    are `quantised`. Modifies `model` itself. Raises `EngineLoadError`."""
    progress(None, f"loading adapter {path}")
    adapter = read_adapter(path, settings)
    if quantised:
        refuse_over_quantised(model, adapter)
    rows = _resize(model, adapter)
    attached = attach(model, adapter, ALONE, _shared_weights(model))
    _refuse_empty_rows(attached.model, adapter, rows)
    if quantised:
        return attached.model.eval()
    return _merged(attached, adapter, set())


def add_adapters(
    loaded: LoadedModel, settings: EngineSettings, progress: Progress, *, trust_remote_code: bool
) -> list[tuple[str, LoadedModel]]:
    """Load the adapters in `settings` alongside their base.

    Those that can be chosen per row are put into `loaded`; each of the others is returned under its
    name, as a model that shares with `loaded` everything that it does not change. Raises
    `EngineLoadError`.
    """
    refuse_second_layer(loaded)
    protected = {id(p) for p in loaded.model.parameters()}
    inputs = probe_of(loaded.model)
    untouched = outputs_of(loaded.model, inputs, settings.adapters)
    by_row: dict[str, tuple[Adapter, Attached]] = {}
    own_models: list[tuple[str, LoadedModel]] = []
    for name, path in adapter_paths(settings.adapters).items():
        progress(None, f"loading adapter {name}")
        one = examine(loaded, loaded.model, path, settings, trust_remote_code=trust_remote_code)
        adapter, attached, texts = one.adapter, one.attached, one.texts
        if one.fits_rows:
            by_row[name] = adapter, attached
            if one.own_facts is not None:
                loaded.adapter_texts[name] = one.own_facts
            continue
        if loaded.quantised:
            model, how = attached.model.eval(), "beside the quantised weights"
        else:
            model, how = _merged(attached, adapter, protected), "merged into layers of its own"
        own = wrap_model(
            model,
            texts.tokenizer if texts is not None else loaded.tokenizer,
            texts.processor if texts is not None else loaded.processor,
            settings=settings,
            folder=loaded.folder,
            quantised=loaded.quantised,
        )
        own.details["adapter"] = how
        own_models.append((name, own))
    change = relative_error(outputs_of(loaded.model, inputs, settings.adapters), untouched)
    if not change <= tolerance(loaded.model, quantised=loaded.quantised):
        raise EngineLoadError(
            f"adapters={settings.adapters}: one of them changes its base in memory; give each a "
            "worker of its own (--model-path ADAPTER --model-base BASE)"
        )
    if by_row:
        _put_into_rows(loaded, by_row)
    return own_models


def examine(
    loaded: LoadedModel,
    base: Any,
    path: str,
    settings: EngineSettings,
    *,
    trust_remote_code: bool,
) -> Examined:
    """Read the adapter at `path`, and attach it to a copy of `base` (the model of `loaded`, without
    adapters), which shares its weights. Raises `EngineLoadError`."""
    if not loaded.takes_images and (folder := Path(path).expanduser()).is_dir():
        refuse_incomplete_llava(folder)
    adapter = read_adapter(path, settings)
    if loaded.quantised:
        refuse_over_quantised(base, adapter)
    model = shared_copy(base, weights=not adapter.changes_base)
    rows = _resize(model, adapter)
    attached = attach(model, adapter, ALONE, {id(p) for p in base.parameters()})
    _refuse_empty_rows(attached.model, adapter, rows)
    texts = own_texts(
        path,
        attached.model,
        loaded.tokenizer,
        loaded.processor,
        trust_remote_code=trust_remote_code,
    )
    same_tokens = texts is None or texts.same_tokens
    fits = rows is None and same_tokens and _fits_rows(loaded, attached, adapter)
    own = None
    if fits and texts is not None:
        own = wrap_model(
            loaded.model,
            texts.tokenizer,
            texts.processor,
            settings=settings,
            folder=loaded.folder,
            quantised=loaded.quantised,
        )
        own = replace(own, rope=loaded.rope)
    return Examined(adapter, attached, texts, fits, own)


def refuse_second_layer(loaded: LoadedModel) -> None:
    """Refuse a base that is itself an adapter over quantised weights. Raises `EngineLoadError`."""
    from_peft = any(type(m).__module__.startswith("peft.") for m in loaded.model.modules())
    if from_peft:
        raise EngineLoadError(
            "adapters= needs a base, and this model is itself an adapter over quantised weights: "
            "give the base as --model-path and name both adapters in adapters="
        )


# --- attaching ------------------------------------------------------------------------------------


def shared_copy(model: Any, *, weights: bool = True) -> Any:
    """A copy of `model` that shares its weights in memory; with `weights` False, they are copied
    too."""
    kept: dict[int, Any] = {}
    if weights:
        for tensor in _held_tensors(model):
            kept[id(tensor)] = tensor
    return copy.deepcopy(model, kept)


def _shared_weights(model: Any) -> set[int]:
    """Ids of weights shared by several layers (tied embeddings, repeated layers)."""
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, count in uses.items() if count > 1}


def _held_tensors(model: Any) -> Iterator[torch.Tensor]:
    for module in model.modules():
        # bitsandbytes moves its 8-bit weights in the first forward.
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()
        state = getattr(module, "state", None)
        if hasattr(state, "__dict__"):
            yield from (value for value in vars(state).values() if isinstance(value, torch.Tensor))
        yield from (p for p in module._parameters.values() if p is not None)
        for buffer in module._buffers.values():
            if buffer is not None and buffer.nbytes >= SMALL_BUFFER_BYTES:
                yield buffer


def _resize(model: Any, adapter: Adapter) -> int | None:
    """Give the model as many embedding rows as the adapter's file has. Returns how many it had, or
    None if nothing changed."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight) for layer in layers if hasattr(layer, "weight")}
    rows = int(layers[0].weight.shape[0])
    wanted = rows
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in weights:
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        for key in (f"{stem}.weight", f"{stem}.base_layer.weight"):
            if key in adapter.weights:
                wanted = int(adapter.weights[key].shape[0])
    if wanted == rows:
        return None
    tied = len(weights) < len([layer for layer in layers if layer is not None])
    for layer in layers:
        if layer is not None:
            _own_weights(layer)
    if tied:
        layers[1].weight = layers[0].weight
    with explained(adapter.path):
        model.resize_token_embeddings(wanted, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            # See `_refuse_empty_rows`.
            layer.weight.data[rows:] = torch.nan
    return rows


def _refuse_empty_rows(model: Any, adapter: Adapter, rows: int | None) -> None:
    """Refuse an adapter that adds tokens (after the base's `rows`) but only has a part of their
    weights."""
    if rows is None or rows >= model.get_input_embeddings().weight.shape[0]:
        return
    inputs = probe_of(model)
    ordinary = outputs_of(model, inputs | {"input_ids": inputs["input_ids"] % rows}, adapter.path)
    added = outputs_of(model, inputs | {"input_ids": inputs["input_ids"] * 0 + rows}, adapter.path)
    for outputs, part in ((ordinary, "output head"), (added, "input embeddings")):
        if outputs.isnan().any():
            raise EngineLoadError(
                f"adapter {adapter.path} does not fit: it adds tokens, but its file has no rows "
                f"for them in the {part}. Save it with save_embedding_layers=True"
            )


def attach(target: Any, adapter: Adapter, name: str, protected: set[int]) -> Attached:
    """Attach an adapter to a model, or to a peft model that already has others. Weights whose ids
    are `protected` are replaced, never written to."""
    peft = peft_library()
    known = {id(parameter) for parameter in target.parameters()}
    config = copy.deepcopy(adapter.config)
    config.inference_mode = True
    with explained(adapter.path):
        if isinstance(target, peft.PeftModel):
            target.add_adapter(name, config)
            outer = target
        else:
            outer = peft.PeftModel(target, config, adapter_name=name)
        state = _placed(outer, adapter, name)
        _refuse_misfit(outer, adapter, state, known)
        written = _detach_written(outer, state, known, protected)
        outer.load_state_dict(state, strict=False)
    return Attached(outer.eval(), written)


def _placed(outer: Any, adapter: Adapter, name: str) -> dict[str, torch.Tensor]:
    """The adapter's weights under their names inside `outer`. peft determines these, since it knows
    the names that other releases used."""
    found: dict[str, torch.Tensor] = {}
    load = outer.load_state_dict

    def take(state: dict[str, torch.Tensor], strict: bool = False) -> Any:
        found.update(state)
        return load({}, strict=False)

    outer.load_state_dict = take
    try:
        peft_library().set_peft_model_state_dict(outer, adapter.weights, adapter_name=name)
    except KeyError as error:
        raise EngineLoadError(
            f"adapter {adapter.path} does not fit: its file lacks {error.args[0]}, which its "
            "configuration names"
        ) from None
    finally:
        del outer.load_state_dict
    return found


def _refuse_misfit(
    outer: Any, adapter: Adapter, state: dict[str, torch.Tensor], known: set[int]
) -> None:
    """Refuse unless every weight of the file has a place, and every place a weight."""
    unknown = state.keys() - outer.state_dict().keys()
    if unknown:
        raise EngineLoadError(
            f"adapter {adapter.path} does not fit: it was trained on another model, which has "
            f"{_few(unknown)}"
        )
    names: dict[int, set[str]] = {}
    for name, parameter in outer.named_parameters(remove_duplicate=False):
        if id(parameter) not in known or _is_claimed_bias(name, adapter.config):
            names.setdefault(id(parameter), set()).add(name)
    prefix = peft_library().mapping.PEFT_TYPE_TO_PREFIX_MAPPING.get(adapter.config.peft_type) or ""
    plain = _is_lora(adapter.config)
    lacking = [
        min(own)
        for own in names.values()
        if not own & state.keys()
        # Other kinds have helper weights in addition to trained ones.
        and (plain or any(prefix in name for name in own))
    ]
    if lacking:
        raise EngineLoadError(
            f"adapter {adapter.path} does not fit: its file lacks weights for modules that its "
            f"configuration names: {_few(lacking)}"
        )


def _is_claimed_bias(name: str, config: Any) -> bool:
    """Whether the adapter trained this bias of the base (`bias` is all or lora_only)."""
    bias = getattr(config, "bias", "none")
    if bias == "all":
        return name.rsplit(".", 1)[-1] == "bias"
    return str(bias).endswith("_only") and name.endswith(".base_layer.bias")


def _detach_written(
    outer: Any, state: dict[str, torch.Tensor], known: set[int], protected: set[int]
) -> frozenset[str]:
    """Names of the base's weights that `state` changes; each is replaced by a copy of this model's
    own. Weights equal to the base's are removed from `state`."""
    written = set()
    for prefix, module in outer.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if parameter is None or name not in state or id(parameter) not in known:
                continue
            if torch.equal(parameter, state[name].to(parameter)):
                # peft saves embeddings with an adapter, trained or not.
                del state[name]
                continue
            written.add(name)
            if id(parameter) in protected:
                module._parameters[leaf] = _own(parameter)
    return frozenset(written)


def _few(names: Iterable[str]) -> str:
    shown = sorted(name.removeprefix("base_model.model.") for name in names)
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


# --- merged ---------------------------------------------------------------------------------------


def _merged(attached: Attached, adapter: Adapter, protected: set[int]) -> Any:
    """The model with its adapter merged. Raises `EngineLoadError` if that changes its output."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    outer = attached.outer
    # Only the intended layer may change, not others that share its weight.
    protected = protected | _shared_weights(outer)
    inputs = probe_of(attached.model)
    wanted = outputs_of(attached.model, inputs, adapter.path)
    for module in outer.modules():
        if isinstance(module, BaseTunerLayer):
            only = getattr(module, "parameter_name", None)
            _own_weights(module.get_base_layer(), protected, only=only)
    with explained(adapter.path):
        model = outer.merge_and_unload(safe_merge=True).eval()
    _untie(model)
    error = relative_error(outputs_of(model, inputs, adapter.path), wanted)
    if not error <= tolerance(model, quantised=False):
        raise refusal(adapter.path, f"merging it changes its output (by {error:.3g})")
    return model


def _own(parameter: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=False)


def _own_weights(
    module: nn.Module, protected: set[int] | None = None, *, only: str | None = None
) -> None:
    """Give a layer copies of its weights: of those that are `protected` (None: of all), or of the
    one named `only`."""
    for owner in module.modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None or (only is not None and leaf != only):
                continue
            if protected is None or id(parameter) in protected:
                owner._parameters[leaf] = _own(parameter)


def _untie(model: Any) -> None:
    """Set the configuration to untied weights if an adapter has made them different, so that
    nothing ties them again."""
    inner, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is getattr(inner, "weight", None):
        return
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


# --- in the rows of a batch -----------------------------------------------------------------------


def _fits_rows(loaded: LoadedModel, attached: Attached, adapter: Adapter) -> bool:
    """Whether this adapter can be chosen per row, in one batch with others: it must be plain LoRA
    on layers that see the rows."""
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper
    from transformers.pytorch_utils import Conv1D

    config = adapter.config
    replicated = getattr(config, "layer_replication", None)
    if attached.written or adapter.changes_base or replicated:
        return False
    if not _is_lora(config):  # AdaLoRA's layers are a subclass that does not support rows
        return False
    layers: list[nn.Module] = []
    for module in attached.outer.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            return False
        if not isinstance(module, BaseTunerLayer):
            continue
        if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper):
            return False
        base = module.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D | nn.Embedding) or module.lora_variant:
            return False
        if isinstance(base, nn.Embedding) and loaded.takes_images:
            # Such models also embed single tokens outside of any batch.
            return False
        layers.append(module)  # type: ignore[arg-type]  # a mixin of nn.Module
    return _see_rows(attached.model, layers)


def _is_lora(config: Any) -> bool:
    return str(getattr(config.peft_type, "value", "")) == "LORA"


@torch.inference_mode()
def _see_rows(model: Any, layers: list[nn.Module]) -> bool:
    """Whether each of the layers takes part in a text's forward with the batch's rows as its first
    dimension. Towers, projectors and experts do not."""
    lengths = (PROBE_TOKENS, PROBE_ANSWER) if model.config.is_encoder_decoder else (PROBE_TOKENS,)
    right: dict[nn.Module, bool] = {}

    def look(module: nn.Module, args: Any) -> None:
        shape = args[0].shape
        sees = len(shape) > 1 and shape[0] == PROBE_ROWS and shape[1] in lengths
        right[module] = right.get(module, True) and sees

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        model(**probe_of(model))
    except Exception:
        # A model that does not accept plain text.
        return False
    finally:
        for handle in handles:
            handle.remove()
    return all(right.get(layer, False) for layer in layers)


def _put_into_rows(loaded: LoadedModel, by_row: dict[str, tuple[Adapter, Attached]]) -> None:
    """Put the adapters into the base, and compare a batch of all of them with each one alone."""
    # The reference for the self test: the base without any of them.
    loaded.reference = shared_copy(loaded.model)
    target = loaded.model
    names: dict[str, str] = {}
    for number, (name, (adapter, _)) in enumerate(by_row.items()):
        names[name] = f"row{number}"
        target = attach(target, adapter, names[name], set()).outer
    loaded.rows = RowAdapters(loaded.model, names, target)
    loaded.adapters = tuple(names)
    inputs = probe_of(loaded.model)
    allowed = tolerance(loaded.model, quantised=loaded.quantised)
    base = outputs_of(loaded.reference, inputs, ", ".join(by_row))
    for name, (adapter, attached) in by_row.items():
        wanted = outputs_of(attached.model, inputs, adapter.path)
        loaded.rows.choose([name, None, name])
        got = outputs_of(loaded.model, inputs, adapter.path)
        error = max(relative_error(got[0::2], wanted[0::2]), relative_error(got[1::2], base[1::2]))
        if not error <= allowed:
            raise refusal(adapter.path, f"batching it changes its output (by {error:.3g})")
