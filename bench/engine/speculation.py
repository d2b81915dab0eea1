"""Speculative decoding, which verifies several draft tokens at a time, beside one token at a time.

The weights are random, so answers are prescribed token by token (`forced_token_ids`); the engine
computes and samples as always, and drafts are right or wrong as with a model that gives these
answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from bench.common import interleave, repeats
from bench.engine.cases import KV_TOKENS, Setting, build_engine, paired, run_jobs, token_job
from worker.engines.base import Job

PROMPT_TOKENS = 400
EDIT_EVERY = 24
"""On average, one token in this many of a copy differs from the prompt."""
COMMON_WORDS = 60
"""Words of a text without copies: so few, and the first ones so frequent, that three in a row often
recur by chance."""


def speculation(setting: Setting) -> None:
    """Tokens/s with and without drafts, for answers that copy their prompt or do not."""
    arguments, report = setting.arguments, setting.report
    new = arguments.new or (64 if arguments.quick else 128)
    cases = [("copy", 1), ("chance", 1), ("nothing", 1), ("copy", 8), ("chance", 8)]
    engines = {
        name: build_engine(
            setting.model,
            setting.tokenizer,
            8,
            kv_tokens=KV_TOKENS,
            # Prompts are computed only in the first run, so that answers alone are compared.
            prefix_tokens=20_000,
            speculate=speculate,
        )
        for name, speculate in (("tokenbus", "auto"), ("off", "off"))
    }
    for text, streams in cases:

        def run(name: str, text: str = text, streams: int = streams) -> dict[str, float]:
            return run_jobs(engines[name], [_job(setting, text, new, n) for n in range(streams)])

        runs: dict[str, Callable[[], dict[str, float]]] = {
            name: lambda name=name: run(name)  # type: ignore[misc]
            for name in engines
        }
        for one in runs.values():
            one()
        before = engines["tokenbus"].metrics()
        seen = interleave(runs, max(5, repeats(arguments)))
        after = engines["tokenbus"].metrics()
        drafted = after["draft_tokens"] - before["draft_tokens"]
        accepted = after["accepted_tokens"] - before["accepted_tokens"]
        for figure in ("tokens_per_s", "tokens_per_cpu_s"):
            own, peer = seen["tokenbus"][figure], seen["off"][figure]
            report.add(
                f"engine_speculation_{figure}",
                own,
                figure.replace("_per_", "/").replace("_", " "),
                peer="off",
                against=paired(own, peer),
                text=text,
                streams=streams,
                model=setting.size,
                accepted=round(accepted / drafted, 2) if drafted else None,
            )
    for engine in engines.values():
        engine.close()


def _job(setting: Setting, text: str, new: int, seed: int) -> Job:
    choose = random.Random(seed)
    vocabulary = setting.shape.vocabulary
    prompt = [choose.randrange(300, vocabulary) for _ in range(PROMPT_TOKENS)]
    if text == "copy":
        begin = choose.randrange(PROMPT_TOKENS - new) if new < PROMPT_TOKENS else 0
        answer = (prompt[begin:] + prompt)[:new]
        for place in range(new):
            if choose.randrange(EDIT_EVERY) == 0:
                answer[place] = choose.randrange(300, vocabulary)
    elif text == "chance":
        words = [300 + rank for rank in range(COMMON_WORDS)]
        weights = [1 / (rank + 1) for rank in range(COMMON_WORDS)]
        prompt = choose.choices(words, weights, k=PROMPT_TOKENS)
        answer = choose.choices(words, weights, k=new)
    else:
        answer = [choose.randrange(300, vocabulary) for _ in range(new)]
    return token_job(prompt, new, forced_token_ids=answer)
