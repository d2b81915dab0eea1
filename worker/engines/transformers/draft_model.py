"""A small model with the vocabulary of a large one, which drafts what the large one verifies.

It has a slot cache of its own, whose rows are in the order of the step's, and catches up with what
was generated since its last draft. Its tokens are drawn with the seeds and positions of the
requests, so where the two models agree, sampled drafts are right as well. Must never decide whether
to draft, and must never be needed: if it cannot draft, answers go on without it.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from worker.engines.base import EngineLoadError
from worker.engines.common.failures import is_out_of_memory, one_line
from worker.engines.common.prompt import Prompt
from worker.engines.common.sampling import Sampler
from worker.engines.common.sequence import Sequence, bare_fields
from worker.engines.transformers.loaded import LoadedModel
from worker.engines.transformers.memory import release_cached
from worker.engines.transformers.packed import restore_read
from worker.engines.transformers.selftest import check

__all__ = ["DraftModel", "check_vocabulary"]

log = logging.getLogger(__name__)

CATCH_UP_TOKENS = 256
"""Most tokens of texts that it computes in one step to catch up."""

FORGET = 0.7
"""Factor by which earlier measurements of a drafted token's time fade with each new one."""

GUESSED_MS = 1.0
"""Time of a drafted token, until one has been measured."""


@dataclass(slots=True)
class _Row:
    """A request, and what this model has computed of it."""

    sequence: Sequence
    #: The same text, ending in drafted tokens.
    probe: Sequence
    #: How many tokens of the probe's answer are known to equal the request's.
    agreed: int = 0

    def follow(self, highest_id: int) -> None:
        """Append what was generated since the last draft, and drop drafts that were wrong."""
        answer, drafted = self.sequence.answer, self.probe.answer
        same = self.agreed
        most = min(len(answer), len(drafted))
        while same < most and answer[same] == drafted[same]:
            same += 1
        del drafted[same:]
        drafted += _known(answer[same:], highest_id)
        # The last token is computed with the draft.
        kept = len(self.probe.prompt.ids) + same
        self.probe.filled = min(self.probe.filled, kept, self.probe.total - 1)
        self.agreed = len(answer)


class DraftModel:
    """Drafts for all rows of a step at once. Raises `EngineLoadError` on construction if the model
    cannot be batched.

    Of two models with the same tokens, one may have more rows that belong to none (Qwen2.5-7B has
    152,064 rows, the 0.5B 151,936), so each may be given ids that the other lacks.
    """

    def __init__(self, loaded: LoadedModel, target_rows: int) -> None:
        """`target_rows`: token ids that the model has embeddings of for which it drafts."""
        verdict = check(loaded, None)
        if verdict.forward is None:
            raise EngineLoadError(
                f"the draft model cannot draft for several requests at once: {verdict.reason}"
            )
        restore_read(loaded.model)
        self.forward = verdict.forward
        self.cache = self.forward.cache
        self._longest = loaded.context_tokens
        if loaded.rope is not None:
            self._longest = min(self._longest, loaded.rope.unchanged_tokens - 1)
        self._banned = sorted(loaded.placeholder_ids)
        self._highest_id = loaded.embedding_rows - 1
        self._target_rows = target_rows
        #: Seconds; on an accelerator the wall clock, since drafting waits for every drawn token.
        self.clock = time.thread_time if loaded.device.type == "cpu" else time.perf_counter
        self._sampler: Sampler | None = None
        self._rows: list[_Row] = []
        self._token_ms = 0.0
        self._off = False

    def token_ms(self) -> float:
        """Expected time of one more token in every row."""
        return self._token_ms or GUESSED_MS

    def draft(self, sequences: list[Sequence], tokens: int) -> list[list[int]] | None:
        """`tokens` drafted tokens for each row of a step; None if it cannot draft now."""
        if self._off or any(sequence.prompt.media for sequence in sequences):
            return None
        longest = max(sequence.total for sequence in sequences) + tokens
        if longest > self._longest:
            return None
        try:
            if not self._arrange(sequences, longest) or not self._catch_up():
                return None
            return self._drafted(tokens)
        except Exception as error:
            self._rows.clear()
            self._off = True
            if is_out_of_memory(error):
                log.warning("too little memory for the draft model: %s", one_line(error))
                release_cached(self.forward.device)
            else:
                log.exception("the draft model failed and drafts no more")
            return None

    def _arrange(self, sequences: list[Sequence], longest: int) -> bool:
        """Give every sequence the same row as in the step. False if there is too little memory."""
        used = max((row.probe.filled for row in self._rows), default=0)
        most = len(self._rows) + len(sequences)
        if not self.cache.reserve(most, longest, len(self._rows), used):
            self._rows.clear()
            if not self.cache.reserve(len(sequences), longest, 0, 0):
                return False
        for place, sequence in enumerate(sequences):
            rows = self._rows
            found = next((n for n in range(place, len(rows)) if rows[n].sequence is sequence), -1)
            if found < 0:
                found = len(rows)
                rows.append(_Row(sequence, _probe(sequence, self._highest_id)))
                self.forward.prepare(rows[found].probe)
            if found != place:
                length = max(rows[place].probe.filled, rows[found].probe.filled)
                self.cache.swap(place, found, length)
                rows[place], rows[found] = rows[found], rows[place]
        del self._rows[len(sequences) :]
        return True

    def _catch_up(self) -> bool:
        """Compute the tokens that each row lacks before its last one. False if some are still
        missing."""
        room = CATCH_UP_TOKENS
        for place, row in enumerate(self._rows):
            row.follow(self._highest_id)
            probe = row.probe
            end = min(probe.total - 1, probe.filled + room)
            if end > probe.filled:
                self.forward.prefill(place, probe, probe.filled, end)
                room -= end - probe.filled
                probe.filled = end
        return all(row.probe.filled == row.probe.total - 1 for row in self._rows)

    def _drafted(self, tokens: int) -> list[list[int]]:
        probes = [row.probe for row in self._rows]
        drafts: list[list[int]] = [[] for _ in probes]
        started = self.clock()
        for further in range(tokens):
            logits = self.forward.decode(probes)[:, : self._target_rows]
            if self._sampler is None:
                self._sampler = Sampler(
                    logits.shape[-1], banned_ids=self._banned, token_bytes=lambda token_id: b""
                )
            drawing = [row.sequence.row.unbound(further) for row in self._rows]
            for probe, draft, drawn in zip(
                probes, drafts, self._sampler.sample(logits, drawing), strict=True
            ):
                # If none could be drawn, any token will do: it is verified.
                token_id = max(drawn.token_id, 0)
                draft.append(token_id)
                probe.answer.append(token_id)
                probe.filled += 1
        spent_ms = (self.clock() - started) * 1e3 / tokens
        self._token_ms = FORGET * (self._token_ms or spent_ms) + (1 - FORGET) * spent_ms
        return drafts


def _known(token_ids: list[int], highest_id: int) -> list[int]:
    """The ids, with another in the place of those that the draft model has no embedding of."""
    return [min(token_id, highest_id) for token_id in token_ids]


def _probe(sequence: Sequence, highest_id: int) -> Sequence:
    prompt = Prompt(ids=_known(sequence.prompt.ids, highest_id), key=sequence.prompt.key)
    return Sequence(**bare_fields(b"", prompt, None))


def check_vocabulary(target: LoadedModel, draft: LoadedModel) -> None:
    """Raise `EngineLoadError` unless the tokens of both models have the same ids and texts."""
    if draft.embedding_only or draft.encoder_decoder or draft.head is not None or draft.labels:
        raise EngineLoadError("--draft-model: it must be a model that continues a text")
    own, other = (_tokens(one) for one in (target, draft))
    differing = [text for text in own.keys() & other.keys() if own[text] != other[text]]
    differing += [text for text in own.keys() ^ other.keys()]
    if differing:
        example = min(differing, key=lambda text: (len(text), text))
        raise EngineLoadError(
            "--draft-model: its vocabulary is not that of the model it drafts for: "
            f"{len(differing)} tokens differ, such as {example!r} (id "
            f"{other.get(example, 'none')} instead of {own.get(example, 'none')}); choose a model "
            "of the same family"
        )
    if draft.embedding_rows < min(target.embedding_rows, max(own.values(), default=0) + 1):
        raise EngineLoadError(
            f"--draft-model: it has embeddings for {draft.embedding_rows} tokens, but the model "
            f"that it drafts for generates {target.vocabulary}"
        )


def _tokens(loaded: LoadedModel) -> dict[str, int]:
    return dict(loaded.tokenizer.get_vocab())
