"""A worker process with the transformers engine on a real bus.

It serves the bundled model and a LoRA adapter, and answers every kind of request that is not a
stream of text.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("peft")
from safetensors.numpy import save_file

from tests.harness import Bus
from worker.demo import model_path
from worker.demo.pictures import example

pytestmark = pytest.mark.skipif(
    not (model_path() / "config.json").is_file(), reason="the demo model is not trained here"
)


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter of the bundled model that changes its answers, as peft writes one."""
    folder.mkdir()
    facts = json.loads((model_path() / "config.json").read_text())["text_config"]
    hidden, inner, layers = (
        facts[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    random = np.random.default_rng(1)
    weights = {}
    for layer in range(layers):
        stem = f"base_model.model.model.language_model.layers.{layer}.mlp.down_proj"
        weights[f"{stem}.lora_A.weight"] = random.normal(0, 0.3, (4, inner)).astype(np.float32)
        weights[f"{stem}.lora_B.weight"] = random.normal(0, 0.3, (hidden, 4)).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps(
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "r": 4,
                "lora_alpha": 8,
                "target_modules": r".*language_model.*\.down_proj",
                "base_model_name_or_path": str(model_path()),
                "inference_mode": True,
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    folder = tmp_path_factory.mktemp("bus")
    adapter = write_adapter(folder / "adapter")
    bus = Bus(folder)
    try:
        bus.start_broker()
        bus.start_worker("demo", "--device", "auto", engine=None, adapters=f"odd={adapter}")
        bus.wait_ready(1)
        yield bus
    finally:
        bus.stop()


def test_text_becomes_tokens_and_tokens_text(bus: Bus) -> None:
    client = bus.client()
    ids = client.tokenize("a red circle", model="demo")
    assert "a red circle" in client.detokenize(ids, model="demo")
    assert client.count("a red circle", model="demo") == len(ids) > 1
    bare = client.tokenize("a red circle", model="demo", add_special_tokens=False)
    assert client.detokenize(bare, model="demo") == "a red circle" and bare == ids[-len(bare) :]


def test_the_models_own_template_makes_the_prompt(bus: Bus) -> None:
    client = bus.client()
    messages = [{"role": "user", "content": "what is in this picture?"}]
    text = client.template(messages, model="demo")
    assert "what is in this picture?" in text and text != messages[0]["content"]
    assert client.count(messages, model="demo") > client.count(
        "what is in this picture?", model="demo"
    )


def test_texts_become_vectors_of_length_one(bus: Bus) -> None:
    client = bus.client()
    found = client.embed(["a red circle", "a blue square", "a red circle"], model="demo")
    first, second, third = found.vectors
    assert len(first) == found.dimensions == 128
    assert math.hypot(*first) == pytest.approx(1.0, abs=1e-3)
    assert first == pytest.approx(third, abs=1e-5) and first != pytest.approx(second, abs=1e-3)


def test_the_models_details_are_known_to_the_bus(bus: Bus) -> None:
    rows = {row["name"]: row for row in bus.client().models()}
    assert set(rows) == {"demo", "odd"}
    assert rows["demo"]["context_tokens"] == 2048 and rows["demo"]["images"] is True
    assert rows["demo"]["details"]["architecture"] == "LlavaForConditionalGeneration"
    assert rows["demo"]["details"]["scheduler"] == "slots"


def test_the_bus_knows_the_engine_the_device_and_the_dtype_that_auto_chose(bus: Bus) -> None:
    (row,) = bus.rows()
    assert row["engine"] == "transformers"
    assert row["numbers"] == {"demo": "float32", "odd": "float32"}
    assert '"numbers": "float32"' in bus.logs()
    assert row["device"] not in ("", "auto")


def test_an_adapter_is_served_under_its_own_name_beside_its_base(bus: Bus) -> None:
    client = bus.client()
    image, question, answer = example()
    data = io.BytesIO()
    image.save(data, "PNG")
    image_bytes = data.getvalue()
    streams = [
        client.chat(name, question, images=[image_bytes], temperature=0, max_tokens=16, stream=True)
        for name in ("demo", "odd", "demo")
    ]
    base, odd, again = ("".join(stream.text) for stream in streams)
    assert base == again and answer in base
    assert odd != base


def test_the_worker_logs_its_own_lines_and_nothing_of_its_libraries(bus: Bus) -> None:
    records = [json.loads(line) for line in bus.workers["demo"].log().splitlines()]
    assert {record["level"] for record in records} == {"info"}


def test_the_demo_model_is_greedy_unless_asked_otherwise(bus: Bus) -> None:
    client = bus.client()
    question = "How many words are there: red blue green"
    answers = {client.chat("demo", question, seed=seed).text for seed in range(4)}
    assert answers == {client.chat("demo", question, temperature=0).text}
