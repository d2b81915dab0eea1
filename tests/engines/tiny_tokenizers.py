"""Tokenizers of every kind, trained on the spot in a moment: tests need no downloads."""

from __future__ import annotations

import json
from functools import cache

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

EOS = "<|end|>"
MULTILINGUAL = (
    "The quick brown fox jumps over the lazy dog. Hello world, naïve café — well done!\n"
    '{"name": "Ada", "age": 36, "tags": ["x", "y"], "ok": true, "none": null}\n'
    "你好，世界！今天天气很好。こんにちは世界。안녕하세요 세계. Привет, мир! שלום عالم ไทย\n"
    "👩‍👩‍👧‍👦 🏳️‍🌈 🤖🤖 é é́ ﷽ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \tfunction f(x) { return x + 1; }\n"
)
_CORPUS = [MULTILINGUAL, "Stop here. User: what? Assistant: that! ### end of text\n"] * 4


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens([AddedToken(EOS, special=True), AddedToken("<s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, bos_token="<s>")


@cache
def byte_level(vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: tokens may end in the middle of a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _wrapped(tokenizer)


@cache
def byte_fallback(vocab_size: int = 500) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: rare characters are spelt in bytes, a leading space is dropped."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,!?:#▁"),
        limit_alphabet=80,
        show_progress=False,
    )
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in _CORPUS], trainer)
    # As in the models' own files, bytes are tokens of the model like any other.
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = []
    plain = Tokenizer.from_str(json.dumps(description))
    return _wrapped(plain)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """As T5: words begin with a mark, and the first one loses it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _wrapped(tokenizer)


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """As BERT: a space before every piece that is not marked as going on."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _wrapped(tokenizer)


@cache
def letters() -> PreTrainedTokenizerFast:
    """Byte level, but with the letters a to f alone: most texts cannot be spelt."""
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate("abcdef")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(tokenizer)
