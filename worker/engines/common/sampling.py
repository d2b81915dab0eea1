"""Chooses the next token of every row of a batch, each row by its own parameters.

The order in a row is: repetition penalty, frequency and presence penalty, bias, bans, constraint;
then the most likely token at temperature 0, otherwise temperature, top_k, top_p, min_p and one
draw. Logprobs are those of the distribution after penalties, bias, bans and constraint, before
temperature and the cuts. Each parameter means what it means in transformers' logits processors;
presence and frequency penalty are OpenAI's. `top_k` 1 is greedy.

`sampler_row` holds the state of one row.

Two guarantees: a row's token depends only on its own logits, parameters and past, never on other
rows of the batch; and the only randomness is `uniform(seed, position)`. Therefore decisions are
based on comparisons and on float64 sums in a fixed order, and ties are broken by token id,
whichever short cut a batch takes.

This module must never touch torch's random state, and copies its results to the host once per
step (twice when a row must be sorted in full).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch

from broker.protocol.errors import ErrorCode, RequestError
from broker.protocol.limits import MAX_TOP_LOGPROBS
from broker.protocol.messages import TokenLogprob, TopLogprob
from worker.engines.common.constrain import mask_logits_
from worker.engines.common.sampler_row import Ids, SamplerRow, check_params, uniform

__all__ = [
    "Sampled",
    "Sampler",
    "SamplerRow",
    "check_params",
    "prompt_logprobs",
    "uniform",
]

Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

#: The logarithm of zero on the wire (OpenAI's value; JSON has no infinity).
LOGPROB_FLOOR = -9999.0

#: Number of most likely tokens examined first for top_p: confident models seldom need more. For a
#: row that does, `_MORE` times as many are examined, until they suffice; the outcome is the same.
_CANDIDATES = 1024
_MORE = 16

#: Tokens whose weights are summed together when drawing from the whole vocabulary.
_BLOCK = 512


class Sampled(NamedTuple):
    """The outcome of one row."""

    token_id: int
    #: Only if the row requested it.
    logprob: TokenLogprob | None
    #: False if there is no token, for the reason given in `fault`; other rows are not affected.
    ok: bool
    fault: str = ""
    #: The error code for `fault`.
    code: ErrorCode = ErrorCode.ENGINE_ERROR


class Sampler:
    """Samples for the rows of one model.

    `banned_ids` are never chosen (such as image placeholders); `token_bytes` returns the bytes of a
    token, for logprobs.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        banned_ids: Sequence[int] = (),
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self.vocab_size = vocab_size
        self._token_bytes = token_bytes
        self._banned = torch.tensor(
            sorted({i for i in banned_ids if 0 <= i < vocab_size}), dtype=torch.long
        )

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
        """The next token of each row. `logits` [B, V], of any float type, is overwritten.

        The rows are not changed: the caller appends the tokens that it uses.
        """
        if logits.shape != (len(rows), self.vocab_size):
            raise ValueError(
                f"logits of shape {tuple(logits.shape)} for {len(rows)} rows and a vocabulary of "
                f"{self.vocab_size}"
            )
        if not rows:
            return []
        x = logits.float().contiguous()
        failed = self._adjust_(x, rows)
        best, tokens = x.max(dim=-1)
        tokens = tokens.clone()
        unsettled = torch.zeros_like(tokens, dtype=torch.bool)
        whole, cut = _drawing(rows, self.vocab_size)
        room = _room([rows[i] for i in cut], self.vocab_size)
        if whole:
            tokens[whole] = _draw_whole(x, best, whole, rows)
        if cut:
            tokens[cut], unsettled[cut] = _draw_ranked(x, best, cut, rows, room)
        forced = [i for i, row in enumerate(rows) if row.forced is not None]
        if forced:
            ids = [min(rows[i].forced or 0, self.vocab_size - 1) for i in forced]
            tokens[forced] = torch.tensor(ids, device=x.device)
        table = _report(x, tokens, best, unsettled, rows)
        while again := [i for i, facts in enumerate(table) if facts[_UNSETTLED]]:
            room = min(room * _MORE, self.vocab_size)
            tokens[again], unsettled[again] = _draw_ranked(x, best, again, rows, room)
            table = _report(x, tokens, best, unsettled, rows)
        return [self._outcome(rows[i], facts, failed.get(i)) for i, facts in enumerate(table)]

    def _adjust_(self, x: torch.Tensor, rows: Sequence[SamplerRow]) -> dict[int, RequestError]:
        """Apply penalties, bias, bans and constraints in place; returns the rows that failed."""
        flat = x.view(-1)
        past = [row.past for row in rows]
        at, kept = self._places([ids for ids, _ in past])
        if len(at):
            minus = np.concatenate([minus for _, minus in past])[kept]
            factors = np.array([row.params.repetition_penalty for row in rows], np.float32)
            factors = np.repeat(factors, [len(ids) for ids, _ in past])[kept]
            where, factor = _to(at, x.device), _to(factors, x.device)
            score = flat[where]
            score = torch.where(score < 0, score * factor, score / factor)
            flat[where] = score - _to(minus, x.device)
        at, kept = self._places([row.bias_ids for row in rows])
        if len(at):
            bias = np.concatenate([row.bias for row in rows])[kept]
            flat[_to(at, x.device)] += _to(bias, x.device)
        at, _ = self._places([row.forbidden for row in rows])
        if len(at):
            flat[_to(at, x.device)] = -torch.inf
        if len(self._banned):
            self._banned = self._banned.to(x.device)
            x.index_fill_(1, self._banned, -torch.inf)
        bound = [(i, row.constraint) for i, row in enumerate(rows) if row.constraint is not None]
        if not bound:
            return {}
        opening = [(i, list(row.opening_ids)) for i, row in enumerate(rows) if row.opening_ids]
        scores = [x[i, ids].clone() for i, ids in opening]
        failed = mask_logits_(x, [i for i, _ in bound], [state for _, state in bound])
        for (i, ids), score in zip(opening, scores, strict=True):
            x[i, ids] = score
        return failed

    def _places(self, ids_of_rows: Sequence[Ids]) -> tuple[Ids, Mask]:
        """Token ids of each row as indices into the flattened logits, and a mask of the ids that
        have one.

        A prompt may contain ids without an output logit, such as image placeholders.
        """
        ids = np.concatenate(ids_of_rows)
        kept = (ids >= 0) & (ids < self.vocab_size)
        starts = np.arange(len(ids_of_rows)) * self.vocab_size
        return (ids + np.repeat(starts, [len(part) for part in ids_of_rows]))[kept], kept

    def _outcome(
        self, row: SamplerRow, facts: Sequence[float], failed: RequestError | None
    ) -> Sampled:
        token_id, best = int(facts[_TOKEN]), facts[_BEST]
        failure, code = "", ErrorCode.ENGINE_ERROR
        if failed is not None:
            failure, code = failed.info.message, ErrorCode(failed.info.code)
        elif row.forced is not None and row.forced >= self.vocab_size:
            failure = f"forced token {row.forced} is not one of the model's"
        elif best == -math.inf:
            failure = (
                "no token is allowed: bias, bans, constraint and min_tokens exclude each other"
            )
            if row.restricted:
                code = ErrorCode.INVALID_REQUEST
        elif not math.isfinite(best):
            failure = "the model's logits are not numbers (NaN or infinite)"
        if failure:
            return Sampled(-1, None, ok=False, fault=failure, code=code)
        if row.params.logprobs is None:
            return Sampled(token_id, None, ok=True)
        logprob = _token_logprob(
            token_id, facts[_LOGPROBS:], row.params.logprobs, self._token_bytes
        )
        return Sampled(token_id, logprob, ok=True)


#: Columns of a step's report; they are followed by the logprobs, as in `_scores`.
_TOKEN, _BEST, _UNSETTLED, _LOGPROBS = range(4)


def _report(
    x: torch.Tensor,
    tokens: torch.Tensor,
    best: torch.Tensor,
    unsettled: torch.Tensor,
    rows: Sequence[SamplerRow],
) -> list[list[float]]:
    """Everything that the host needs from a step, in one transfer: a list of columns per row."""
    wide = _wide(x.device)
    table = torch.stack([tokens.to(wide), best.to(wide), unsettled.to(wide)], dim=1)
    scored = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if scored:
        top = MAX_TOP_LOGPROBS if any(rows[i].params.logprobs for i in scored) else 0
        scores = _scores(_of(x, scored), _of(best, scored), _of(tokens, scored), top)
        table = torch.nn.functional.pad(table, (0, scores.shape[1]))
        table[scored, _LOGPROBS:] = scores
    facts: list[list[float]] = table.tolist()
    return facts


def _scores(x: torch.Tensor, best: torch.Tensor, tokens: torch.Tensor, top: int) -> torch.Tensor:
    """[R, 1 + 2 * top]: the chosen token's logprob, the highest logprobs, and their ids.

    The number of top tokens is always the same: which of several equal ones are included must not
    depend on what other rows request.
    """
    wide = _wide(x.device)
    norm = (
        best[:, None].to(wide)
        + _weights(x, best[:, None]).sum(-1).to(wide).sum(-1, keepdim=True).log()
    )
    parts = [x.gather(1, tokens[:, None]).to(wide) - norm]
    if top:
        values, ids = x.topk(min(top, x.shape[1]), dim=-1)
        parts += [values.to(wide) - norm, ids.to(wide)]
    return torch.cat(parts, dim=1)


def _token_logprob(
    token_id: int, scores: Sequence[float], top: int, token_bytes: Callable[[int], bytes]
) -> TokenLogprob:
    """The logprob of a token. `scores` is a row of `_scores`. Tokens of probability zero are left
    out."""
    count = len(scores) // 2
    pairs = zip(scores[1 : 1 + count], scores[1 + count :], strict=True)
    likeliest = [
        TopLogprob(int(i), max(logprob, LOGPROB_FLOOR), token_bytes(int(i)))
        for logprob, i in islice(pairs, top)
        if logprob > -math.inf
    ]
    return TokenLogprob(max(scores[0], LOGPROB_FLOOR), token_bytes(token_id), likeliest)


@torch.inference_mode()
def prompt_logprobs(
    logits: torch.Tensor,
    ids: Sequence[int],
    top: int,
    token_bytes: Callable[[int], bytes],
) -> list[TokenLogprob]:
    """The model's logprob of each token of `ids`.

    `logits` [T, V] are from the positions before the tokens: row t predicts `ids[t]`. `top` is the
    number of most likely tokens to report for each. The first token of a prompt has no logits: the
    caller adds `TokenLogprob(None, ...)` for it.
    """
    tokens = torch.tensor(list(ids), device=logits.device)
    x = logits.float()
    scores = _scores(x, x.amax(dim=-1), tokens, MAX_TOP_LOGPROBS if top else 0)
    facts: list[list[float]] = scores.tolist()
    return [_token_logprob(i, row, top, token_bytes) for i, row in zip(ids, facts, strict=True)]


def _of(x: torch.Tensor, index: list[int]) -> torch.Tensor:
    """Some rows of a tensor (ascending); all of them without a copy."""
    return x if len(index) == len(x) else x[index]


def _to(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _wide(device: torch.device) -> torch.dtype:
    """The dtype of sums on which decisions are based; not every device has float64."""
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _drawing(rows: Sequence[SamplerRow], vocab_size: int) -> tuple[list[int], list[int]]:
    """Rows that draw from the whole vocabulary (or all of it above min_p), and rows that draw from
    the top of the ranking; only a row's own parameters decide."""
    whole: list[int] = []
    cut: list[int] = []
    for i, row in enumerate(rows):
        if row.greedy or row.forced is not None:
            continue
        ranked = 0 < row.params.top_k < vocab_size or row.params.top_p < 1.0
        (cut if ranked else whole).append(i)
    return whole, cut


def _room(rows: Sequence[SamplerRow], vocab_size: int) -> int:
    """How many of the most likely tokens to examine; changes the cost, never the outcome."""
    wanted = [row.params.top_k if row.params.top_k else _CANDIDATES - 1 for row in rows]
    # One more than top_k shows whether the last of them is tied with one outside.
    return min(1 << max(wanted, default=0).bit_length(), vocab_size)


def _columns(values: list[list[float]], device: torch.device) -> list[torch.Tensor]:
    """Parameters of rows as tensors [R, 1], one for each parameter, in one transfer."""
    table = torch.tensor(values, dtype=_wide(device)).to(device, non_blocking=True)
    return [table[:, j : j + 1] for j in range(table.shape[1])]


def _weights(
    x: torch.Tensor, best: torch.Tensor, temperature: torch.Tensor | None = None
) -> torch.Tensor:
    """exp((x - best) / temperature) in blocks, [R, blocks, _BLOCK], padded with zeros.

    In blocks, because the order in which a long row is summed depends on the batch; that of a short
    one does not, and the sums of the blocks are added in float64. `best` and `temperature` are
    [R, 1].
    """
    count, vocab_size = x.shape
    blocks = -(-vocab_size // _BLOCK)
    padded = x.new_empty(count, blocks * _BLOCK)
    padded[:, vocab_size:] = 0
    weights = padded[:, :vocab_size]
    torch.sub(x, best, out=weights)
    if temperature is not None:
        weights.div_(temperature.to(x.dtype))
    weights.exp_()
    return padded.view(count, blocks, _BLOCK)


def _draw_whole(
    x: torch.Tensor, best: torch.Tensor, index: list[int], rows: Sequence[SamplerRow]
) -> torch.Tensor:
    """Tokens [R], by inverting the cumulative distribution in vocabulary order: find the block
    first, then the token in it. Nothing is sorted."""
    chosen = [(rows[i].params, rows[i].position) for i in index]
    temperature, min_p, u = _columns(
        [[p.temperature, p.min_p, uniform(p.seed, position)] for p, position in chosen], x.device
    )
    weights = _weights(_of(x, index), _of(best, index)[:, None], temperature)
    if any(p.min_p for p, _ in chosen):  # the most likely token has weight 1
        weights.masked_fill_(weights < min_p[:, :, None].to(x.dtype), 0)
    sums = weights.sum(-1).to(u.dtype).cumsum(-1)
    target = _inside(u * sums[:, -1:], sums[:, -1:])
    block = (sums <= target).sum(-1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0)
    inner = weights[torch.arange(len(index), device=x.device), block[:, 0]].to(u.dtype).cumsum(-1)
    target = _inside(target - before, inner[:, -1:])
    place = (inner <= target).sum(-1, keepdim=True)
    return (block * _BLOCK + place).clamp_(max=x.shape[1] - 1)[:, 0]


def _inside(target: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Keep a target of cumulative weight below the total, which it may reach by rounding."""
    return torch.minimum(target, total * (1 - torch.finfo(total.dtype).eps))


def _draw_ranked(
    x: torch.Tensor,
    best: torch.Tensor,
    index: list[int],
    rows: Sequence[SamplerRow],
    room: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from the top of the ranking: tokens [R], and which rows are unsettled [R].

    Examines the `room` most likely tokens. A row is unsettled if it may keep more tokens than
    those; none is if `room` equals the size of the vocabulary.
    """
    vocab_size = x.shape[1]
    chosen = [(rows[i].params, rows[i].position) for i in index]
    temperature, top_p, min_p, top_k, u = _columns(
        [
            [p.temperature, p.top_p, p.min_p, p.top_k, uniform(p.seed, position)]
            for p, position in chosen
        ],
        x.device,
    )
    score, top = _of(x, index), _of(best, index)[:, None]
    values, ids = _rank(score, room)
    weights = (values - top).to(u.dtype).div_(temperature).exp_()
    running = weights.cumsum(-1)
    count = torch.full_like(ids[:, :1], room)
    nucleus = [j for j, (p, _) in enumerate(chosen) if not 0 < p.top_k < vocab_size]
    if len(nucleus) < len(chosen):
        last = torch.where((top_k > 0) & (top_k < room), top_k.long(), room)
        # Tokens equal to the last one stay. A row with NaN keeps nothing.
        count = (values >= values.gather(1, last - 1)).sum(-1, keepdim=True).clamp_(min=1)
    if any(p.top_p < 1 for p, _ in chosen):
        total = running.gather(1, count - 1)
        if nucleus:  # summed the same way whatever the room, so that the outcome is the same
            spread = _weights(_of(score, nucleus), _of(top, nucleus), _of(temperature, nucleus))
            total[nucleus] = spread.sum(-1).to(u.dtype).sum(-1, keepdim=True)
        within = torch.searchsorted(running, top_p * total) + 1
        count = torch.where(top_p < 1, count.minimum(within), count)
    if any(p.min_p for p, _ in chosen):
        count = count.minimum((weights >= min_p).sum(-1, keepdim=True))
    count.clamp_(min=1)
    mass = running.gather(1, count - 1)
    place = torch.searchsorted(running, _inside(u * mass, mass), right=True).clamp_(max=room - 1)
    edge = values[:, -1:]
    unsettled = (values.gather(1, count - 1) == edge) & (edge > -torch.inf) & (room < vocab_size)
    return ids.gather(1, place)[:, 0], unsettled[:, 0]


def _rank(x: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `room` highest logits of each row and their ids, in descending order; the lower id comes
    first among equals, so that the first is the greedy choice."""
    if room < x.shape[1]:
        values, ids = x.topk(room, dim=-1, sorted=False)
    else:
        values, ids = x, torch.arange(room, device=x.device)
    # One integer key orders by value, then by id. Adding zero turns -0.0 into 0.0.
    keys = _ascending(values.add(0.0).view(torch.int32)).bitwise_not_().long()
    keys.bitwise_left_shift_(32).bitwise_or_(ids)
    if keys.device.type == "cpu":  # NumPy's vectorised sort takes a tenth of torch's time
        keys.numpy().sort(axis=-1)
    else:
        keys = keys.sort(dim=-1).values
    values = _ascending((keys >> 32).int().bitwise_not_()).view(torch.float32)
    return values, keys.bitwise_and_(0xFFFFFFFF)


def _ascending(bits: torch.Tensor) -> torch.Tensor:
    """Convert the bits of float32 values to integers with the same order, and back; in place."""
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))
