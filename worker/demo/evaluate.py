"""Measure the demo model: exact answers on held-out images, by kind of question.

It takes the same path as any user of the model (image, AutoProcessor, greedy generate), so that a
figure it prints is what a user gets. Must never touch the network or use the training code.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when transformers is first imported, so it must be set before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from PIL import Image

from worker.demo import model_path
from worker.demo.pictures import KINDS, held_out

__all__ = ["FORMATS", "Tally", "count_right", "load", "main", "report"]

# Only half of its classes are typed; as Any, the calls below need no `type: ignore`.
hf: Any = transformers

# Number formats of the weights while measuring; the last two need bitsandbytes.
FORMATS = ("float32", "bfloat16", "int8", "nf4")
# The longest answer in the training data has fewer than 100 tokens.
LONGEST_ANSWER_TOKENS = 128
BATCH_SIZE = 32


@dataclass(slots=True)
class Tally:
    """Right answers among all answers of one kind, and the wrong ones."""

    right: int = 0
    total: int = 0
    wrong: list[str] | None = None


# The model's inputs, the question, the answer and the kind.
_Prepared = tuple[Mapping[str, Any], str, str, str]


def load(path: Path, weights: str = "float32") -> tuple[Any, Any]:
    """Load (model, processor) from a folder, offline; `weights` is one of `FORMATS`."""
    options: dict[str, Any] = {"dtype": torch.float32}
    if weights == "bfloat16":
        options = {"dtype": torch.bfloat16}
    elif weights == "int8":
        options["quantization_config"] = hf.BitsAndBytesConfig(load_in_8bit=True)
    elif weights == "nf4":
        options["quantization_config"] = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = hf.AutoModelForImageTextToText.from_pretrained(path, **options)
    return model.eval(), hf.AutoProcessor.from_pretrained(path)


def count_right(
    model: Any,
    processor: Any,
    cases: Iterable[tuple[list[Image.Image], str, str, str]],
) -> dict[str, Tally]:
    """Answer every case greedily; return a tally for each kind that occurred.

    Cases are batched with others of the same prompt length, so that no padding is needed.
    """
    batches: dict[tuple[int, int], list[_Prepared]] = defaultdict(list)
    for images, question, answer, kind in cases:
        parts: list[dict[str, str]] = [{"type": "image"} for _ in images]
        parts.append({"type": "text", "text": question})
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=prompt, images=images or None, return_tensors="pt")
        key = (inputs["input_ids"].shape[1], len(images))
        batches[key].append((inputs, question, answer, kind))
    tallies: dict[str, Tally] = {}
    for (prompt_length, _), batch in batches.items():
        for start in range(0, len(batch), BATCH_SIZE):
            chunk = batch[start : start + BATCH_SIZE]
            joined = {
                name: torch.cat([inputs[name] for inputs, *_ in chunk])
                for name in ("input_ids", "attention_mask", "pixel_values")
                if name in chunk[0][0]
            }
            if "pixel_values" in joined:
                joined["pixel_values"] = joined["pixel_values"].to(model.dtype)
            with torch.inference_mode():
                output = model.generate(
                    **joined, do_sample=False, max_new_tokens=LONGEST_ANSWER_TOKENS
                )
            said = processor.batch_decode(output[:, prompt_length:], skip_special_tokens=True)
            for (_, question, answer, kind), text_said in zip(chunk, said, strict=True):
                tally = tallies.setdefault(kind, Tally(wrong=[]))
                tally.total += 1
                if text_said == answer:
                    tally.right += 1
                elif tally.wrong is not None:
                    tally.wrong.append(f"{question} -> {text_said!r}, expected {answer!r}")
    return tallies


def report(tallies: Mapping[str, Tally], *, show_wrong: int = 0) -> str:
    """Format the tallies as text, one kind per line and the total last."""
    lines = []
    for kind in KINDS:
        if kind in tallies:
            tally = tallies[kind]
            share = 100 * tally.right / tally.total
            lines.append(f"{kind:16} {tally.right:5d} of {tally.total:5d}  {share:5.1f} %")
            lines.extend(f"    {wrong}" for wrong in (tally.wrong or [])[:show_wrong])
    right = sum(tally.right for tally in tallies.values())
    total = sum(tally.total for tally in tallies.values())
    lines.append(f"{'all':16} {right:5d} of {total:5d}  {100 * right / max(1, total):5.1f} %")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `python -m worker.demo.evaluate`."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo.evaluate",
        description="Ask the demo model about images it has never seen and count exact answers.",
    )
    parser.add_argument(
        "--model", type=Path, default=model_path(), metavar="DIR", help="default: the bundled one"
    )
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument("--seed", type=int, default=1, help="seed of the held-out set; default: 1")
    parser.add_argument(
        "--weights",
        choices=FORMATS,
        default="float32",
        help="number format of the weights; default: float32",
    )
    parser.add_argument(
        "--show-wrong", type=int, default=0, metavar="N", help="print N wrong answers of each kind"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default: 2")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    model, processor = load(options.model, options.weights)
    started = time.perf_counter()
    cases = held_out(options.cases, options.seed)
    tallies = count_right(model, processor, cases)
    print(report(tallies, show_wrong=options.show_wrong))
    print(f"{options.weights}, seed {options.seed}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
