"""Compiled attention computes what torch's does, for tokens of any rows at once; where it cannot be
had, or is wrong, torch's own is used and the log says so."""

from __future__ import annotations

import copy
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines import tiny
from tests.engines.architectures import text_model
from worker.engines.common.prompt import Prompt
from worker.engines.common.sequence import Sequence, bare_fields
from worker.engines.transformers import kernels
from worker.engines.transformers.forward import Forward
from worker.engines.transformers.fused import fuse_layers
from worker.engines.transformers.kernels import compiled
from worker.engines.transformers.loaded import wrap_model
from worker.engines.transformers.packing import Along, common_prefixes

pytestmark = pytest.mark.skipif(
    compiled(torch.float32, 16, 2) is None, reason="there is no C compiler"
)


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is compiled yet; the folder of what will be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.cache_clear()
    yield tmp_path / "tokenbus"
    compiled.cache_clear()


def _forward(model: Any) -> Forward:
    return Forward(wrap_model(model, tiny.tokenizer(model.config.vocab_size)))


def _sequence(ids: list[int], filled: int = 0) -> Sequence:
    import numpy as np

    fields = bare_fields(b"", Prompt(ids=ids, key=np.asarray(ids, dtype=np.int64)), None)
    return Sequence(**fields, filled=filled)


def _ids(count: int, seed: int) -> list[int]:
    return [(seed * 37 + at * 11) % 400 + 10 for at in range(count)]


def _plain(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    return logits.float()


def _close(got: torch.Tensor, wanted: torch.Tensor, error: float) -> None:
    assert float((got.float() - wanted).norm() / wanted.norm()) < error


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@torch.inference_mode()
def test_rows_of_any_length_are_computed_without_padding(
    name: str, dtype: torch.dtype, error: float
) -> None:
    """Prompts of very different lengths in one forward, short ones token by token and long ones in
    blocks, pieces behind pieces, decodes, and drafts of different lengths."""
    model = text_model(name).to(dtype)
    plain = copy.deepcopy(model)
    fuse_layers(model, pack=True)
    forward = _forward(model)
    assert forward.packs
    texts = [_ids(60, 1), _ids(3, 2), _ids(300, 3), _ids(1, 4)]
    rows = [_sequence(ids) for ids in texts]
    assert forward.cache.reserve(len(rows), 320, 0, 0)
    forward.prefill(0, rows[0], 0, 50)
    rows[0].filled = 50
    wanted = [_plain(plain, ids) for ids in texts]
    logits = forward.prefill_many(0, rows)
    for got, want in zip(logits, wanted, strict=True):
        _close(got, want[-1], error)

    for step in (77, 205):
        for place, row in enumerate(rows):
            row.filled = row.total
            row.answer.append(step + place)
        logits = forward.decode(rows)
        for got, row in zip(logits, rows, strict=True):
            _close(got, _plain(plain, row.prompt.ids + row.answer)[-1], error)
    for row in rows:
        row.filled = row.total
        row.answer.append(33)
    drafts = [[41, 42, 43], [], [51], [61, 62]]
    logits = forward.verify(rows, drafts, 4)
    for got, row, draft in zip(logits, rows, drafts, strict=True):
        want = _plain(plain, row.prompt.ids + row.answer + draft)
        _close(got[: len(draft) + 1], want[-len(draft) - 1 :], error)


@pytest.mark.parametrize("drafted", [False, True], ids=["alone", "drafts"])
@torch.inference_mode()
def test_rows_decode_in_the_forward_of_a_prompt(drafted: bool) -> None:
    """With several prompts, which end, and with a piece of one, which does not."""
    model = text_model("llama")
    plain = copy.deepcopy(model)
    fuse_layers(model, pack=True)
    forward = _forward(model)
    rows = [_sequence(_ids(length, length)) for length in (70, 5, 20, 90, 200)]
    assert forward.cache.reserve(len(rows), 320, 0, 0)
    forward.prefill_many(0, rows[:2])
    drafts = [[41, 42], []] if drafted else None

    def along(answer: int) -> Along:
        for row in rows[:2]:
            row.filled = row.total
            row.answer.append(answer)
        return Along(rows[:2], drafts, 3 if drafted else 1)

    def check(decoded: Along) -> None:
        assert decoded.logits is not None
        assert decoded.logits.shape[:-1] == ((2, 3) if drafted else (2,))
        for place, row in enumerate(rows[:2]):
            draft = [] if drafts is None else drafts[place]
            want = _plain(plain, row.prompt.ids + row.answer + draft)[-len(draft) - 1 :]
            got = decoded.logits[place]
            _close(got[: len(draft) + 1] if drafted else got[None], want, 1e-5)

    decoded = along(77)
    for got, row in zip(forward.prefill_many(2, rows[2:4], decoded), rows[2:4], strict=True):
        _close(got, _plain(plain, row.prompt.ids)[-1], 1e-5)
    check(decoded)
    decoded = along(78)
    logits = forward.prefill(4, rows[4], 0, 120, kept=(3, 119), along=decoded)
    _close(logits, _plain(plain, rows[4].prompt.ids)[[3, 119]], 1e-5)
    check(decoded)
    _close(forward.prefill(4, rows[4], 120, 200)[0], _plain(plain, rows[4].prompt.ids)[-1], 1e-5)


@pytest.mark.parametrize("common", [64, 300])
@torch.inference_mode()
def test_what_rows_have_in_common_is_read_once(common: int) -> None:
    """Rows that begin alike read the first one's beginning; a row that does not reads its own.
    Shown by removing from the cache what no row should read."""
    model = text_model("llama")
    plain = copy.deepcopy(model)
    fuse_layers(model, pack=True)
    forward = _forward(model)
    head = _ids(common, 7)
    texts = [[*head, *_ids(4, 1)], _ids(common + 9, 2), [*head, *_ids(40, 3)], [*head, 9]]
    rows = [_sequence(ids) for ids in texts]
    assert forward.cache.reserve(len(rows), common + 60, 0, 0)
    for place, row in enumerate(rows):
        row.filled = common
        forward.prefill(place, row, 0, common)
    for layer in forward.cache.slot_layers:
        for copied in (2, 3):
            layer.keys[copied, :common] = torch.nan
            layer.values[copied, :common] = torch.nan
    for got, ids in zip(forward.prefill_many(0, rows), texts, strict=True):
        _close(got, _plain(plain, ids)[-1], 1e-5)
    for step in range(2):
        for row in rows:
            row.filled = row.total
            row.answer.append(50 + step)
        for got, row in zip(forward.decode(rows), rows, strict=True):
            _close(got, _plain(plain, row.prompt.ids + row.answer)[-1], 1e-5)
    for row in rows:
        row.filled = row.total
        row.answer.append(33)
    logits = forward.verify(rows, [[41, 42], [], [51], [61, 62]], 3)
    _close(logits[3], _plain(plain, [*texts[3], *rows[3].answer, 61, 62])[-3:], 1e-5)
    # The first row is gone: another one is the first.
    forward.cache.write(2, forward.cache.read(0, common), common)
    rest = rows[2:]
    forward.cache.move(2, 0, rest[0].filled + 1)
    forward.cache.move(3, 1, rest[1].filled + 1)
    for got, row in zip(forward.decode(rest), rest, strict=True):
        _close(got, _plain(plain, row.prompt.ids + row.answer)[-1], 1e-5)


def test_only_the_same_adapter_and_what_is_computed_counts_as_common() -> None:
    one, two, three = (_sequence(_ids(100, 1)) for _ in range(3))
    three.adapter = "other"
    assert common_prefixes([one, two, three], [100, 90, 100]) == [([0, 1], 90)]
    assert common_prefixes([one, two, three], [100, 10, 100]) == []
    branched = _sequence(_ids(100, 1))
    branched.branches = (20, 10)
    assert common_prefixes([one, branched], [100, 100]) == [([0, 1], 70)]
    image = _sequence(_ids(100, 1))
    image.prompt.key[30] += 1
    assert common_prefixes([one, image], [100, 100]) == []


@torch.inference_mode()
def test_a_long_piece_after_another_attends_to_it_and_to_nothing_after_itself() -> None:
    model = text_model("llama")
    plain = copy.deepcopy(model)
    fuse_layers(model, pack=True)
    forward = _forward(model)
    row = _sequence(_ids(400, 5))
    assert forward.cache.reserve(2, 401, 0, 0)
    forward.prefill(1, row, 0, 170)
    got = forward.prefill(1, row, 170, 400, kept=range(170, 400))
    _close(got, _plain(plain, row.prompt.ids)[170:], 1e-5)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_not_finite_stay_so(dtype: torch.dtype, broken: float) -> None:
    """By them the engine finds that a model is broken: they must not turn into a token."""
    ours = compiled(dtype, 16, 2)
    assert ours is not None
    rows, places = torch.zeros(1, dtype=torch.long), torch.tensor([40])
    turns = torch.ones(1, 8, dtype=torch.complex64)
    for place in ("query", "key", "value"):
        keys, values = torch.randn(1, 64, 1, 16).to(dtype), torch.randn(1, 64, 1, 16).to(dtype)
        heads = torch.randn(1, 4, 16).to(dtype)
        {"query": heads[0, 1], "key": keys[0, 7, 0], "value": values[0, 7, 0]}[place][3] = broken
        ours.store(heads, turns, keys, values, rows, places)
        seen = torch.zeros(2, 32, dtype=dtype)
        ours.attend(heads, keys, values, rows, places, seen, 1, 0.25)
        ours.attend_together(heads, keys, values, 0, 41, seen[1:], 0.25)
        if place == "key" and broken == torch.inf:
            continue  # an infinite score may also be one of minus infinity, which counts nothing
        assert not torch.isfinite(seen).all(1).any()
    states = torch.full((1, 16), broken, dtype=dtype)
    assert not torch.isfinite(ours.norm(states, torch.ones(16, dtype=dtype), 1e-6)).all()


def test_threads_share_the_tokens(request: pytest.FixtureRequest) -> None:
    ours = compiled(torch.float32, 16, 2)
    assert ours is not None
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    count = 100
    heads = torch.randn(count, 4, 16)
    turns = torch.polar(torch.ones(count, 8), torch.randn(count, 8))
    rows, places = torch.arange(count) % 10, torch.arange(count) // 10 + 50
    seen = []
    keys, values = torch.randn(10, 64, 1, 16), torch.randn(10, 64, 1, 16)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        own, own_keys, own_values = heads.clone(), keys.clone(), values.clone()
        ours.store(own, turns, own_keys, own_values, rows, places)
        out = torch.empty(count, 32)
        ours.attend(own, own_keys, own_values, rows, places, out, count, 0.25)
        seen.append(out)
    assert torch.equal(*seen)
    out = torch.empty(2, count, 32)
    long = torch.randn(1, 160, 1, 16)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        ours.attend_together(heads, long, long, 0, 50 + count, out[threads // 2], 0.25)
    assert torch.equal(*out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "group"), [(16, 2), (24, 3), (80, 1), (128, 12)])
def test_tokens_in_blocks_attend_as_they_do_one_by_one(
    dim: int, group: int, dtype: torch.dtype
) -> None:
    ours = compiled(dtype, dim, group)
    assert ours is not None
    heads = torch.randn(150, (group + 2) * 2, dim).to(dtype)
    keys, values = (torch.randn(3, 400, 2, dim).to(dtype) for _ in range(2))
    rows = torch.full((150,), 1)
    for start, count in ((0, 150), (0, 1), (127, 70), (200, 150)):
        places = torch.arange(start, start + count)
        one_by_one, blocks = torch.empty(2, count, group * 2 * dim, dtype=dtype)
        own = heads[:count]
        ours.attend(own, keys, values, rows[:count], places, one_by_one, count, dim**-0.5)
        ours.attend_together(own, keys, values, 1, start + count, blocks, dim**-0.5)
        _close(blocks, one_by_one.float(), 1e-6 if dtype is torch.float32 else 1e-2)


def test_what_was_compiled_is_kept_for_the_next_start(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled(torch.float32, 16, 2) is not None
    [made] = anew.iterdir()
    compiled.cache_clear()
    monkeypatch.setattr(kernels, "_compile", lambda *args: pytest.fail("compiled again"))
    assert compiled(torch.float32, 16, 2) is not None
    assert [made] == list(anew.iterdir())
    assert not stat.S_IMODE(anew.stat().st_mode) & 0o077


def test_a_folder_that_others_can_write_is_not_used(anew: Path) -> None:
    anew.mkdir()
    anew.chmod(0o777)
    assert compiled(torch.float32, 16, 2) is not None
    assert list(anew.iterdir()) == []


def test_without_a_compiler_a_model_runs_on_torchs_operators(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    caplog.set_level("INFO")
    model = text_model("llama")
    plain = copy.deepcopy(model)
    fuse_layers(model, pack=True)
    assert "no C compiler" in caplog.text
    forward = _forward(model)
    assert not forward.packs
    row = _sequence(_ids(70, 6))
    assert forward.cache.reserve(1, 80, 0, 0)
    with torch.inference_mode():
        got = forward.prefill(0, row, 0, 70)[0]
        _close(got, _plain(plain, row.prompt.ids)[-1], 1e-5)


def test_a_compiler_that_fails_is_named(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho this compiler has no headers >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert compiled(torch.float32, 16, 2) is None
    assert "this compiler has no headers" in caplog.text
    assert list(anew.iterdir()) == []


def test_code_that_computes_something_else_is_not_used(
    anew: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    text = kernels.SOURCE.read_text()
    assert text.count("places[token] + 1, key_heads") == 1
    changed = tmp_path / "kernels.c"
    changed.write_text(text.replace("places[token] + 1, key_heads", "places[token], key_heads"))
    monkeypatch.setattr(kernels, "SOURCE", changed)
    assert compiled(torch.float32, 16, 2) is None
    assert "differs by" in caplog.text
