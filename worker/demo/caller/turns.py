"""A task's prompt and answer as the text that the tool caller reads and writes."""

from __future__ import annotations

import json
from typing import Any

from worker.demo.caller.tasks import Task

__all__ = ["answer_text", "prompt_text"]


def prompt_text(tokenizer: Any, task: Task, *, thinking: bool) -> str:
    """The prompt, through the chat template."""
    text: str = tokenizer.apply_chat_template(
        task.messages,
        tools=task.tools or None,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=thinking,
    )
    return text


def answer_text(task: Task, *, thinking: bool) -> str:
    """The turn after the prompt. Without thinking, the prompt already has an empty thought."""
    calls = (
        f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        for name, arguments in task.calls
    )
    said = task.text or "\n".join(calls)
    return f"<think>\n{task.thought}\n</think>\n\n{said}" if thinking else said
