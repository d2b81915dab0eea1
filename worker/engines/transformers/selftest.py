"""Load-time self test: checks that the slot cache is correct for a model, and warms it up.

Plain `generate()` gives the logits of two prompts of different lengths; the slot path gets the same
tokens, in pieces, with rows that join and move, and must compute the same logits. If it does not, a
tiny reference model takes the same test, which distinguishes three causes:

* the reference passes: this model cannot be batched, and is served one request at a time;
* the reference fails as well: this release of transformers is incompatible with this engine, and
  every model would be slow: `EngineLoadError`;
* the reference passes and the error came from our own code: a bug to report, with its traceback in
  the log: `EngineLoadError`.

A model whose own `generate()` fails is not served at all. Must never let a wrong model pass.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import cache
from importlib import metadata
from itertools import accumulate, pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import DynamicCache

import worker
from worker.engines.base import EngineLoadError
from worker.engines.common.compat import KNOWN_RELEASES
from worker.engines.common.failures import is_out_of_memory, one_line
from worker.engines.common.prompt import Prompt
from worker.engines.common.sequence import Sequence, bare_fields
from worker.engines.transformers.forward import Forward, StaticUse, Unsupported
from worker.engines.transformers.kv_int8 import KvInt8
from worker.engines.transformers.loaded import LoadedModel, wrap_model
from worker.engines.transformers.references import (
    STEPS,
    Reference,
    memory_short,
    references,
    text_prompt,
)
from worker.engines.transformers.vision import ImageFeatures, Vision, doubled

__all__ = ["Verdict", "check", "check_generate", "relative_error", "tolerance"]

log = logging.getLogger(__name__)

APART_TOKENS = 24
"""Tokens between a stem and the branches that are compared."""

TOLERANCES = {torch.float32: 2e-3, torch.float64: 2e-3}
"""Largest relative error of the logits. A wrong mask or position gives about 1."""
HALF_TOLERANCE = 0.2
"""For half precision, and for LLM.int8, which looks for outliers over the whole batch; up to
0.03 was observed."""
EXPERTS_TOLERANCE = 0.35
"""In half precision, a different batch size may route a token to another expert."""
INT8_TOLERANCE = 0.02
"""With keys and values in 8 bits: a number halfway between two codes may be rounded either way. Up
to 0.002 was observed."""
INT8_LOSS = 0.1
"""Largest relative change of the logits by keys and values in 8 bits, as the median of some tokens.
Observed: 0.007 to 0.04, and 0.5 with keys that 8 bits cannot represent."""
LOOKING_AHEAD = 0.05
"""Relative change of a prompt's keys when later tokens change. Observed with a causal mask: 0, with
LLM.int8 up to 0.01; without one: 0.7."""

PROGRAMMING_ERRORS = (AssertionError, AttributeError, KeyError, NameError, TypeError)
"""Raised by a line of our own code, these are our bugs. What torch raises (RuntimeError,
IndexError, ValueError) may be about a model whose shapes a slot cannot hold."""


class Verdict:
    """The outcome: a forward over slots, or the reason for not using one."""

    def __init__(
        self,
        forward: Forward | None,
        reason: str = "",
        *,
        whole: bool = False,
        compared: bool = True,
        fault: Exception | None = None,
    ) -> None:
        self.forward = forward
        self.reason = reason
        #: False if the configuration alone decided.
        self.compared = compared
        #: Whether prompts must be prefilled in one piece (prefix-LM).
        self.whole_prompts = whole
        #: The error in our own code that ended the test.
        self.fault = fault


def check(
    loaded: LoadedModel,
    image_prompt: Prompt | None,
    *,
    static: StaticUse = StaticUse.NEVER,
    kv_int8: bool = False,
) -> Verdict:
    """Compare the slot path with `generate()` on `loaded`, with an image if one is given. With
    `kv_int8`, slots hold keys and values in 8 bits, and `generate()` rounds them in the same way.

    Raises `EngineLoadError` if `generate()` itself fails, memory is short, transformers is
    incompatible with this engine, or our own code has a bug.
    """
    try:
        long, short = references(loaded, image_prompt)
        codecs = None
        if kv_int8:
            codecs = KvInt8(len(Forward(loaded).cache.slot_layers))
            given = references(loaded, image_prompt, DynamicCache)
            exact, long, short = (long, short), *references(loaded, image_prompt, codecs.cache)
            _accept_rounding(loaded, exact, given, (long, short))
    except Unsupported as error:
        return Verdict(None, str(error), compared=False)
    verdict = _verdict(loaded, long, short, static, codecs)
    if verdict.forward is not None:
        return verdict
    disagreement = _reference_model_fails(str(loaded.device))
    if disagreement:
        raise EngineLoadError(
            f"transformers {metadata.version('transformers')} is incompatible with this engine: "
            f"a tiny reference model fails the self test as well ({disagreement}). Install a "
            f"release of transformers from {KNOWN_RELEASES[0]} to {KNOWN_RELEASES[1]}, which are "
            "known to work, or serve one request at a time with --engine-arg scheduler=generate"
        )
    if verdict.fault is not None:
        log.error("the self test found a bug in tokenbus: please report it", exc_info=verdict.fault)
        raise EngineLoadError(
            f"a bug in tokenbus itself, not in the model: {verdict.reason} (the log has the "
            "traceback; please report it). Serve one request at a time with --engine-arg "
            "scheduler=generate"
        )
    return verdict


def check_generate(loaded: LoadedModel, image_prompt: Prompt | None) -> None:
    """Run the model's own `generate()`, which serves it one request at a time. Raises
    `EngineLoadError` if that fails."""
    with contextlib.suppress(Unsupported):
        references(loaded, image_prompt)


def _accept_rounding(
    loaded: LoadedModel,
    exact: Items[Reference],
    given: Items[Reference],
    rounded: Items[Reference],
) -> None:
    """Raise `EngineLoadError` if keys and values in 8 bits change the logits too much; else put the
    change into the model's details. `exact`: computed with the model's own cache, `given` with an
    ordinary one that was passed in, `rounded` with one that rounds."""
    change = _change(loaded, exact, given)
    if not change <= tolerance(loaded.model, quantised=loaded.quantised):
        raise EngineLoadError(
            "kv_cache_dtype=int8 cannot be checked: the installed transformers computes this model "
            f"differently when a cache is passed in (logits differ by {change:.2g}); omit "
            "--engine-arg kv_cache_dtype"
        )
    change = _change(loaded, exact, rounded)
    if not change <= INT8_LOSS:
        raise EngineLoadError(
            f"kv_cache_dtype=int8: keys and values in 8 bits change this model's logits by "
            f"{change:.2g} of their spread, and at most {INT8_LOSS:g} is accepted; omit "
            "--engine-arg kv_cache_dtype"
        )
    loaded.details |= {
        "kv_cache_dtype": "int8",
        "kv_cache_error": round(change, 4),
        "numbers": f"{loaded.details['numbers']}, keys and values of 8 bits",
    }


def _change(loaded: LoadedModel, exact: Items[Reference], other: Items[Reference]) -> float:
    """Relative error of the logits against `exact`, over all tokens up to the first at which the
    answers differ: their median, since a single token may be routed to another expert."""
    errors: list[float] = []
    for wanted, got in zip(exact, other, strict=True):
        for place in range(STEPS):
            if wanted.tokens[:place] == got.tokens[:place]:
                pair = got.logits[place], wanted.logits[place]
                errors.append(relative_error(*pair, loaded.placeholder_ids))
    return statistics.median(errors)


def _verdict(
    loaded: LoadedModel,
    long: Reference,
    short: Reference,
    static: StaticUse,
    codecs: KvInt8 | None = None,
) -> Verdict:
    verdict = _pieces_or_whole(loaded, long, short, static, codecs)
    if verdict.forward is None and verdict.compared and static is not StaticUse.NEVER:
        log.warning("steps of fixed shape are not used: %s", verdict.reason)
        verdict = _pieces_or_whole(loaded, long, short, StaticUse.NEVER, codecs)
    return verdict


def _pieces_or_whole(
    loaded: LoadedModel,
    long: Reference,
    short: Reference,
    static: StaticUse,
    codecs: KvInt8 | None,
) -> Verdict:
    verdict = _try(loaded, long, short, static, codecs, whole=False)
    if verdict.forward is None and verdict.compared:
        whole = _try(loaded, long, short, static, codecs, whole=True)
        if whole.forward is not None:
            return whole
        if whole.reason != verdict.reason:
            verdict.reason += f"; with whole prompts: {whole.reason}"
    return verdict


def _try(
    loaded: LoadedModel,
    long: Reference,
    short: Reference,
    static: StaticUse,
    codecs: KvInt8 | None,
    *,
    whole: bool,
) -> Verdict:
    try:
        forward = Forward(loaded, static=static, codecs=codecs)
    except Unsupported as error:
        return Verdict(None, str(error), compared=False)
    try:
        with torch.inference_mode():
            _compare(loaded, forward, long, short, whole=whole)
    except Unsupported as error:
        return Verdict(None, str(error))
    except EngineLoadError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise memory_short(error) from error
        ours = isinstance(error, PROGRAMMING_ERRORS) and _raised_by_us(error.__traceback__)
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        return Verdict(None, reason, fault=error if ours else None)
    return Verdict(forward, whole=whole)


@cache
def _reference_model_fails(device: str) -> str:
    """Why the smallest ordinary model cannot be served from slots either; empty if it can."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    loaded = wrap_model(model.to(device), None)
    try:
        long, short = references(loaded, None)
    except EngineLoadError as error:
        return str(error)
    verdict = _verdict(loaded, long, short, StaticUse.NEVER)
    return verdict.reason if verdict.forward is None else ""


def _raised_by_us(traceback: TracebackType | None) -> bool:
    """Whether the line that raised is in our code, not in a library that we called."""
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    home = Path(worker.__file__).parent
    return traceback is not None and home in Path(traceback.tb_frame.f_code.co_filename).parents


def _probe(prompt: Prompt) -> Sequence:
    """A sequence that only needs forwards, no sampler and no text."""
    return Sequence(**bare_fields(b"", prompt, None) | {"max_tokens": STEPS})


def _compare(
    loaded: LoadedModel,
    forward: Forward,
    long_reference: Reference,
    short_reference: Reference,
    *,
    whole: bool,
) -> None:
    long, wanted_one, tokens_one = long_reference
    short, wanted_other, tokens_other = short_reference
    one, other = _probe(long), _probe(short)
    tokens = len(long.ids) + len(short.ids) + STEPS + 1
    if not forward.cache.reserve(2, tokens, 0, 0):
        raise memory_short(MemoryError(f"no room for {tokens} tokens of cache"))
    allowed = tolerance(loaded.model, quantised=loaded.quantised)
    if forward.cache.codecs is not None:
        allowed = max(allowed, INT8_TOLERANCE)

    def expect(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        error = relative_error(got, wanted, loaded.placeholder_ids)
        if not error <= allowed:
            raise Unsupported(f"{what}: logits differ from generate() by {error:.3g}")

    def take(sequence: Sequence, token_id: int) -> None:
        sequence.answer.append(token_id)

    if not whole and _looks_ahead(loaded, forward, long):
        raise Unsupported("the tokens of a prompt attend to later ones")
    if not whole and long.media:
        forward.vision = _vision(loaded, forward, long_reference, allowed)
    # The long prompt in pieces, one token alone.
    forward.prepare(one)
    cut = len(long.ids) if whole else max(long.media_end, len(long.ids) // 2)
    logits = forward.prefill(0, one, 0, cut)
    if cut < len(long.ids):
        logits = forward.prefill(0, one, cut, len(long.ids))
    expect(logits[-1], wanted_one[0], "prefill in pieces")
    one.filled = len(long.ids)
    take(one, tokens_one[0])
    expect(forward.decode([one])[0], wanted_one[1], "decode of one row")
    one.filled += 1
    take(one, tokens_one[1])
    # A second row joins.
    forward.prepare(other)
    expect(forward.prefill(1, other, 0, len(short.ids))[-1], wanted_other[0], "second row")
    other.filled = len(short.ids)
    take(other, tokens_other[0])
    logits = forward.decode([one, other])
    expect(logits[0], wanted_one[2], "decode of two rows")
    expect(logits[1], wanted_other[1], "decode of two rows, shorter row")
    one.filled, other.filled = one.filled + 1, other.filled + 1
    take(one, tokens_one[2])
    take(other, tokens_other[1])
    # The first row leaves, the second moves into its place.
    forward.cache.move(1, 0, other.filled)
    expect(forward.decode([other])[0], wanted_other[2], "decode after a move")
    forward.many_prompts = not whole and _many_agree(
        loaded, forward, short, wanted_other, tokens_other, allowed
    )
    forward.branches = forward.many_prompts and _branches_agree(
        loaded, forward, short, wanted_other, tokens_other, allowed
    )
    forward.verifies = loaded.head is None and _drafts_agree(
        loaded, forward, long_reference, short_reference, allowed
    )


def _vision(
    loaded: LoadedModel, forward: Forward, reference: Reference, allowed: float
) -> Vision | None:
    """The vision tower, if the logits are the same when images are computed by it beforehand and
    their tokens are then prefilled in pieces of any size; else None."""
    prompt = reference.prompt
    vision = Vision.find(loaded)
    images = None if vision is None else vision.begin(prompt)
    if vision is None or images is None:
        return None
    probe = _probe(prompt)
    try:
        while not images.ready:
            vision.compute(images)
        vision.splits = _splits(vision, prompt)
        if not vision.fits(prompt, images):
            return None
        forward.prepare(probe)
        forward.vision, probe.images = vision, images
        placed = [at for at, id_ in enumerate(prompt.ids) if id_ in loaded.placeholder_ids]
        cuts = {1, placed[0], placed[len(placed) // 3], placed[-1], len(prompt.ids) - 1}
        ends = [*sorted(cuts - {0}), len(prompt.ids)]
        for start, end in pairwise([0, *ends]):
            logits = forward.prefill(0, probe, start, end)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        log.info("images are computed together with their tokens: %s", one_line(error))
        return None
    finally:
        forward.vision = None
    difference = relative_error(logits[-1], reference.logits[0], loaded.placeholder_ids)
    return vision if difference <= allowed else None


def _splits(vision: Vision, prompt: Prompt) -> bool:
    """Whether two images give the same features one by one as together."""
    twice = doubled(prompt.media)
    if twice is None:
        return False
    pair = replace(prompt, media=twice)
    together, apart = ImageFeatures([twice]), vision.begin(pair)
    assert apart is not None
    for images in (together, apart):
        while not images.ready:
            vision.compute(images)
    one, other = together.done[0].float(), apart.done[0].float()
    return one.shape == other.shape and torch.allclose(
        one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max())
    )


def _looks_ahead(loaded: LoadedModel, forward: Forward, prompt: Prompt) -> bool:
    """Whether keys and values of a prompt's tokens depend on later tokens: then neither prefilling
    in pieces nor reusing its prefix would be correct. Compares two forwards of the same shape,
    which agree if the mask is causal, however few bits the weights have."""
    if len(prompt.ids) - prompt.media_end < 4:
        prompt = text_prompt(loaded, 13)
    length, before = len(prompt.ids), prompt.media_end
    cut = length - (length - before) // 2
    ordinary = text_prompt(loaded, 2 * length).ids
    other_id = next((i for i in ordinary if i not in prompt.ids[cut:]), ordinary[0])
    changed = prompt.ids[:cut] + [other_id] * (length - cut)
    for row, ids in enumerate((prompt.ids, changed)):
        probe = _probe(replace(prompt, ids=ids))
        forward.prepare(probe)
        forward.prefill(row, probe, 0, length)
    pairs = zip(forward.cache.dense(0, cut), forward.cache.dense(1, cut), strict=True)
    return any(
        _relative_change(one[before:], other[before:]) > LOOKING_AHEAD
        for layer, changed_layer in pairs
        for one, other in zip(layer, changed_layer, strict=True)
    )


def _relative_change(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean relative change over the tokens of keys or values [tokens, heads, head_dim]."""
    one, other = one.float().flatten(1), other.float().flatten(1)
    return float(((one - other).norm(dim=1) / one.norm(dim=1).clamp_min(1e-12)).mean())


def _many_agree(
    loaded: LoadedModel,
    forward: Forward,
    prompt: Prompt,
    wanted: list[torch.Tensor],
    tokens: list[int],
    allowed: float,
) -> bool:
    """Whether several prompts in one forward give the same logits. They are one prompt, followed by
    different parts of its answer."""
    rows = [_probe(prompt) for _ in range(3)]
    for count, row in enumerate(rows):
        row.answer += tokens[:count]
        forward.prepare(row)
    # A row that already has part of its prompt starts after it.
    try:
        if not forward.cache.reserve(3, len(prompt.ids) + STEPS, 2, len(prompt.ids)):
            return False
        forward.prefill(2, rows[2], 0, 2)
        rows[2].filled = 2
        logits = forward.prefill_many(0, rows)
        for row in rows:
            row.filled = row.total
            row.answer.append(tokens[len(row.answer)])
        following = forward.decode(rows[:2])
    except (RuntimeError, ValueError, TypeError, IndexError):
        # Models that make their own mask from a two-dimensional one reject ours.
        return False
    pairs = [(logits[i], wanted[i]) for i in range(3)] + [
        (following[i], wanted[i + 1]) for i in range(2)
    ]
    return all(
        relative_error(got, right, loaded.placeholder_ids) <= allowed for got, right in pairs
    )


def _branches_agree(
    loaded: LoadedModel,
    forward: Forward,
    prompt: Prompt,
    wanted: list[torch.Tensor],
    tokens: list[int],
    allowed: float,
) -> bool:
    """Whether each branch of a prompt gives the logits that it would give as a text of its own.
    The branches are different parts of the prompt's answer. A long branch of other tokens precedes
    them, so that it shows if a position is taken from the place in the cache."""
    other = text_prompt(loaded, APART_TOKENS).ids
    branches = [other, *(tokens[: count + 1] for count in range(STEPS - 1))]
    ids = prompt.ids + [token for branch in branches for token in branch]
    probe = _probe(replace(prompt, ids=ids))
    probe.branches = tuple(map(len, branches))
    ends = [len(prompt.ids) + end - 1 for end in accumulate(probe.branches)]
    stem, cut = len(prompt.ids), ends[2]
    # All at once; then the stem alone, and the branches in two pieces.
    try:
        if not forward.cache.reserve(1, len(ids) + 1, 0, 0):
            return False
        forward.prepare(probe)
        once = forward.prefill(0, probe, 0, len(ids), kept=ends[1:])
        forward.prefill(0, probe, 0, stem)
        cuts = [
            forward.prefill(0, probe, stem, cut, kept=ends[1:2]),
            forward.prefill(0, probe, cut, len(ids), kept=ends[2:]),
        ]
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    return all(
        relative_error(got, right, loaded.placeholder_ids) <= allowed
        for logits in (once, torch.cat(cuts))
        for got, right in zip(logits, wanted[1:], strict=True)
    )


def _drafts_agree(
    loaded: LoadedModel, forward: Forward, long: Reference, short: Reference, allowed: float
) -> bool:
    """Whether steps that compute several tokens of each row give the same logits as single tokens,
    also after drafts that were wrong in part or altogether."""
    rows = [_probe(reference.prompt) for reference in (long, short)]
    (_, wanted, tokens), (_, others, other_tokens) = long, short
    wrong = next(token_id for token_id in long.prompt.ids if token_id != other_tokens[1])
    try:
        lengths = [len(row.prompt.ids) for row in rows]
        if not forward.cache.reserve(2, max(lengths) + STEPS, 0, 0):
            return False
        for place, row in enumerate(rows):
            forward.prepare(row)
            forward.prefill(place, row, 0, lengths[place])
            row.filled = lengths[place]
        rows[0].answer, rows[1].answer = tokens[:1], other_tokens[:1]
        first = forward.verify(rows, [[tokens[1], wrong], [wrong]], 3)
        rows[0].answer, rows[1].answer = tokens[:3], other_tokens[:2]
        for row in rows:
            row.filled = row.total - 1
        second = forward.verify(rows, [[], [other_tokens[2]]], 2)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False
    got = [first[0, 0], first[0, 1], second[0, 0], first[1, 0], second[1, 0], second[1, 1]]
    return all(
        relative_error(one, right, loaded.placeholder_ids) <= allowed
        for one, right in zip(got, wanted[1:] + others[1:], strict=True)
    )


def tolerance(model: Any, *, quantised: bool) -> float:
    """Largest relative error of a model's logits that rounding can explain."""
    if model.dtype in TOLERANCES and not quantised:
        return TOLERANCES[model.dtype]
    config = model.config.get_text_config(decoder=True)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = any(getattr(config, name, None) for name in names)
    return EXPERTS_TOLERANCE if experts else HALF_TOLERANCE


def relative_error(
    got: torch.Tensor, wanted: torch.Tensor, ignored: frozenset[int] = frozenset()
) -> float:
    """Difference of logits from those `wanted`, as a fraction of their spread; `ignored` entries of
    the last dimension do not count."""
    got, wanted = got.float().clone(), wanted.clone()
    for token_id in ignored:
        if token_id < wanted.shape[0]:
            got[token_id] = wanted[token_id] = 0.0
    finite = torch.isfinite(wanted)
    got, wanted = got[finite], wanted[finite]
    spread = (wanted - wanted.mean()).norm()
    return float((got - wanted).norm() / spread.clamp_min(1e-12))
