"""Decision models (`XxxForDecision`) in two parts: the backbone, and the head that scores options.

transformers runs such a model one prompt at a time. Here its backbone runs in slots like any other
model, and its head, which is the class's own code, is called with hidden states at the marks of
many prompts. The self test checks that the result is that of `decide()`. Must never choose what is
computed.
"""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

try:
    from transformers.decision import DecisionConfig
    from transformers.decision.modeling_utils import DecisionMixin
    from transformers.models.auto.modeling_auto import MODEL_FOR_DECISION_MAPPING
except ImportError:  # before 5.24
    DecisionConfig, MODEL_FOR_DECISION_MAPPING = None, {}

__all__ = ["Backbone", "DecisionClass", "DecisionHead", "decision_class", "is_decision_model"]


class DecisionClass:
    """Loads one class of decision models in the way that Auto classes load others: transformers'
    own loader for it does not report missing weights."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind

    def from_pretrained(
        self, path: str, *, config: Any, output_loading_info: bool, **kwargs: Any
    ) -> Any:
        """The model, and transformers' loading info about its weights."""
        assert output_loading_info
        kind, revision = self._kind, kwargs.get("revision")
        decisions = None
        if not isinstance(config, kind.config_class):
            config, decisions = kind.checkpoint_config(path, revision=revision)
        above: Any = super(DecisionMixin, kind)
        model, loading_info = above.from_pretrained(
            path, config=config, output_loading_info=True, **kwargs
        )
        model.decision_config = decisions or DecisionConfig.from_pretrained(path, revision=revision)
        adapter = model.decision_config.adapter
        if adapter:
            model.load_adapter(path, adapter_kwargs={"subfolder": adapter})
            # Base and adapter were trained as one model, and are served as one.
            model._hf_peft_config_loaded = False
        return model, loading_info

    def from_config(self, config: Any, **kwargs: Any) -> Any:
        """The model with random weights."""
        return self._kind._from_config(config)


def decision_class(kind: type, path: str, revision: str | None) -> DecisionClass | None:
    """The loader of a checkpoint that is a decision model, or has the head of one beside its
    weights; None for others. `kind`: the class of its configuration."""
    if kind not in MODEL_FOR_DECISION_MAPPING:
        return None
    found = MODEL_FOR_DECISION_MAPPING[kind]
    if kind is found.config_class or found.checkpoint_config(path, revision=revision)[0]:
        return DecisionClass(found)
    return None


def is_decision_model(model: Any) -> bool:
    """Whether a model scores the options of questions itself."""
    return hasattr(model, "decide") and hasattr(model, "decision_config")


class Backbone(nn.Module):
    """A decision model up to its head. Its "logits" are the last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        #: The attribute name that models with a head use.
        self.model = model.base_model
        self.config = self.model.config
        self.name_or_path = model.name_or_path
        own = inspect.signature(self.model.forward)
        kept = inspect.Parameter("logits_to_keep", inspect.Parameter.KEYWORD_ONLY, default=0)
        others = [p for p in own.parameters.values() if p.name != kept.name]
        named = [p for p in others if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in others if p.kind is p.VAR_KEYWORD]

        def forward(*, logits_to_keep: int | torch.Tensor = 0, **arguments: Any) -> Any:
            states = self.model(**arguments).last_hidden_state
            kept = (
                slice(-logits_to_keep, None)
                if isinstance(logits_to_keep, int)
                else (logits_to_keep)
            )
            return SimpleNamespace(logits=states[:, kept])

        # Callers inspect which arguments a model's forward takes.
        forward.__signature__ = own.replace(parameters=[*named, kept, *rest])  # type: ignore[attr-defined]
        self.forward = forward

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def get_input_embeddings(self) -> Any:
        """As for any model of transformers."""
        return self.model.get_input_embeddings()


class _Given(nn.Module):
    """Takes the place of the backbone when its hidden states are already computed."""

    def __init__(self) -> None:
        super().__init__()
        self.states = torch.zeros(0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(last_hidden_state=self.states[None])


class DecisionHead:
    """The head of a decision model, and the whole model."""

    def __init__(self, model: Any) -> None:
        self.model = model
        #: The model's own `DecisionConfig`.
        self.config = model.decision_config
        self._given = _Given()
        # A model with the same weights, whose backbone is replaced.
        self._head = copy.copy(model)
        self._head._modules = dict(model._modules)
        self._head._modules[model.base_model_prefix] = self._given

    def scores(self, states: torch.Tensor, questions: list[Any]) -> list[torch.Tensor]:
        """Scores of the options of each question, before temperatures are applied, from the hidden
        states [questions, width] of the token before each question's mark."""
        self._given.states = states
        places = torch.arange(1, len(states) + 1)
        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        try:
            return _scored(self._head, places, questions, {"input_ids": ids})
        finally:
            self._given.states = torch.zeros(0)

    def whole(
        self, marks: torch.Tensor, questions: list[Any], inputs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The same scores by the whole model. `inputs`: the prompt, with `input_ids` [1, tokens];
        `marks`: the number of tokens before each mark."""
        return _scored(self.model, marks, questions, inputs)


def _scored(
    model: Any, marks: torch.Tensor, questions: list[Any], inputs: dict[str, Any]
) -> list[torch.Tensor]:
    """The forward that `decide()` runs, before temperatures are applied."""
    device = inputs["input_ids"].device
    kinds = [type(question).questions_types.index(question.type) for question in questions]
    options = [len(question.options) for question in questions]
    scores = model(
        marks=marks[None].to(device),
        num_options=torch.tensor([options], device=device),
        question_type_ids=torch.tensor([kinds], device=device),
        **inputs,
    )
    return list(torch.split(scores, options))
