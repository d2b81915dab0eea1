"""`lm-eval` by its own commands: loglikelihoods over `/v1/completions` (prompts as token ids, with
echo and log probabilities), generation over both APIs. The tokenizer is the demo model's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.judges.stage import Stage, environment, run
from worker.demo import model_path

PACKAGES = ("lm-eval[api]==0.4.13", "transformers==5.24.0", "jinja2")
SUMS = [(3, 4), (1, 2), (2, 6), (5, 3)]
#: Its chat template, for tasks that send a prompt.
PROMPT = "<|user|>What is {} plus {}?<|end|><|assistant|>"


def judge(stage: Stage) -> None:
    """Raises AssertionError where a figure is not what the model's answers make it."""
    python = environment("lm-eval", PACKAGES)
    tasks = stage.folder / "lm-eval"
    tasks.mkdir()
    said = [f"{a} plus {b} is {a + b}." for a, b in SUMS]
    wrong = [f"{a} plus {b} is {a + b + 1}." for a, b in SUMS]
    prompts = [PROMPT.format(a, b) for a, b in SUMS]
    asked = [f"What is {a} plus {b}?" for a, b in SUMS]
    chosen = [
        {"q": q, "choices": [w, r], "a": 1} for q, w, r in zip(prompts, wrong, said, strict=True)
    ]
    _task(
        tasks,
        "choice",
        chosen,
        output_type="multiple_choice",
        doc_to_text="{{q}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{a}}",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    _task(tasks, "rolling", [{"q": q} for q in asked], **_ROLLING)
    for name, questions in (("prompts", prompts), ("chats", asked)):
        rows = [{"q": q, "a": a} for q, a in zip(questions, said, strict=True)]
        _task(tasks, name, rows, **_GENERATION)
    completions = f"base_url={stage.url}/v1/completions,model=demo,tokenizer={model_path()}"
    whole = _figures(
        stage, python, "local-completions", completions, "choice,rolling,prompts", "--batch_size=4"
    )
    assert whole["choice"]["acc,none"] == 1.0, whole
    assert whole["prompts"]["exact_match,none"] == 1.0, whole
    assert 1 < whole["rolling"]["byte_perplexity,none"] < 100, whole
    chat = f"base_url={stage.url}/v1/chat/completions,model=demo"
    whole = _figures(
        stage, python, "local-chat-completions", chat, "chats", "--apply_chat_template"
    )
    assert whole["chats"]["exact_match,none"] == 1.0, whole


_GENERATION: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}
_ROLLING: dict[str, Any] = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{q}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}


def _task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    """A task of the harness: its questions and its description, which is JSON and thereby YAML."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **fields,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(told))


def _figures(
    stage: Stage, python: Path, kind: str, arguments: str, tasks: str, *options: str
) -> dict[str, Any]:
    """The results of a run, by task."""
    place = stage.folder / "lm-eval"
    output = place / f"{kind}-results"
    run(
        stage,
        *(python.parent / "lm_eval", "run", "--model", kind, "--model_args", arguments),
        *("--tasks", tasks, "--include_path", place, "--output_path", output, *options),
        HF_HOME=str(place / "cache"),
    )
    [report] = output.glob("**/results_*.json")
    results: dict[str, Any] = json.loads(report.read_text())["results"]
    return results
