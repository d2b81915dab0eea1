"""Chat templates for models without one: FastChat's conversations by name, and files."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from broker.protocol.messages import Kind, Message, Request, new_id
from tests.engines import tiny
from worker.config import ConfigError, parse
from worker.conversations import NAMED_TEMPLATES
from worker.engines.base import EngineLoadError, Job

TALK = [("user", "hi"), ("assistant", "yes"), ("user", "go")]
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. "
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)

#: What FastChat's `get_prompt` makes of a conversation, without and with a system message.
# fmt: off
PROMPTS = {
    "vicuna_v1.1": (
        f"{VICUNA}USER: hi ASSISTANT: yes</s>USER: go ASSISTANT:",
        "be kind USER: hi ASSISTANT: yes</s>USER: go ASSISTANT:",
    ),
    "alpaca": (
        f"{ALPACA}### Instruction: hi\n\n### Response: yes</s>"
        "### Instruction: go\n\n### Response:",
        "be kind\n\n### Instruction: hi\n\n### Response: yes</s>"
        "### Instruction: go\n\n### Response:",
    ),
    "llama-2": (
        "[INST] hi [/INST] yes </s><s>[INST] go [/INST]",
        "[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST] yes </s><s>[INST] go [/INST]",
    ),
    "mistral": (
        "[INST] hi [/INST] yes</s>[INST] go [/INST]",
        "[INST] be kind\nhi [/INST] yes</s>[INST] go [/INST]",
    ),
    "zephyr": (
        "<|user|>\nhi</s>\n<|assistant|>\nyes</s>\n<|user|>\ngo</s>\n<|assistant|>\n",
        "<|system|>\nbe kind</s>\n"
        "<|user|>\nhi</s>\n<|assistant|>\nyes</s>\n<|user|>\ngo</s>\n<|assistant|>\n",
    ),
}
# fmt: on


def rendered(template: str, talk: list[tuple[str, str]]) -> str:
    messages = [{"role": role, "content": text} for role, text in talk]
    texts, _ = render_jinja_template(
        [messages],
        chat_template=template,
        bos_token="<s>",
        eos_token="</s>",
        add_generation_prompt=True,
    )
    return str(texts[0])


@pytest.mark.parametrize(("name", "prompts"), PROMPTS.items(), ids=PROMPTS)
def test_a_named_template_makes_fastchats_prompt(name: str, prompts: tuple[str, str]) -> None:
    template = NAMED_TEMPLATES[name]
    assert rendered(template, TALK) == prompts[0]
    assert rendered(template, [("system", "be kind"), *TALK]) == prompts[1]


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("chatml", "<|im_start|>{}\n", "<|im_end|>\n"),
        ("llama-3", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    ],
)
def test_a_named_template_of_marks_marks_every_turn(name: str, begin: str, end: str) -> None:
    talk = [("system", "be kind"), *TALK]
    turns = "".join(begin.format(role) + text + end for role, text in talk)
    prompt = rendered(NAMED_TEMPLATES[name], talk)
    assert prompt.removeprefix("<s>") == turns + begin.format("assistant")
    assert prompt.startswith("<s>") == (name == "llama-3")


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_a_role_that_a_named_template_would_drop_is_refused(name: str) -> None:
    with pytest.raises(Exception, match="knows system, user and assistant"):
        rendered(NAMED_TEMPLATES[name], [*TALK, ("tool", "3")])


# --- the worker's option --------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--chat-template", "--conv-template"])
def test_the_option_takes_a_name_or_a_file(flag: str, tmp_path: Path) -> None:
    assert parse([flag, "vicuna_v1.1"], {}).engine.chat_template == NAMED_TEMPLATES["vicuna_v1.1"]
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}")
    assert parse([flag, str(file)], {}).engine.chat_template == "{{ messages[0].content }}"
    assert parse([], {}).engine.chat_template == ""


def test_the_error_for_a_wrong_name_lists_the_known_ones(tmp_path: Path) -> None:
    for wrong in ("vicuna_v9", str(tmp_path / "none.jinja")):
        with pytest.raises(ConfigError, match=r"vicuna_v1\.1") as caught:
            parse(["--chat-template", wrong], {})
        assert wrong in str(caught.value)
    (tmp_path / "empty").write_text("\n")
    for odd in (tmp_path / "empty", tmp_path):
        with pytest.raises(ConfigError, match=r"is empty|cannot be read"):
            parse(["--chat-template", str(odd)], {})


def bare(folder: Path) -> Path:
    """A model without a chat template."""
    tiny.llama().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    return folder


def test_a_model_without_a_template_chats_with_the_one_that_is_given(tmp_path: Path) -> None:
    folder = bare(tmp_path / "bare")
    ask = Request(
        model="bare", kind=Kind.TEMPLATE, messages=[Message(role="user", content="hi")], window=1
    )
    engine = tiny.load(folder, chat_template=NAMED_TEMPLATES["vicuna_v1.1"])
    try:
        answer = tiny.run(engine, [Job(new_id(), ask)])[0]
        assert answer.ended is not None and answer.ended.result is not None
        assert answer.ended.result["text"] == f"{VICUNA}USER: hi ASSISTANT:"
    finally:
        engine.close()
    engine = tiny.load(folder)
    try:
        failed = tiny.run(engine, [Job(new_id(), ask)])[0].failed
        assert failed is not None and "--chat-template" in failed.message
        assert "/v1/completions" in failed.message and "--raw" in failed.message
    finally:
        engine.close()


def test_a_template_that_is_not_jinja_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match="--chat-template: line 2"):
        tiny.load(bare(tmp_path / "bare"), chat_template="\n{% for %}")
