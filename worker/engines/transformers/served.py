"""One model served by the transformers engine: weights, scheduler, embedder.

The load-time test decides which scheduler serves it. Must never run the model except for that test.
"""

from __future__ import annotations

import functools
import io
import logging

from PIL import Image

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import (
    ImagePart,
    Kind,
    Message,
    Part,
    Request,
    TextPart,
)
from worker.engines.base import EngineLoadError, Job
from worker.engines.common.facts import ModelFacts
from worker.engines.common.prompt import Encoded, Prompt
from worker.engines.common.runner import Runner
from worker.engines.common.served import BatchModel, Prepared
from worker.engines.transformers.batched import BatchedTask
from worker.engines.transformers.classify import Classifier, classify_options
from worker.engines.transformers.decide import (
    Decision,
    DecisionMaker,
    SerialDecision,
    decision_config,
)
from worker.engines.transformers.draft_model import DraftModel, check_vocabulary
from worker.engines.transformers.embed import Embedder, embed_options
from worker.engines.transformers.fallback import GenerateRunner
from worker.engines.transformers.forward import Forward, StaticUse
from worker.engines.transformers.fused import prepare_layers
from worker.engines.transformers.lengths import LengthRunner
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.packed import restore_read
from worker.engines.transformers.selftest import Verdict, check, check_generate
from worker.engines.transformers.settings import EngineSettings
from worker.engines.transformers.slot_drafts import SlotDrafts
from worker.engines.transformers.slots import SlotRunner

__all__ = ["ServedModel"]

log = logging.getLogger(__name__)

_EXAMPLES = ("Yes.", "The quick brown fox jumps over the lazy dog and sleeps until noon.")
"""Texts of different lengths with which a classifier is tested when it is loaded."""

FALLBACK_SLOTS = 4
"""Sequences that take turns in the fallback: they only share time, so few are enough."""


class ServedModel(BatchModel):
    """A loaded model under its names (see `BatchModel`)."""

    def __init__(
        self,
        loaded: LoadedModel,
        names: tuple[str, ...],
        settings: EngineSettings,
        *,
        slots: int,
        draft: LoadedModel | None = None,
    ) -> None:
        super().__init__(loaded, names, settings)
        self.loaded = loaded
        prepare_layers(loaded.model, settings)
        self._draft = draft
        self.classifier: Classifier | None = None
        if loaded.labels:
            examples = self._texts.builder.encoded(_EXAMPLES, truncate=True)
            self.classifier = Classifier(loaded, examples)
        writes_not = loaded.head is not None or self.classifier is not None
        self.embedder = None if writes_not else Embedder(loaded)
        if self.classifier is not None:
            self.serial = self.classifier.serial
        #: The batch scheduler, if there is one: `runner` itself or a part of it.
        self.slot_runner: SlotRunner | None = None
        #: Sequences of this many tokens or more cannot be batched; 0 if there is no such limit.
        self._batch_tokens = 0
        #: Tokens of questions that share one prefill of their state; 0 if each has its own.
        self._branch_tokens = 0
        self._decisions = self._decision_makers()
        if loaded.head is not None or not loaded.embedding_only:
            self.runner = self._make_runner(settings, slots)
        restore_read(loaded.model)
        loaded.reference = None

    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of request that this model answers."""
        if self.loaded.head is not None:
            return (Kind.DECIDE,)
        missing = {Kind.CHAT, Kind.COMPLETE} if self.loaded.embedding_only else set()
        if not self._decisions:
            missing.add(Kind.DECIDE)
        if self.embedder is None:
            missing.add(Kind.EMBED)
        if self.classifier is None:
            missing.add(Kind.CLASSIFY)
        if self.classifier is None or len(self.classifier.labels) != 1:
            missing.add(Kind.RERANK)
        return tuple(kind for kind in Kind if kind not in missing)

    def prepare(self, job: Job, added_at: float) -> Prepared:
        """Prepare a job: templates, tokens, images. Runs in a preprocessing thread. Raises
        `RequestError`."""
        if self.loaded.head is not None and job.request.kind is not Kind.DECIDE:
            raise _invalid(
                f"model {job.request.model} only decides: it answers requests of kind decide "
                "(/v1/systemone, Client.decide, `decide` on the command line)"
            )
        return super().prepare(job, added_at)

    def _decision_makers(self) -> dict[str | None, DecisionMaker]:
        """Decision makers by adapter: one for the model itself (None), and one for each adapter
        with its own tokenizer or template. Empty if the model cannot decide."""
        config = decision_config(self.loaded)
        if config is None:
            return {}
        found: dict[str | None, DecisionMaker] = {
            None: DecisionMaker(self.loaded, self.loaded, config, self._texts.builder)
        }
        for name, texts in self._adapter_texts.items():
            found[name] = DecisionMaker(self.loaded, texts.facts, config, texts.builder)
        return found

    def add_adapter(self, name: str, own: ModelFacts | None) -> None:
        super().add_adapter(name, own)
        config = decision_config(self.loaded)
        if own is not None and config is not None:
            texts = self._adapter_texts[name]
            self._decisions[name] = DecisionMaker(self.loaded, texts.facts, config, texts.builder)

    def remove_adapter(self, name: str) -> None:
        super().remove_adapter(name)
        self._decisions.pop(name, None)
        if self.slot_runner is not None:
            # Another adapter may be loaded under the same name.
            self.slot_runner.rows.prefix.forget(name)

    def decision(self, job: Job) -> Prepared:
        """The decisions that a job asks for. Raises `RequestError`."""
        request = job.request
        maker = self._decisions.get(request.model) or self._decisions.get(None)
        if maker is None:
            raise _invalid(
                f"model {request.model} cannot decide: that needs a decision model, or one with a "
                "chat template and transformers 5.24 or newer"
            )
        prompts = maker.prompts(job)
        longest = max(len(asked.prompt.ids) for asked in prompts)
        fits = self.slot_runner is not None and (
            not self._batch_tokens or longest < self._batch_tokens
        )
        adapter = self._adapter(request)
        if not fits:
            return SerialDecision(maker, job.request_id, prompts, adapter)
        return Decision(maker, job.request_id, prompts, adapter, self._branch_tokens)

    def embedding(self, job: Job) -> BatchedTask[list[int]]:
        """The embeddings that a job asks for. Raises `RequestError`."""
        request = job.request
        if self.embedder is None:
            raise _invalid(f"model {request.model} only classifies: it answers classify and rerank")
        if request.inputs is None:
            raise _invalid("an embed request needs inputs")
        options = embed_options(request.embed_args, self.embedder.width)
        builder = self._texts_of(request).builder
        inputs = builder.embedding_inputs(request.inputs, truncate=options.truncate)
        adapter = self._adapter(request)
        return BatchedTask(
            request_id=job.request_id,
            inputs=inputs,
            prompt_tokens=sum(map(len, inputs)),
            batches=self.embedder.batches(inputs),
            compute=functools.partial(self.embedder.embed, options=options, adapter=adapter),
            answer=lambda found: {"embeddings": found, "dimensions": len(found[0]) // 4},
        )

    def classification(self, job: Job) -> BatchedTask[Encoded]:
        """The scores that a rerank or classify job asks for. Raises `RequestError`."""
        request, kind = job.request, job.request.kind.value
        classifier = self.classifier
        if classifier is None:
            raise _invalid(
                f"model {request.model} cannot {kind}: that needs a sequence classifier "
                "(XForSequenceClassification in its config.json)"
            )
        labels = len(classifier.labels)
        if request.kind is Kind.RERANK and labels != 1:
            raise _invalid(
                f"model {request.model} cannot rerank: that needs a cross-encoder with one label, "
                f"and it has {labels}; use classify instead"
            )
        if request.pairs is None and request.inputs is None:
            raise _invalid(f"a {kind} request needs pairs or inputs")
        options = classify_options(request.classify_args)
        given = request.pairs if request.pairs is not None else request.inputs or []
        inputs = self._texts_of(request).builder.encoded(given, truncate=options.truncate)
        names = list(classifier.labels)
        adapter = self._adapter(request)
        return BatchedTask(
            request_id=job.request_id,
            inputs=inputs,
            prompt_tokens=sum(len(one.ids) for one in inputs),
            batches=classifier.batches(inputs),
            compute=functools.partial(classifier.score, options=options, adapter=adapter),
            answer=lambda found: {"scores": found, "labels": names},
        )

    def _make_runner(self, settings: EngineSettings, slots: int) -> Runner | None:
        loaded = self.loaded
        image_prompt = self._image_prompt() if loaded.takes_images else None
        if settings.scheduler == "generate":
            if loaded.head is None:
                check_generate(loaded, image_prompt)
            verdict = Verdict(None, "requested with --engine-arg scheduler=generate")
        else:
            verdict = check(
                loaded,
                image_prompt,
                static=_static_use(settings, loaded),
                kv_int8=settings.kv_cache_dtype == "int8",
            )
        if verdict.forward is None:
            if settings.kv_cache_dtype == "int8":
                raise EngineLoadError(
                    f"{self.names[0]}: kv_cache_dtype=int8 needs slots, and this model cannot be "
                    f"served from slots: {verdict.reason}; omit --engine-arg kv_cache_dtype"
                )
            if settings.scheduler == "slots":
                raise EngineLoadError(
                    f"{self.names[0]} cannot be served from slots: {verdict.reason}; "
                    "omit --engine-arg scheduler to serve it one request at a time"
                )
            self.serial = verdict.reason
            if loaded.head is not None:
                self.scheduler = "decide()"
                return None
            self.scheduler = "generate"
            return self._one_by_one(slots)
        self.scheduler = "slots"
        if verdict.whole_prompts:
            self.scheduler = "slots, whole prompts"
        elif image_prompt is not None and verdict.forward.vision is None:
            self.scheduler = "slots, whole images"
        chunk = settings.prefill_chunk or (512 if loaded.device.type == "cpu" else 1024)
        if verdict.forward.branches and not verdict.whole_prompts:
            # With more, the branches would mostly compute attention that is masked out.
            self._branch_tokens = min(2 * chunk, 512 if loaded.device.type == "cpu" else 2048)
        self.slot_runner = SlotRunner(
            verdict.forward,
            slots=slots,
            prefill_chunk=chunk,
            stall_ms=settings.stall_ms,
            idle_ms=settings.idle_ms,
            banned_ids=loaded.placeholder_ids,
            token_bytes=self._token_bytes,
            whole_prompts=verdict.whole_prompts,
            overlap=settings.overlap == "on"
            or (settings.overlap == "auto" and loaded.device.type != "cpu"),
            drafts=self._slot_drafts(settings, verdict.forward),
        )
        if loaded.rope is None:
            return self.slot_runner
        self._batch_tokens = limit = loaded.rope.unchanged_tokens - 1
        self.serial = f"only from {limit} tokens, where its rotary frequencies change"
        self.scheduler += f"; from {limit} tokens one by one: rotary frequencies change there"
        if loaded.head is not None:
            return self.slot_runner
        return LengthRunner(self.slot_runner, self._one_by_one(slots), limit)

    def _slot_drafts(self, settings: EngineSettings, forward: Forward) -> SlotDrafts | None:
        loaded = self.loaded
        if settings.speculate == "off" or loaded.head is not None:
            return None
        if not forward.verifies:
            log.info(
                "%s: answers are not drafted (speculate=off): its logits differ when a step "
                "computes several tokens of a row",
                self.names[0],
            )
            return None
        longest = loaded.context_tokens
        if loaded.rope is not None:
            # A forward that contains a later position uses other frequencies for all of them.
            longest = min(longest, loaded.rope.unchanged_tokens - 2)
        model = None
        if self._draft is not None:
            check_vocabulary(loaded, self._draft)
            model = DraftModel(self._draft, loaded.embedding_rows)
        return SlotDrafts(banned_ids=loaded.placeholder_ids, longest=longest, model=model)

    def _one_by_one(self, slots: int) -> GenerateRunner:
        return GenerateRunner(
            self.loaded,
            slots=min(slots, FALLBACK_SLOTS),
            banned_ids=self.loaded.placeholder_ids,
            token_bytes=self._token_bytes,
        )

    def _image_prompt(self) -> Prompt | None:
        """A prompt with an image for the self test; None if the model's processor makes none of a
        plain question."""
        data = io.BytesIO()
        image = Image.new("RGB", (96, 64), (200, 60, 30))
        image.paste((20, 90, 220), (10, 10, 50, 40))
        image.save(data, "PNG")
        attachments = (data.getvalue(),)
        parts: list[Part] = [ImagePart(attachment=0), TextPart(text="What is in this picture?")]
        chat = Request(
            model=self.names[0], messages=[Message(role="user", content=parts)], window=1
        )
        raw = Request(
            model=self.names[0],
            kind=Kind.COMPLETE,
            prompt="<image> What is in this picture?",
            window=1,
        )
        for request in (chat, raw):
            try:
                return self._texts.builder.generation(Job(b"", request, attachments))
            except RequestError as error:
                log.debug("no self-test prompt from %s: %s", request.kind, error)
        return None


def _static_use(settings: EngineSettings, loaded: LoadedModel) -> StaticUse:
    # A captured step does not include the choice of adapters.
    if settings.cuda_graphs == "off" or settings.adapters_folder:
        return StaticUse.NEVER
    places = set((getattr(loaded.model, "hf_device_map", None) or {}).values())
    if loaded.device.type == "cuda" and len(places) < 2:
        return StaticUse.CAPTURED
    # With layers on several devices, or without CUDA, nothing can be captured.
    return StaticUse.UNCAPTURED if settings.cuda_graphs == "on" else StaticUse.NEVER


def _invalid(message: str) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message)
