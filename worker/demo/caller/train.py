"""Train the tool caller (`build`) from scratch, on tasks (`tasks`) that are each used once.

Must never use the held-out tasks: all randomness here comes from generators seeded with text, while
`held_out` takes integers.
"""

import argparse
import math
import random
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional

from worker.demo.caller.build import END, PAD, build_model, build_tokenizer
from worker.demo.caller.evaluate import count_right, report
from worker.demo.caller.tasks import held_out, make_task
from worker.demo.caller.turns import answer_text, prompt_text
from worker.demo.train import make_optimizers, schedule, shaken

__all__ = ["main"]

QUIET_SHARE = 0.25
"""Share of tasks that are answered without thinking."""


def make_example(tokenizer: Any, rng: random.Random) -> tuple[list[int], int]:
    """Token ids of a prompt and its answer, and how many of them are the prompt's."""
    task, thinking = make_task(rng), rng.random() >= QUIET_SHARE
    prompt = tokenizer(prompt_text(tokenizer, task, thinking=thinking), add_special_tokens=False)
    answer = tokenizer(answer_text(task, thinking=thinking), add_special_tokens=False)
    return [*prompt.input_ids, *answer.input_ids, END], len(prompt.input_ids)


def batch_loss(model: Any, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean loss over the tokens of the answers, padded on the right."""
    length = -(-max(len(ids) for ids, _ in batch) // 32) * 32
    ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids, _ in batch])
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, prompt) in enumerate(batch):
        wanted[row, prompt : len(tokens)] = True
    # No attention mask: attention is causal, so only padding attends to padding on the right.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    rows, columns = wanted.nonzero().unbind(1)
    logits = model.lm_head(hidden[rows, columns - 1])
    return functional.cross_entropy(logits.float(), ids[rows, columns])


def train(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Take the given number of steps."""
    rng = random.Random(f"tasks {options.seed}")
    optimizers = make_optimizers([model], 0.05)
    parameters = list(model.parameters())
    recent: deque[float] = deque(maxlen=50)
    started, step, next_report_s = time.monotonic(), 0, 30.0
    while (done := step / options.steps) < 1:
        batch = sorted(
            (make_example(tokenizer, rng) for _ in range(options.batch)),
            key=lambda example: len(example[0]),
        )
        with shaken(model, options.shake):
            # The longest get their own batch: padding the rest to their length would cost half as
            # much again.
            for part in (batch[: options.batch * 3 // 4], batch[options.batch * 3 // 4 :]):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = batch_loss(model, part) * (len(part) / options.batch)
                torch.autograd.backward(loss)
                recent.append(loss.item() * options.batch / len(part))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = schedule(options.rate, done, step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed_s = time.monotonic() - started
        if elapsed_s > next_report_s:
            next_report_s += 30
            mean = sum(recent) / len(recent) if recent else math.nan
            print(f"{elapsed_s:.0f} s, step {step}, loss {mean:.4f}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `python -m worker.demo.caller.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo.caller.train",
        description="Train the tiny model that thinks and calls tools, save it and measure it.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to save it")
    parser.add_argument("--steps", type=int, default=2500, metavar="N", help="default: 2500")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="tasks per step [64]")
    parser.add_argument("--rate", type=float, default=3e-3, help="top learning rate [3e-3]")
    parser.add_argument(
        "--shake", type=float, default=0.0, metavar="S", help="noise on the weights [0]"
    )
    parser.add_argument("--init", type=Path, metavar="DIR", help="continue with a saved model")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tasks [0]")
    parser.add_argument("--cases", type=int, default=500, help="held-out tasks at the end [500]")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model: Any = build_model()
    if options.init:
        model = transformers.AutoModelForCausalLM.from_pretrained(options.init, dtype="float32")
    print(f"{sum(part.numel() for part in model.parameters()):,} parameters", flush=True)
    # torch's fused attention has a slow backward pass on a CPU.
    model.set_attn_implementation("eager")
    if options.compile:
        model.model.compile(dynamic=True)
    model.train()
    train(model, tokenizer, options)
    model.eval().to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=END, pad_token_id=PAD, do_sample=False, max_new_tokens=512
    )
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(report(count_right(options.out, held_out(options.cases, seed=1))))


if __name__ == "__main__":
    main()
