"""Chat templates for models without one: a Jinja file, or one of FastChat's by name.

The named templates render FastChat's conversations of these names, as models were trained on them.
Needs only the standard library, so that a wrong name is reported before a model is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

__all__ = ["NAMED_TEMPLATES", "read_template"]

_OTHERS: Final = "{{ raise_exception('this chat template knows system, user and assistant') }}"


def _conversation(system: str, user: str, assistant: str, opening: str, start: str = "") -> str:
    """A template of turns; `opening` begins an answer. Each turn is rendered by an expression."""
    return (
        f"{start}{{% for m in messages %}}"
        f"{{% if m.role == 'system' %}}{system}"
        f"{{% elif m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'assistant' %}}{assistant}"
        f"{{% else %}}{_OTHERS}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


def _introduced(introduction: str, separator: str) -> str:
    """The text at the start if there is no system message."""
    text = repr(introduction + separator)
    return f"{{% if messages[0].role != 'system' %}}{{{{ {text} }}}}{{% endif %}}"


def _bracketed(system: str, end: str) -> str:
    """Llama 2's brackets; the system message is inside those of the first turn."""
    return _conversation(
        system,
        "{{ '' if not loop.first and loop.previtem.role == 'system' else '[INST] ' }}"
        "{{ m.content + ' ' }}",
        f"{{{{ '[/INST] ' + m.content + {end} }}}}",
        "{{ '[/INST]' }}",
    )


def _chatml(begin: str, end: str) -> str:
    turn = f"{{{{ {begin} + m.content + {end} + '\\n' }}}}"
    opening = begin.replace("m.role", "'assistant'")
    return _conversation(turn, turn, turn, f"{{{{ {opening} }}}}")


_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
_LLAMA3_BEGIN = "'<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
_LLAMA3_TURN = f"{{{{ {_LLAMA3_BEGIN} + m.content | trim + '<|eot_id|>' }}}}"

NAMED_TEMPLATES: Final = {
    "alpaca": _conversation(
        "{{ m.content + '\\n\\n' }}",
        "{{ '### Instruction: ' + m.content + '\\n\\n' }}",
        "{{ '### Response: ' + m.content + eos_token }}",
        "{{ '### Response:' }}",
        _introduced(_ALPACA, "\n\n"),
    ),
    "chatml": _chatml("'<|im_start|>' + m.role + '\\n'", "'<|im_end|>'"),
    "llama-2": _bracketed(
        "{{ '[INST] <<SYS>>\\n' + m.content + '\\n<</SYS>>\\n\\n' }}",
        "' ' + eos_token + bos_token",
    ),
    "llama-3": _conversation(
        _LLAMA3_TURN,
        _LLAMA3_TURN,
        _LLAMA3_TURN,
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        "{{ bos_token }}",
    ),
    "mistral": _bracketed("{{ '[INST] ' + m.content + '\\n' }}", "eos_token"),
    "vicuna_v1.1": _conversation(
        "{{ m.content + ' ' }}",
        "{{ 'USER: ' + m.content + ' ' }}",
        "{{ 'ASSISTANT: ' + m.content + eos_token }}",
        "{{ 'ASSISTANT:' }}",
        _introduced(_VICUNA, " "),
    ),
    "zephyr": _chatml("'<|' + m.role + '|>\\n'", "eos_token"),
}
"""Jinja sources by FastChat's names; "chatml" is the style of many other models."""


def read_template(given: str) -> str:
    """The Jinja source for a file or a name. Raises ValueError, which lists the valid names."""
    if given in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[given]
    known = ", ".join(NAMED_TEMPLATES)
    try:
        source = Path(given).expanduser().read_text()
    except FileNotFoundError:
        raise ValueError(
            f"there is neither a file nor a chat template {given}: give a Jinja file, or one of "
            f"{known}"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"the chat template {given} cannot be read: {error}") from None
    if not source.strip():
        raise ValueError(f"the chat template {given} is empty")
    return source
