"""The bundled demo model answers images that it has never seen."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from worker.demo import model_path  # noqa: E402
from worker.demo.evaluate import count_right, load, report  # noqa: E402
from worker.demo.pictures import KINDS, ask, example, held_out, make_scene  # noqa: E402

# The largest file that the repository should carry for a demonstration.
LARGEST_MODEL_BYTES = 8_000_000


@pytest.fixture(scope="module")
def loaded() -> Iterator[tuple[Any, Any]]:
    yield load(model_path())


def test_at_least_95_of_100_held_out_questions_are_answered_exactly(
    loaded: tuple[Any, Any],
) -> None:
    tallies = count_right(*loaded, held_out(150, seed=20))
    right = sum(tally.right for tally in tallies.values())
    assert set(tallies) >= set(KINDS) - {"how many images"}, "the sample misses whole kinds"
    assert right >= 0.95 * 150, report(tallies, show_wrong=9)


def test_the_example_is_answered_as_promised(loaded: tuple[Any, Any]) -> None:
    image, question, answer = example()
    tallies = count_right(*loaded, [([image], question, answer, "describe")])
    assert tallies["describe"].right == 1, tallies["describe"].wrong


def test_roles_strings_and_parts_share_one_template(loaded: tuple[Any, Any]) -> None:
    _, processor = loaded
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Who?"}]}
    prompt = processor.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello!"},
            {"role": "assistant", "content": [{"type": "text", "text": "Hi."}]},
            question,
            {"role": "assistant", "content": "You."},
            question,
        ],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert prompt == (
        "<|bos|><|system|>Be brief.<|end|><|user|>Hello!<|end|><|assistant|>Hi.<|end|>"
        "<|user|>#1<image>Who?<|end|><|assistant|>You.<|end|>"
        "<|user|>#2<image>Who?<|end|><|assistant|>"
    )


def test_a_question_before_its_images_makes_the_same_prompt_as_after_them(
    loaded: tuple[Any, Any],
) -> None:
    _, processor = loaded
    image, text = {"type": "image"}, {"type": "text", "text": "What is this?"}
    before, after = (
        processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
        for parts in ([text, image, image], [image, image, text])
    )
    assert before == after == "<|bos|><|user|>#1<image>#2<image>What is this?<|end|>"


def test_the_model_knows_its_special_tokens_and_is_small(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    tokenizer, generation = processor.tokenizer, model.generation_config
    assert generation.eos_token_id == tokenizer.eos_token_id == 2
    assert generation.bos_token_id == tokenizer.bos_token_id == 1
    assert generation.pad_token_id == tokenizer.pad_token_id == 0
    assert (model_path() / "model.safetensors").stat().st_size <= LARGEST_MODEL_BYTES
    # 4-bit weights come in blocks of 64.
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(layer.in_features % 64 == 0 for layer in layers)


def test_held_out_cases_are_the_same_ones_each_time() -> None:
    first, again = (
        [([p.tobytes() for p in images], *case) for images, *case in held_out(40, seed=3)]
        for _ in range(2)
    )
    assert first == again


def test_a_question_with_the_wrong_number_of_images_is_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="takes"):
        ask(rng, [make_scene(rng)], "each image")
