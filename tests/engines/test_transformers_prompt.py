"""Where a prompt ends and an answer begins: end tokens, first spaces, tokens that the model cannot
read, and images that stay whole."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from tokenizers.processors import TemplateProcessing

from broker.protocol.messages import (
    FinishReason,
    ImagePart,
    Kind,
    Message,
    Params,
    Request,
    Resume,
    TextPart,
    new_id,
)
from tests.engines import tiny, tiny_tokenizers
from worker.engines.base import Job
from worker.engines.common.images import ImageLimits
from worker.engines.common.prompt import PromptBuilder
from worker.engines.transformers.engine import TransformersEngine
from worker.engines.transformers.loaded import wrap_model


def one(engine: TransformersEngine, job: Job) -> tiny.Answer:
    return tiny.run(engine, [job])[0]


def asked(engine: TransformersEngine, kind: Kind, *image_files: bytes, **body: Any) -> Any:
    """The result of a request that needs no model, or its error."""
    answer = one(
        engine, Job(new_id(), Request(model="tiny", kind=kind, window=1, **body), image_files)
    )
    return answer.failed if answer.ended is None else answer.ended.result


def completion(prompt: str, *image_files: bytes, **params: Any) -> Job:
    request = Request(
        model="tiny",
        kind=Kind.COMPLETE,
        prompt=prompt,
        params=Params(**({"temperature": 0.0, "max_tokens": 8, "ignore_eos": True} | params)),
        window=1 << 30,
    )
    return Job(new_id(), request, image_files)


# --- end tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["generation config", "configuration", "tokenizer"])
def test_an_end_token_of_any_source_ends_the_answer(source: str) -> None:
    model, tokenizer = tiny.llama(), copy.deepcopy(tiny.tokenizer())
    ids = tiny.prompts(1, seed=8)[0]
    written = tiny.generated(model, {"input_ids": torch.tensor([ids])}, 12, ())
    at = next(index for index in range(3, 12) if written[index] not in written[:index])
    end = written[at]
    model.generation_config = transformers.GenerationConfig(eos_token_id=[tiny.PAD, tiny.BOS])
    if source == "generation config":
        model.generation_config.eos_token_id.append(end)
    elif source == "configuration":
        model.config.eos_token_id = end
    else:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    engine = tiny.serve(model, own_tokenizer=tokenizer)
    try:
        answer = one(engine, tiny.ids_job(ids, ignore_eos=False))
        assert answer.token_ids == written[: at + 1]
        assert answer.reason is FinishReason.STOP and answer.ended is not None
        assert answer.ended.stopped_by == end
    finally:
        engine.close()


def ends(model: Any, tokenizer: Any = None) -> set[int]:
    return set(wrap_model(model, tokenizer or tiny.tokenizer()).eos_ids)


def test_end_tokens_of_every_source_count_together() -> None:
    model = tiny.llava()
    model.generation_config = transformers.GenerationConfig(eos_token_id=[20, 21])
    model.config.eos_token_id = 22
    model.config.text_config.eos_token_id = [23]
    assert ends(model) == {tiny.END, 20, 21, 22, 23}


def test_an_id_outside_the_vocabulary_is_not_an_end_token() -> None:
    model = tiny.llama()
    model.generation_config.eos_token_id = [-1, 20]
    model.config.eos_token_id = 50_256
    assert ends(model) == {tiny.END, 20}


def test_a_config_classes_default_end_token_is_an_ordinary_token() -> None:
    """LlamaConfig defaults to 2 if config.json has none; here 2 is a word."""
    tokenizer = copy.deepcopy(tiny_tokenizers.byte_level())
    model = tiny.llama(vocabulary=len(tokenizer))
    model.config.eos_token_id = 2
    model.generation_config = transformers.GenerationConfig.from_model_config(model.config)
    assert ends(model, tokenizer) == {tokenizer.eos_token_id}
    model.generation_config = transformers.GenerationConfig(eos_token_id=2)
    assert ends(model, tokenizer) == {2, tokenizer.eos_token_id}


def closing(added: str) -> Any:
    """The tokenizer, which puts tokens around every text."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tiny.SPECIAL]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"<|bos|> $A {added}".strip(), special_tokens=special
    )
    return tokenizer


@pytest.mark.parametrize("added", ["", "<|end|>", "<|pad|> <|end|>"])
def test_no_end_token_follows_a_prompt(added: str) -> None:
    engine = tiny.serve(tiny.llama(), own_tokenizer=closing(added))
    messages = [Message(role="user", content="hello")]
    try:
        for count, body in ((3, {"messages": messages}), (1, {"prompt": "hello"})):
            ids = asked(engine, Kind.TOKENIZE, **body)["token_ids"]
            assert ids[0] == tiny.BOS
            assert ids[-1] == (tiny.ASSISTANT if "messages" in body else 307)
            assert asked(engine, Kind.COUNT, **body)["count"] == len(ids) >= count + 1
        # An end token that the caller wrote stays.
        written = asked(engine, Kind.TOKENIZE, prompt="hello<|end|>")["token_ids"]
        assert written == [tiny.BOS, 307, tiny.END]
        done = asked(
            engine, Kind.TOKENIZE, messages=messages, template_args={"add_generation_prompt": False}
        )
        assert done["token_ids"] == [tiny.BOS, tiny.USER, 307, tiny.END]
    finally:
        engine.close()


def test_no_end_token_follows_a_prompt_with_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava()
    wanted = tiny.serve(model, processor=tiny.llava_processor())
    job = tiny.chat_job("hello", [tiny.image(1)])
    plain = one(wanted, job)
    wanted.close()
    closed = closing("<|end|>")
    monkeypatch.setattr(tiny, "tokenizer", lambda: closed)
    closed.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tiny.END)]
    )
    engine = tiny.serve(model, processor=tiny.llava_processor())
    try:
        answer = one(engine, job)
        assert answer.token_ids == plain.token_ids
        assert answer.ended is not None and plain.ended is not None
        assert answer.ended.usage.prompt_tokens == plain.ended.usage.prompt_tokens
    finally:
        engine.close()


def test_an_encoder_and_an_embedding_read_the_end_of_the_text() -> None:
    config = transformers.T5Config(
        vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=tiny.PAD, eos_token_id=tiny.END, pad_token_id=tiny.PAD,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    builder = PromptBuilder(wrap_model(model, closing("<|end|>")), ImageLimits())
    request = Request(model="tiny", kind=Kind.COMPLETE, prompt="hello", window=1)
    whole = [tiny.BOS, 307, tiny.END]
    assert builder.generation(Job(new_id(), request)).ids == whole
    assert builder.embedding_inputs(["hello"]) == [whole]


# --- tokens without a row in the embedding --------------------------------------------------------


def test_a_token_without_a_row_in_the_embedding_is_refused_by_its_id() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    extra = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    model = tiny.llama(vocabulary=extra)
    ids = [20, 30, 40, 50]
    engine = tiny.serve(model, own_tokenizer=tokenizer)
    chat = [Message(role="user", content="the <extra> fox")]
    messages = Request(model="tiny", messages=chat, window=1)
    embed = Request(model="tiny", kind=Kind.EMBED, inputs=["fine", "the <extra> fox"], window=1)
    embed_ids = Request(model="tiny", kind=Kind.EMBED, inputs=[[20, extra]], window=1)
    resumed = tiny.ids_job([20, 21]).request
    bad = [
        completion("the <extra> fox"),
        completion("x", forced_token_ids=[extra]),
        Job(new_id(), messages),
        Job(new_id(), embed),
        Job(new_id(), embed_ids),
        tiny.ids_job([20, extra, 21]),
        Job(new_id(), replaced(resumed, resume=Resume(epoch=1, token_ids=[30, extra]))),
    ]
    try:
        good, *refused = tiny.run(engine, [tiny.ids_job(ids), *bad])
        for answer in refused:
            assert answer.failed is not None and answer.failed.code == "invalid_request"
            assert str(extra) in answer.failed.message
        assert good.token_ids == tiny.generated(model, {"input_ids": torch.tensor([ids])}, 12, ())
        # Without the model there is nothing to refuse.
        assert asked(engine, Kind.DETOKENIZE, token_ids=[extra]) == {"text": "<extra>"}
        assert asked(engine, Kind.TOKENIZE, prompt="<extra>") == {"token_ids": [extra]}
        assert asked(engine, Kind.DETOKENIZE, token_ids=[extra + 1]).code == "invalid_request"
    finally:
        engine.close()


def replaced(request: Request, **changes: Any) -> Request:
    import msgspec

    return msgspec.structs.replace(request, **changes)


def test_rows_beyond_the_configured_vocabulary_are_read() -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["<extra>"])
    model = tiny.llama(vocabulary=len(tokenizer))
    model.config.vocab_size = len(tokenizer) - 1
    engine = tiny.serve(model, own_tokenizer=tokenizer)
    try:
        answer = one(engine, completion("the <extra> fox"))
        assert answer.reason is FinishReason.LENGTH
    finally:
        engine.close()


# --- a message that is continued ------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize(
    ("kind", "space"),
    [
        (tiny_tokenizers.byte_fallback, "▁"),
        (tiny_tokenizers.metaspace, "▁"),
        (tiny_tokenizers.byte_level, "Ġ"),
    ],
)
def test_a_continued_message_keeps_its_first_space(kind: Any, space: str) -> None:
    tokenizer = copy.deepcopy(kind())
    tokenizer.chat_template = CHAT
    word = tokenizer.convert_tokens_to_ids([space, *"over"])
    engine = tiny.serve(tiny.llama(vocabulary=len(tokenizer)), own_tokenizer=tokenizer)
    messages = [
        Message(role="user", content="Hello"),
        Message(role="assistant", content="The quick brown fox"),
    ]
    params = Params(max_tokens=len(word), forced_token_ids=word, ignore_eos=True)

    def text(continued: bool, resume: Resume | None = None) -> str:
        request = Request(
            model="tiny",
            messages=messages,
            params=params,
            template_args={"continue_final_message": continued},
            resume=resume,
            window=1 << 30,
        )
        answer = one(engine, Job(new_id(), request))
        assert answer.ended is not None, answer.failed
        return answer.text

    try:
        assert text(True) == " over"
        assert text(False).lstrip() == "over"
        assert text(True, Resume(epoch=1, token_ids=word[:2], text_characters=2)) == "ver"
    finally:
        engine.close()


# --- images that stay whole ---------------------------------------------------------------------

OPENED = (
    "{% for m in messages %}{{ m.role }} {% for c in m.content %}"
    "{{ '<|system|><image><|user|>' if c.type == 'image' else c.text }}{% endfor %}\n{% endfor %}"
)
"""Marks around an image, as Qwen-VL's `<|vision_start|>` and `<|vision_end|>`; none for turns."""


def test_truncation_cuts_no_image_from_its_opening_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = OPENED
    monkeypatch.setattr(tiny, "tokenizer", lambda: tokenizer)
    processor = tiny.llava_processor()
    processor.chat_template = OPENED
    engine = tiny.serve(tiny.llava(), processor=processor)
    loaded = engine._served[0].loaded
    parts = [TextPart(text="how many words "), ImagePart(attachment=0), TextPart(text=" are there")]
    messages = [Message(role="user", content=parts)]
    image_bytes = tiny.image(1)
    ids = asked(engine, Kind.TOKENIZE, image_bytes, messages=messages)["token_ids"]
    opening = ids.index(tiny.SYSTEM)
    assert ids[opening + 1 : opening + 6] == [tiny.IMAGE] * 4 + [tiny.USER]
    request = Request(
        model="tiny",
        messages=messages,
        params=Params(max_tokens=4, temperature=0, overflow="truncate_left", echo=True),
        window=1,
    )
    try:
        for cut in range(1, len(ids)):
            loaded.context_tokens = len(ids) + 4 - cut
            answer = one(engine, Job(new_id(), request, (image_bytes,)))
            if cut <= opening:
                assert answer.facts is not None and answer.facts.token_ids == ids[cut:]
            else:
                assert answer.failed is not None
                assert answer.failed.code == "context_overflow"
                assert "images lie where it would be cut" in answer.failed.message
    finally:
        engine.close()


# --- processors that place images by themselves -------------------------------------------------


def spread(model: Any) -> Any:
    """Random weights large enough for every input to matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and float(parameter.std()) < 0.05:
                parameter.normal_(0.0, 0.15)
    return model.eval()


TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
ENDS = {"bos_token_id": tiny.BOS, "eos_token_id": tiny.END, "pad_token_id": tiny.PAD}


def blip2() -> tuple[Any, Any]:
    torch.manual_seed(0)
    language = transformers.OPTConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        init_std=0.2, **ENDS,
    )  # fmt: skip
    questions = {
        "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "encoder_hidden_size": 32,
    }  # fmt: skip
    config = transformers.Blip2Config(
        vision_config=TOWER, qformer_config=questions, text_config=language.to_dict(),
        num_query_tokens=4, image_token_index=tiny.IMAGE,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    images = transformers.BlipImageProcessor(size={"height": 28, "width": 28})
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = None
    return spread(model), transformers.Blip2Processor(images, tokenizer, num_query_tokens=4)


def git() -> tuple[Any, Any]:
    torch.manual_seed(0)
    config = transformers.GitConfig(
        vision_config=TOWER, vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512, **ENDS,
    )  # fmt: skip
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = None
    model = spread(transformers.GitForCausalLM(config))
    return model, transformers.GitProcessor(images, tokenizer)


@pytest.mark.parametrize("kind", [blip2, git])
def test_a_raw_prompt_begins_with_the_image_that_the_processor_places(kind: Any) -> None:
    model, processor = kind()
    engine = tiny.serve(model, processor=processor, own_tokenizer=processor.tokenizer)
    image_files = [tiny.image(1), tiny.image(2)]
    try:
        answers = [
            one(engine, completion("<image>the fox", image_bytes)) for image_bytes in image_files
        ]
        for image_bytes, answer in zip(image_files, answers, strict=True):
            image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
            inputs = dict(processor(text=["the fox"], images=[image], return_tensors="pt"))
            banned = [tiny.IMAGE] if kind is blip2 else []
            assert answer.token_ids == tiny.generated(model, inputs, 8, banned), answer.failed
        assert answers[0].token_ids != answers[1].token_ids
        for prompt in ("the <image>fox", "<image><image>fox"):
            count = prompt.count("<image>")
            error = one(engine, completion(prompt, *image_files[:count])).failed
            assert error is not None and error.code == "invalid_request"
            assert "one image, before the text" in error.message
    finally:
        engine.close()


def test_a_model_that_answers_about_an_image_only_says_so() -> None:
    model, processor = blip2()
    engine = tiny.serve(model, processor=processor, own_tokenizer=processor.tokenizer)
    try:
        error = one(engine, completion("the fox")).failed
        assert error is not None and error.code == "invalid_request"
        assert "only answers about an image" in error.message
    finally:
        engine.close()
