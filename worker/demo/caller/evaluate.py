"""Measure the tool caller on tasks that it was not trained on: exact answers, greedy."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when transformers is first imported, so it must be set before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from worker.demo.caller import model_path
from worker.demo.caller.tasks import KINDS, Task, held_out
from worker.demo.caller.turns import answer_text, prompt_text

__all__ = ["count_right", "main", "report"]

hf: Any = transformers

BATCH = 32


@torch.inference_mode()
def count_right(folder: Path, tasks: Sequence[Task]) -> dict[str, tuple[int, int]]:
    """By kind: how many answers are exactly right, thoughts included, and how many there are."""
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    right: Counter[str] = Counter()
    for start in range(0, len(tasks), BATCH):
        some = tasks[start : start + BATCH]
        inputs = tokenizer(
            [prompt_text(tokenizer, task, thinking=True) for task in some],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        whole = model.generate(**inputs, max_new_tokens=160, do_sample=False)
        answers = whole[:, inputs.input_ids.shape[1] :]
        for task, ids in zip(some, answers, strict=True):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            right[task.kind] += text == answer_text(task, thinking=True)
    counts = Counter(task.kind for task in tasks)
    return {kind: (right[kind], counts[kind]) for kind in KINDS if counts[kind]}


def report(right: dict[str, tuple[int, int]]) -> str:
    """A table for the README."""
    lines = ["| Kind | Cases | right |", "| --- | ---: | ---: |"]
    lines += [f"| {kind} | {count} | {good} |" for kind, (good, count) in right.items()]
    good, count = (sum(column) for column in zip(*right.values(), strict=True))
    return "\n".join([*lines, f"| **all** | **{count}** | **{good}** |"])


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `python -m worker.demo.caller.evaluate`."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo.caller.evaluate", description=__doc__
    )
    parser.add_argument("--model", type=Path, default=model_path(), help="[the bundled one]")
    parser.add_argument("--cases", type=int, default=500, help="[500]")
    parser.add_argument("--seed", type=int, default=2, help="[2]")
    options = parser.parse_args(arguments)
    print(report(count_right(options.model, held_out(options.cases, options.seed))))


if __name__ == "__main__":
    main()
