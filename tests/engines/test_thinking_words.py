"""Whether and how hard a model thinks: what clients say, in the variables of each template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jinja2 import Environment

from broker.protocol.messages import Kind, Message, Params, Request, new_id
from tests.engines import tiny
from worker.engines.base import Job
from worker.engines.common.thinking_words import Asked, ThinkingWords, find_words

#: By family: the end of a template as the family writes it, and what is found in it.
TEMPLATES: dict[str, tuple[str, ThinkingWords]] = {
    "qwen3": (
        "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}",
        ThinkingWords(switch="enable_thinking"),
    ),
    "deepseek-v3.1": (
        "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
        "{% if thinking %}<think>{% else %}</think>{% endif %}",
        ThinkingWords(switch="thinking"),
    ),
    "command-a-reasoning": (
        "{% if reasoning is defined and not reasoning %}<|START_THINKING|><|END_THINKING|>"
        "{% endif %}",
        ThinkingWords(switch="reasoning"),
    ),
    "seed-oss": (
        "{% if thinking_budget is defined and thinking_budget == 0 %}none"
        "{% else %}<seed:think>{% endif %}",
        ThinkingWords(budget="thinking_budget"),
    ),
    "gpt-oss": (
        '{% if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif %}'
        "Reasoning: {{ reasoning_effort }}",
        ThinkingWords(efforts=("low", "medium", "high")),
    ),
    "mistral-small-4": (
        "{% set effort = reasoning_effort if reasoning_effort is defined else 'none' %}"
        "{% if effort not in ['none', 'high'] %}{{ raise_exception('none or high') }}{% endif %}"
        "[MODEL_SETTINGS]{{ effort }}[/MODEL_SETTINGS]",
        ThinkingWords(efforts=("none", "high")),
    ),
    "deepseek-r1": ("{{ '<think>\n' }}", ThinkingWords()),
    # It sets a variable of that name, and reads none.
    "llama": ("{% set thinking = 1 %}{{ thinking }}", ThinkingWords()),
}


def words_of(source: str) -> ThinkingWords:
    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = Environment()
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(source)

    def render(variables: dict[str, Any]) -> str | None:
        try:
            return template.render(**variables)
        except ValueError:
            return None

    return find_words(source, render)


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_template_reads_is_found_by_trying(family: str) -> None:
    source, expected = TEMPLATES[family]
    found = words_of(source)
    assert (found.switch, found.budget, found.efforts) == (
        expected.switch,
        expected.budget,
        expected.efforts,
    )


OFF: list[dict[str, Any]] = [
    {"enable_thinking": False},
    {"thinking": False},
    {"reasoning_effort": "none"},
]
ON: list[dict[str, Any]] = [
    {"enable_thinking": True},
    {"thinking": True},
    {"reasoning_effort": "high"},
]


@pytest.mark.parametrize(
    ("family", "off", "on"),
    [
        ("qwen3", Asked({"enable_thinking": False}), {"enable_thinking": True}),
        ("deepseek-v3.1", Asked({"thinking": False}), {"thinking": True}),
        ("command-a-reasoning", Asked({"reasoning": False}), {"reasoning": True}),
        ("seed-oss", Asked({"thinking_budget": 0}), {}),
        ("gpt-oss", Asked({}, silent=True), {}),
        ("mistral-small-4", Asked({"reasoning_effort": "none"}), {"reasoning_effort": "high"}),
        ("deepseek-r1", Asked({}, silent=True), {}),
    ],
)
def test_every_way_to_say_it_becomes_the_templates_own(
    family: str, off: Asked, on: dict[str, Any]
) -> None:
    words = words_of(TEMPLATES[family][0])
    for given in OFF:
        assert words.asked(given) == off, given
    for given in ON:
        effort = (
            {"reasoning_effort": "high"} if family == "gpt-oss" and len(on) < len(given) else {}
        )
        wanted = on | (effort if "reasoning_effort" in given else {})
        assert words.asked(given) == Asked(wanted), given


@pytest.mark.parametrize(
    ("family", "effort", "said"),
    [
        *[("gpt-oss", effort, effort) for effort in ("low", "medium", "high")],
        *[("gpt-oss", "minimal", "low"), ("gpt-oss", "xhigh", "high"), ("gpt-oss", "max", "high")],
        *[("mistral-small-4", effort, "high") for effort in ("minimal", "low", "medium", "max")],
    ],
)
def test_an_effort_becomes_the_nearest_that_the_template_knows(
    family: str, effort: str, said: str
) -> None:
    asked = words_of(TEMPLATES[family][0]).asked({"reasoning_effort": effort, "other": 1})
    assert asked == Asked({"reasoning_effort": said, "other": 1})


@pytest.mark.parametrize(
    ("given", "cause"),
    [
        ({"enable_thinking": True, "thinking": False}, "contradict"),
        ({"enable_thinking": False, "reasoning_effort": "high"}, "contradict"),
        ({"reasoning_effort": "hard"}, "'hard': choose one of none, minimal, low"),
        ({"reasoning_effort": 3}, "3: choose one of"),
    ],
)
def test_what_contradicts_itself_or_is_not_known_is_refused(
    given: dict[str, Any], cause: str
) -> None:
    with pytest.raises(ValueError, match=cause):
        words_of(TEMPLATES["qwen3"][0]).asked(given)


def test_a_word_of_the_templates_own_reaches_it() -> None:
    words = words_of("{% if reasoning_effort == 'hard' %}!{% endif %}")
    assert words.asked({"reasoning_effort": "hard"}) == Asked({"reasoning_effort": "hard"})


# --- through the engine ---------------------------------------------------------------------------

OPENS = tiny.CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
SWITCHED = (
    tiny.CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<think>' if enable_thinking | "
    "default(true) else '<think></think>' }}{% endif %}"
)
LAST = (
    "{% for m in messages %}{{ '<|' ~ m.role ~ '|>' }}"
    "{% if m.reasoning_content %}{{ '<think>' ~ m.reasoning_content ~ '</think>' }}{% endif %}"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def job(kind: Kind, *messages: Message, **body: Any) -> Job:
    said = list(messages) or [Message(role="user", content="q")]
    params = Params(max_tokens=12, temperature=0.0, ignore_eos=True, pieces=["reasoning"])
    return Job(
        new_id(),
        Request(model="tiny", kind=kind, messages=said, params=params, window=1 << 20, **body),
    )


@pytest.fixture
def serve() -> Any:
    engines = []

    def start(template: str) -> Any:
        tokenizer = copy.deepcopy(tiny.tokenizer())
        tokenizer.chat_template = template
        tokenizer.add_tokens(["<think>", "</think>"])
        engines.append(tiny.serve(tiny.llama(vocabulary=len(tokenizer)), own_tokenizer=tokenizer))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def shown(engine: Any, *messages: Message, **body: Any) -> str:
    [answer] = tiny.run(engine, [job(Kind.TEMPLATE, *messages, **body)])
    assert answer.ended is not None and answer.ended.result is not None, answer.failed
    return str(answer.ended.result["text"])


def thought(engine: Any, **body: Any) -> int:
    [answer] = tiny.run(engine, [job(Kind.CHAT, **body)])
    assert answer.ended is not None, answer.failed
    return answer.ended.usage.reasoning_tokens


def test_a_model_without_a_switch_does_not_think_where_no_reasoning_is_wanted(serve: Any) -> None:
    engine = serve(OPENS)
    assert thought(engine) == 12
    for given in OFF:
        # The closing marks alone.
        assert 0 < thought(engine, template_args=given) < 5
        assert shown(engine, template_args=given).endswith("<think>")
    assert thought(engine, template_args={"reasoning_effort": "high"}) == 12


def test_a_model_with_a_switch_is_switched_by_its_prompt(serve: Any) -> None:
    engine = serve(SWITCHED)
    for given in OFF:
        assert shown(engine, template_args=given).endswith("<think></think>")
        assert thought(engine, template_args=given) == 0
    for given in ON:
        assert shown(engine, template_args=given).endswith("<think>")


def test_an_answer_goes_on_with_a_given_thought(serve: Any) -> None:
    engine = serve(LAST)
    last = Message(role="assistant", reasoning_content="I was think")
    body: dict[str, Any] = {"template_args": {"continue_final_message": True}}
    said = [Message(role="user", content="q"), last]
    assert shown(engine, *said, **body).endswith("<think>I was think")
    [answer] = tiny.run(engine, [job(Kind.CHAT, *said, **body)])
    assert answer.ended is not None and answer.ended.usage.reasoning_tokens == 12
    # If words follow the reasoning, the answer goes on from those.
    spoken = Message(role="assistant", reasoning_content="hm", content="So the ans")
    assert shown(engine, said[0], spoken, **body).endswith("<think>hm</think>So the ans")
    [answer] = tiny.run(engine, [job(Kind.CHAT, said[0], spoken, **body)])
    assert answer.ended is not None and answer.ended.usage.reasoning_tokens == 0
