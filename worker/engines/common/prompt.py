"""Converts a request to token ids and model inputs: chat template, raw prompt, token ids, images.

Runs in preprocessing threads, one at a time for each model (a fast tokenizer must not be used from
two threads at once). Messages go through the model's chat template (see `template`). A raw prompt
is the caller's own template: control tokens in it are intended.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.messages import Kind, Message, Request, TextPart, VideoPart
from worker.engines.base import Job, context_overflow
from worker.engines.common.facts import ModelFacts
from worker.engines.common.failures import is_out_of_memory, one_line
from worker.engines.common.footprint import Footprint
from worker.engines.common.images import DecodedImage, ImageLimits, decode_image
from worker.engines.common.template import RAW_PLACEHOLDER, ChatTemplate
from worker.engines.common.tokenizer_facts import infill_tokens, tokenizer_facts

__all__ = ["ALIGNED", "Encoded", "Prompt", "PromptBuilder"]

ALIGNED = ("attention_mask", "token_type_ids", "mm_token_type_ids")
"""Processor outputs with one entry for each prompt token."""

_TOKENIZE_ARGUMENTS = frozenset(("add_special_tokens", "return_tokens", "tokenizer", "infill"))


@dataclass(slots=True)
class Prompt:
    """A prompt ready for prefill."""

    ids: list[int]
    #: Images as the processor made them (pixel_values, image_grid_thw, ...), on the host.
    media: dict[str, Any] = field(default_factory=dict)
    #: Tensors of shape [1, len(ids)] that belong to the token ids (token_type_ids, ...).
    aligned: dict[str, torch.Tensor] = field(default_factory=dict)
    #: int64 [len(ids)]: the ids, with placeholders replaced by a digest of their image. Equal
    #: values here mean equal keys and values in the cache.
    key: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    #: Index after the last placeholder; a prefix that is reused must reach at least this far.
    media_end: int = 0
    image_tokens: int = 0

    def media_on(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """The images on a device; floats are converted to the model's dtype."""
        return {name: _moved(value, device, dtype) for name, value in self.media.items()}

    def inputs(self, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        """Everything but the token ids, on a device."""
        aligned = {name: value.to(device) for name, value in self.aligned.items()}
        return self.media_on(device, dtype) | aligned


class Encoded(NamedTuple):
    """An input for a model that reads it whole (embeddings, scores)."""

    ids: list[int]
    #: Which text of a pair each token belongs to, for models that use this.
    types: list[int] | None


class PromptBuilder:
    """Builds prompts for one model. Every method raises `RequestError` for what cannot be
    served."""

    def __init__(self, facts: ModelFacts, limits: ImageLimits) -> None:
        self._facts = facts
        self._limits = limits
        self._tokenizer = facts.tokenizer
        self._processor = facts.processor
        self._footprint = Footprint(getattr(facts.processor, "image_processor", None))
        self._lock = threading.Lock()
        self._template = ChatTemplate(facts)

    # --- by kind of request --------------------------------------------------------------------

    def generation(self, job: Job) -> Prompt:
        """The prompt of a chat or complete request, images included."""
        request = job.request
        images = self.images(job)
        with self._lock:
            if request.token_ids is not None:
                return self._fit(self._from_ids(request.token_ids, images), request, images)
            if request.kind is Kind.COMPLETE:
                text = self._raw_text(request, len(images))
            else:
                text = self.template_text(request, images)
            prompt = self._tokenised(text, images)
            self._check_ids(prompt.ids)
            return self._fit(prompt, request, images)

    def unexpanded(self, job: Job) -> dict[str, Any]:
        """The prompt for a library that processes images itself: "ids", with one placeholder for
        each image, and "images", the images in order."""
        request = job.request
        images = self.images(job)
        with self._lock:
            if request.kind is Kind.COMPLETE:
                text = self._raw_text(request, len(images))
            else:
                text = self.template_text(request, images)
            ids = self._encoded(self._unmarked(text, len(images)))
        return {"ids": ids, "images": [each.image for each in images]}

    def wants_silence(self, request: Request) -> bool:
        """See `ChatTemplate.wants_silence`."""
        with self._lock:
            return request.kind is Kind.CHAT and self._template.wants_silence(request)

    def probed(self, turns: list[dict[str, Any]], *, begins: bool = False) -> str | None:
        """See `ChatTemplate.probed`."""
        with self._lock:
            return self._template.probed(turns, begins=begins) if self._template.present else None

    def text(self, request: Request) -> str:
        """The rendered chat template (kind template)."""
        with self._lock:
            return self.template_text(request, None)

    def token_count(self, job: Job) -> int:
        """Prompt tokens, images included (kind count)."""
        return len(self._unfitted(job).ids)

    def tokenized(self, job: Job) -> dict[str, Any]:
        """Token ids of a text or of messages, and if asked for, the tokens themselves and what is
        known about the tokenizer (kind tokenize)."""
        arguments = job.request.tokenize_args
        unknown = set(arguments) - _TOKENIZE_ARGUMENTS
        if unknown or not all(isinstance(value, bool) for value in arguments.values()):
            names = ", ".join(sorted(_TOKENIZE_ARGUMENTS))
            raise _invalid(f"tokenize_args takes {names}, each true or false")
        if arguments.get("add_special_tokens", True):
            ids = self._unfitted(job).ids
        else:
            if job.attachments:
                raise _invalid("add_special_tokens: a prompt with images cannot have false")
            with self._lock:
                request = job.request
                text = request.prompt
                if text is None:
                    text = self.template_text(request, [])
                ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        result: dict[str, Any] = {"token_ids": ids}
        if arguments.get("return_tokens"):
            with self._lock:
                result["tokens"] = [self._name(id_) for id_ in ids]
        with self._lock:
            if arguments.get("tokenizer"):
                result["tokenizer"] = tokenizer_facts(self._facts)
            if arguments.get("infill"):
                result["infill"] = infill_tokens(self._tokenizer)
        return result

    def _name(self, token_id: int) -> str:
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return name.decode(errors="replace") if isinstance(name, bytes) else str(name)

    def detokenised(self, token_ids: list[int]) -> str:
        """Text of token ids (kind detokenize)."""
        known = max(self._facts.embedding_rows, len(self._tokenizer))
        if max(token_ids) >= known:
            raise _invalid(f"token id {max(token_ids)} is outside the vocabulary of {known}")
        with self._lock:
            return str(self._tokenizer.decode(token_ids, skip_special_tokens=False))

    def embedding_inputs(
        self, inputs: Items[str | list[int]], *, truncate: bool = False
    ) -> list[list[int]]:
        """Token ids of the texts to embed, with special tokens, within the context. `truncate`: cut
        off the end of a text that is too long, but keep its special tokens."""
        return [one.ids for one in self.encoded(inputs, truncate=truncate)]

    def encoded(
        self, inputs: Items[str | list[int] | tuple[str, str]], *, truncate: bool = False
    ) -> list[Encoded]:
        """The inputs of a model that reads them whole: texts, pairs of texts, or token ids. See
        `embedding_inputs`."""
        result: list[Encoded] = []
        context = self._facts.context_tokens
        cut: dict[str, Any] = {"truncation": True, "max_length": context} if truncate else {}
        with self._lock:
            for item in inputs:
                types = None
                if isinstance(item, list):
                    ids = item[:context] if truncate else item
                else:
                    texts = (item,) if isinstance(item, str) else item
                    made = self._tokenizer(*texts, add_special_tokens=True, **cut)
                    ids, types = list(made["input_ids"]), made.get("token_type_ids")
                if not ids:
                    raise _invalid(f"input {len(result)} has no tokens")
                self._check_ids(ids)
                if len(ids) > context:
                    raise context_overflow(len(ids), 0, context)
                result.append(Encoded(ids, types))
        return result

    def _unfitted(self, job: Job) -> Prompt:
        request = job.request
        images = self.images(job)
        with self._lock:
            if request.token_ids is not None:
                return self._from_ids(request.token_ids, images)
            if request.messages is not None:
                return self._tokenised(self.template_text(request, images), images)
            return self._tokenised(self._raw_text(request, len(images)), images)

    # --- images ---------------------------------------------------------------------------------

    def images(self, job: Job) -> list[DecodedImage]:
        """The request's images in the order in which the prompt refers to them."""
        request = job.request
        order = list(range(len(job.attachments)))
        if request.messages is not None:
            named = _named_attachments(request.messages)
            outside = [index for index in named if index >= len(job.attachments)]
            if outside or len(set(named)) != len(order):
                raise _invalid(
                    f"the messages name {len(named)} images, but the request carries "
                    f"{len(job.attachments)}: name each attachment in an image part"
                )
            order = named
        if order and not self._facts.takes_images:
            raise _invalid(
                f"model {request.model} takes no images, but the request carries {len(order)}: "
                "choose a model that does"
            )
        return [
            decode_image(job.attachments[index], index, self._limits, self._footprint)
            for index in order
        ]

    # --- text -------------------------------------------------------------------------------------

    def template_text(self, request: Request, images: list[DecodedImage] | None) -> str:
        """The model's own chat template over the messages. The caller holds the lock."""
        return self._template.render(request, None if images is None else len(images))

    def _raw_text(self, request: Request, images: int) -> str:
        """A raw prompt with one placeholder for each image."""
        if request.prompt is None:
            raise _invalid(f"a {request.kind} request needs a prompt or token ids")
        text = request.prompt
        if not self._facts.takes_images:
            return text
        token = self._template.image_token or RAW_PLACEHOLDER
        if token != RAW_PLACEHOLDER and RAW_PLACEHOLDER in text:
            text = text.replace(RAW_PLACEHOLDER, self._template.image())
        found = text.count(token)
        if found != images:
            raise _invalid(
                f"the prompt has {found} {RAW_PLACEHOLDER} placeholders, but the request carries "
                f"{images} images: the counts must be equal",
                placeholders=found,
                pictures=images,
            )
        return text

    def _unmarked(self, text: str, images: int) -> str:
        """The text without its placeholder, for a processor that puts the image before the text by
        itself (BLIP-2's) and would take a placeholder for another image or a word."""
        if not images:
            if self._facts.needs_image:
                raise _invalid("this model only answers about an image: send one")
            return text
        if not self._places_images:
            return text
        token = self._template.image_token or RAW_PLACEHOLDER
        if images > 1 or not text.startswith(token) or token in text[len(token) :]:
            raise _invalid(
                "this model takes one image, before the text: begin the prompt with one "
                f"{RAW_PLACEHOLDER}"
            )
        return text.removeprefix(token)

    @cached_property
    def _places_images(self) -> bool:
        """Whether the processor puts the image before the text by itself and reads a placeholder
        as a word."""
        token = self._template.image_token or RAW_PLACEHOLDER

        def read(text: str) -> list[int]:
            images = [Image.new("RGB", (64, 64))]
            output = self._processor(text=[text], images=images, return_tensors="pt")
            ids: list[int] = output["input_ids"][0].tolist()
            behind = self._behind
            return (
                ids[: len(ids) - len(behind)] if behind and ids[-len(behind) :] == behind else ids
            )

        word = list(self._tokenizer(f"{token}a", add_special_tokens=False)["input_ids"])
        try:
            if read(f"{token}a")[-len(word) :] != word:
                return False
            if self._template.image_token is None and not self._facts.placeholder_ids:
                return True
            return len(read("a")) > len(self._tokenizer("a")["input_ids"])
        except Exception:
            # The processor needs a placeholder for each image, or will fail each request with its
            # cause.
            return False

    # --- tokens -----------------------------------------------------------------------------------

    def _encoded(self, text: str) -> list[int]:
        """Token ids of a text."""
        added = self._adds_special(text)
        ids = list(self._tokenizer(text, add_special_tokens=added)["input_ids"])
        return self._open_ended(ids, added)

    def _adds_special(self, text: str) -> bool:
        """Whether the tokenizer should add its special tokens: not if the text has BOS already."""
        bos = getattr(self._tokenizer, "bos_token", None)
        return not (bos and text.startswith(bos))

    def _open_ended(self, ids: list[int], added: bool) -> list[int]:
        """The ids without what the tokenizer appended (`add_eos_token`), since the answer continues
        there. An encoder reads the whole text, including its end."""
        if not added or self._facts.encoder_decoder or self._facts.embedding_only:
            return ids
        behind = self._behind
        return ids[: len(ids) - len(behind)] if behind and ids[-len(behind) :] == behind else ids

    @cached_property
    def _behind(self) -> list[int]:
        """Ids that the tokenizer appends to a text."""
        plain = list(self._tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(self._tokenizer("a", add_special_tokens=True)["input_ids"])
        ends = (
            at for at in range(len(plain), len(whole) + 1) if whole[at - len(plain) : at] == plain
        )
        return whole[next(ends, len(whole)) :]

    def _tokenised(self, text: str, images: list[DecodedImage]) -> Prompt:
        """Token ids and inputs of a text."""
        if self._processor is None:
            ids = self._encoded(text)
            if not ids:
                raise _invalid("the prompt is empty: it has no tokens")
            return self.finished(ids, {}, [])
        text = self._unmarked(text, len(images))
        added = self._adds_special(text)
        plain: list[Image.Image] = [image.image for image in images]
        try:
            output = self._processor(
                text=[text],
                images=plain or None,
                return_tensors="pt",
                add_special_tokens=added,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _invalid(
                f"the model's processor refuses this prompt: {one_line(error)}"
            ) from None
        ids = self._open_ended(output["input_ids"][0].tolist(), added)
        if not ids:
            raise _invalid("the prompt is empty: it has no tokens")
        return self.finished(ids, dict(output), [image.digest for image in images])

    def finished(self, ids: list[int], output: dict[str, Any], digests: list[bytes]) -> Prompt:
        """The prompt made of token ids and a processor's `output`. `digests`: of its images, one
        for each or one for all; empty without images. Raises `RequestError`."""
        aligned = {
            name: output[name][:, : len(ids)]
            for name in ALIGNED
            if name in output and name != "attention_mask"
        }
        media = (
            {
                name: value
                for name, value in output.items()
                # PaliGemma's processor adds labels for training.
                if name not in ("input_ids", "labels", *ALIGNED) and value is not None
            }
            if digests
            else {}
        )
        key = np.asarray(ids, dtype=np.int64)
        placed = np.isin(key, list(self._facts.placeholder_ids))
        prompt = Prompt(ids=ids, media=media, aligned=aligned if digests else {}, key=key)
        if digests:
            prompt.image_tokens = int(placed.sum())
            prompt.media_end = int(np.flatnonzero(placed)[-1]) + 1 if placed.any() else len(ids)
            prompt.key = _image_key(key, placed, digests)
        elif placed.any():
            raise _invalid(
                f"the prompt contains {int(placed.sum())} image placeholders but no image"
            )
        return prompt

    def _from_ids(self, token_ids: list[int], images: list[DecodedImage]) -> Prompt:
        if images:
            raise _invalid("token ids cannot carry images: send messages or a raw prompt")
        self._check_ids(token_ids)
        return self.finished(list(token_ids), {}, [])

    def _check_ids(self, token_ids: list[int]) -> None:
        """Refuse ids for which the model's embedding has no row: on a GPU they would crash the
        process."""
        rows, placeholders = self._facts.embedding_rows, self._facts.placeholder_ids
        worst = max((i for i in token_ids if i not in placeholders), default=0)
        if worst < rows:
            return
        named = ""
        if worst < len(self._tokenizer):
            named = f" ({self._tokenizer.decode([worst], skip_special_tokens=False)!r})"
        raise _invalid(
            f"token id {worst}{named} is outside the vocabulary: the model's embedding has {rows} "
            "rows",
            token_id=worst,
        )

    # --- context ----------------------------------------------------------------------------------

    def _fit(self, prompt: Prompt, request: Request, images: list[DecodedImage]) -> Prompt:
        """The prompt, fitted into the context by the requested policy."""
        context, params = self._facts.context_tokens, request.params
        # An encoder's context is used only by the prompt.
        asked = 1 if params.cut_max_tokens else params.max_tokens or 1
        room = context - (0 if self._facts.encoder_decoder else asked)
        if len(prompt.ids) <= room:
            return prompt
        if params.overflow == "error" or room < 1:
            raise context_overflow(len(prompt.ids), asked, context)
        if params.max_tokens is None or params.cut_max_tokens:
            # Without a limit, up to a quarter of the context is reserved for the answer.
            reserved = max(1, min(context // 4, 1024))
            room = context - min(reserved, params.max_tokens or reserved)
        keep = self._kept_head(prompt.ids, request, images)
        cut = len(prompt.ids) - room
        if keep >= room:
            raise context_overflow(len(prompt.ids), asked, context)
        if self._of_images(prompt)[keep : keep + cut].any():
            raise RequestError(
                ErrorCode.CONTEXT_OVERFLOW,
                f"the prompt has {len(prompt.ids)} tokens, of which {room} fit, and its images lie "
                "where it would be cut: send fewer turns or smaller images",
            )
        ids = prompt.ids[:keep] + prompt.ids[keep + cut :]
        return Prompt(
            ids=ids,
            media=prompt.media,
            aligned={
                name: torch.cat([value[:, :keep], value[:, keep + cut :]], dim=1)
                for name, value in prompt.aligned.items()
            },
            key=np.concatenate([prompt.key[:keep], prompt.key[keep + cut :]]),
            media_end=prompt.media_end - (cut if prompt.media_end > keep else 0),
            image_tokens=prompt.image_tokens,
        )

    def _of_images(self, prompt: Prompt) -> NDArray[np.bool_]:
        """Which tokens belong to images: placeholders, and added tokens directly before them, which
        open an image (Qwen-VL's `<|vision_start|>`)."""
        placed = np.isin(prompt.ids, list(self._facts.placeholder_ids))
        for at in range(len(placed) - 2, -1, -1):
            placed[at] |= placed[at + 1] and prompt.ids[at] in self._added_ids
        return placed

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        added = getattr(self._tokenizer, "added_tokens_decoder", None) or {}
        return frozenset(added).union(getattr(self._tokenizer, "all_special_ids", None) or ())

    def _kept_head(self, ids: list[int], request: Request, images: list[DecodedImage]) -> int:
        """Tokens at the start that truncation keeps: BOS, and the system message of a chat."""
        keep = 1 if ids and ids[0] == getattr(self._tokenizer, "bos_token_id", None) else 0
        messages = request.messages or []
        if not messages or messages[0].role not in ("system", "developer"):
            return keep
        # The head is the common prefix of two conversations with this system message and
        # different user messages.
        own = images[: len(_named_attachments(messages[:1]))]
        heads = []
        for word in ("a", "b"):
            pair = [messages[0], Message(role="user", content=word)]
            probe = Request(model=request.model, messages=pair, window=1, tools=request.tools)
            text = self.template_text(probe, own)
            heads.append(self._tokenised(text, own).ids)
        shared = _common_prefix(_common_prefix_ids(*heads), ids)
        return max(keep, shared)


# --- helpers --------------------------------------------------------------------------------------


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def _named_attachments(messages: Items[Message]) -> list[int]:
    named: list[int] = []
    for message in messages:
        for part in message.content if isinstance(message.content, list) else []:
            if isinstance(part, VideoPart):
                named += part.attachments
            elif not isinstance(part, TextPart):
                named.append(part.attachment)
    return named


def _image_key(
    key: NDArray[np.int64], placed: NDArray[np.bool_], digests: list[bytes]
) -> NDArray[np.int64]:
    """int64: the ids, with placeholders replaced by their image's digest (negative, so that it
    never equals a token id). If runs of placeholders do not match images one to one (tiles), each
    gets a digest of all images."""
    starts = np.flatnonzero(placed & ~np.concatenate([[False], placed[:-1]]))
    if len(starts) == len(digests):
        values = [_negative(digest) for digest in digests]
        run = np.cumsum(np.isin(np.arange(len(key)), starts)) - 1
        return np.where(placed, np.asarray(values, dtype=np.int64)[np.maximum(run, 0)], key)
    combined = hashlib.blake2b(b"".join(digests), digest_size=16).digest()
    return np.where(placed, np.int64(_negative(combined)), key)


def _negative(digest: bytes) -> int:
    return -1 - (int.from_bytes(digest[:8], "little") >> 1)


def _common_prefix_ids(a: list[int], b: list[int]) -> list[int]:
    return a[: _common_prefix(a, b)]


def _common_prefix(a: list[int], b: list[int]) -> int:
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _invalid(message: str, **details: Any) -> RequestError:
    return RequestError(ErrorCode.INVALID_REQUEST, message, details=details)
