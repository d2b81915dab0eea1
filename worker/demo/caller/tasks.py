"""Conversations with tools: a question, the tools, and what to think, call and answer.

A task is a prompt (messages and tools in OpenAI's form) and the turn that follows. Tools, their
arguments and the wording of questions vary, and some names are made up, so that a model must read
the prompt and cannot recite. Needs only the standard library.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Task", "held_out", "make_task"]

CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Rome",
    "Madrid",
    "Lisbon",
    "Vienna",
    "Oslo",
    "Helsinki",
    "Warsaw",
    "Prague",
    "Athens",
    "Tokyo",
    "Osaka",
    "Seoul",
    "Beijing",
    "Delhi",
    "Mumbai",
    "Bangkok",
    "Hanoi",
    "Sydney",
    "Cairo",
    "Nairobi",
    "Lagos",
    "Accra",
    "Tunis",
    "Lima",
    "Quito",
    "Bogota",
    "Santiago",
    "Boston",
    "Chicago",
    "Denver",
    "Seattle",
    "Austin",
    "Toronto",
    "Montreal",
    "Vancouver",
    "Havana",
    "Dublin",
    "Zurich",
    "Geneva",
    "Munich",
    "Hamburg",
    "Lyon",
    "Milan",
    "Naples",
)
ROOMS = ("kitchen", "bedroom", "hall", "garage", "bathroom", "office", "cellar", "garden")
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
SYSTEMS = ("You are a helpful assistant.", "Use the tools.", "Answer briefly.")


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and the right turn of the assistant's after it."""

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thought: str
    #: The text of the answer; empty if it calls.
    text: str
    #: Names and arguments of the calls.
    calls: list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Tool:
    """One wording of a tool."""

    topic: str
    name: str
    arguments: tuple[str, ...]
    described: dict[str, Any]


_NAMES = {
    "weather": ("get_weather", "weather", "current_weather", "get_current_weather"),
    "time": ("get_time", "local_time", "time_in"),
    "add": ("add", "sum", "add_numbers", "calculate_sum"),
    "timer": ("set_timer", "start_timer", "timer"),
    "light": ("set_light", "switch_light", "light"),
    "flights": ("find_flights", "search_flights", "flights"),
}
_ARGUMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "weather": (("city", "location", "place"),),
    "time": (("city", "place", "location"),),
    "add": (("a", "x", "first"), ("b", "y", "second")),
    "timer": (("minutes", "duration", "length"),),
    "light": (("room", "place"), ("on", "state", "power")),
    "flights": (("origin", "start", "departure"), ("destination", "to", "arrival")),
}
_TYPES = {
    "weather": ("string",),
    "time": ("string",),
    "add": ("integer", "integer"),
    "timer": ("integer",),
    "light": ("string", "boolean"),
    "flights": ("string", "string"),
}
_DESCRIPTIONS = {
    "weather": ("The weather in a city.", "Get the current weather."),
    "time": ("The local time in a city.", "Get the time."),
    "add": ("Add two numbers.", "The sum of two numbers."),
    "timer": ("Set a timer.", "Start a timer, in minutes."),
    "light": ("Switch a light on or off.", "Set the light of a room."),
    "flights": ("Find flights.", "Search flights between cities."),
}


def _tool(rng: random.Random, topic: str) -> _Tool:
    name = rng.choice(_NAMES[topic])
    arguments = tuple(rng.choice(words) for words in _ARGUMENTS[topic])
    properties: dict[str, Any] = {}
    for argument, type_ in zip(arguments, _TYPES[topic], strict=True):
        properties[argument] = {"type": type_}
        if rng.random() < 0.3:
            properties[argument]["description"] = f"The {argument}."
    function: dict[str, Any] = {"name": name}
    if rng.random() < 0.8:
        function["description"] = rng.choice(_DESCRIPTIONS[topic])
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        parameters["required"] = list(arguments)
    if rng.random() < 0.2:
        parameters["additionalProperties"] = False
    function["parameters"] = parameters
    if rng.random() < 0.1:
        function["strict"] = True
    return _Tool(topic, name, arguments, {"type": "function", "function": function})


def _city(rng: random.Random) -> str:
    if rng.random() < 0.75:
        return rng.choice(CITIES)
    parts = ("ba", "ke", "lo", "mi", "nu", "ra", "si", "to", "ve", "zo", "dar", "fen", "gul", "pol")
    return "".join(rng.choice(parts) for _ in range(rng.randint(2, 3))).capitalize()


def _number(rng: random.Random) -> int:
    return rng.randrange(10) if rng.random() < 0.3 else rng.randrange(10, 100)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question that one tool can answer."""

    question: str
    about: str
    values: tuple[Any, ...]
    #: A result of the tool, and the answer that it leads to.
    result: dict[str, Any]
    answer: str


def _weather(rng: random.Random) -> _Asked:
    city, degrees, sky = _city(rng), rng.randrange(-9, 36), rng.choice(SKIES)
    question = rng.choice(
        (
            f"What is the weather in {city}?",
            f"What's the weather like in {city}?",
            f"How is the weather in {city} today?",
            f"Weather in {city}?",
            f"Tell me the weather in {city}.",
        )
    )
    result = {rng.choice(("temperature", "degrees")): degrees, "sky": sky}
    answer = f"It is {degrees} degrees and {sky} in {city}."
    return _Asked(question, f"the weather in {city}", (city,), result, answer)


def _time(rng: random.Random) -> _Asked:
    city, clock = _city(rng), f"{rng.randrange(24):02}:{rng.randrange(60):02}"
    question = rng.choice(
        (f"What time is it in {city}?", f"What is the time in {city}?", f"Time in {city}?")
    )
    return _Asked(
        question, f"the time in {city}", (city,), {"time": clock}, f"It is {clock} in {city}."
    )


def _add(rng: random.Random) -> _Asked:
    one, two = _number(rng), _number(rng)
    question = rng.choice(
        (f"What is {one} plus {two}?", f"Add {one} and {two}.", f"How much is {one} + {two}?")
    )
    answer = f"{one} plus {two} is {one + two}."
    return _Asked(question, f"{one} plus {two}", (one, two), {"sum": one + two}, answer)


def _timer(rng: random.Random) -> _Asked:
    minutes = rng.randrange(2, 100)
    question = rng.choice(
        (
            f"Set a timer for {minutes} minutes.",
            f"Start a timer of {minutes} minutes.",
            f"Timer, {minutes} minutes, please.",
        )
    )
    answer = f"The timer is set for {minutes} minutes."
    return _Asked(question, f"a timer of {minutes} minutes", (minutes,), {"ok": True}, answer)


def _light(rng: random.Random) -> _Asked:
    room, on = rng.choice(ROOMS), rng.random() < 0.5
    word = "on" if on else "off"
    question = rng.choice(
        (
            f"Switch the light in the {room} {word}.",
            f"Turn {word} the light in the {room}.",
            f"Light {word} in the {room}, please.",
        )
    )
    answer = f"The light in the {room} is {word}."
    return _Asked(question, f"the light in the {room}", (room, on), {"ok": True}, answer)


def _flights(rng: random.Random) -> _Asked:
    start, end, count = _city(rng), _city(rng), rng.randrange(1, 10)
    question = rng.choice(
        (
            f"Find flights from {start} to {end}.",
            f"Which flights go from {start} to {end}?",
            f"I want to fly from {start} to {end}.",
        )
    )
    answer = f"There are {count} flights from {start} to {end}."
    return _Asked(
        question, f"flights from {start} to {end}", (start, end), {"flights": count}, answer
    )


_TOPICS: dict[str, Callable[[random.Random], _Asked]] = {
    "weather": _weather,
    "time": _time,
    "add": _add,
    "timer": _timer,
    "light": _light,
    "flights": _flights,
}
_TALK = (
    (("Hello!", "Hi!", "Good morning!", "Hello"), "a greeting", "Hello! How can I help you?"),
    (("Thank you!", "Thanks!", "Thanks a lot."), "thanks", "You are welcome!"),
    (("Who are you?", "What are you?"), "me", "I am a tiny model that thinks and calls tools."),
    (("Bye!", "Goodbye!", "See you."), "a farewell", "Goodbye!"),
    (
        ("Tell me a story.", "Tell me a long story.", "Write a story."),
        "a story",
        "There was a small robot that lived in a garden. Each morning it counted the birds, and "
        "each evening it wrote their number on a stone. One day a bird asked why. The robot said: "
        "so that tomorrow I know whether one of you is missing. From then on the birds counted the "
        "robot too.",
    ),
)


def _tools(rng: random.Random, topics: list[str], *, without: str = "") -> list[_Tool]:
    """Tools of these topics and of random others, in random order."""
    others = [topic for topic in _TOPICS if topic not in topics and topic != without]
    chosen = topics + rng.sample(others, rng.choice((0, 0, 1, 1, 2, 3)))
    rng.shuffle(chosen)
    return [_tool(rng, topic) for topic in chosen]


def _call(tools: list[_Tool], topic: str, asked: _Asked) -> tuple[str, dict[str, Any]]:
    tool = next(tool for tool in tools if tool.topic == topic)
    return tool.name, dict(zip(tool.arguments, asked.values, strict=True))


def _one(rng: random.Random) -> Task:
    topic = rng.choice(list(_TOPICS))
    asked, tools = _TOPICS[topic](rng), _tools(rng, [topic])
    call = _call(tools, topic, asked)
    thought = f"The user asks for {asked.about}. I call {call[0]}."
    return _task("one call", asked.question, tools, thought, "", [call])


def _two(rng: random.Random) -> Task:
    topic = rng.choice(("weather", "time"))
    tools = _tools(rng, [topic])
    first, second = _city(rng), _city(rng)
    name, arguments = next((t.name, t.arguments) for t in tools if t.topic == topic)
    noun = "weather" if topic == "weather" else "time"
    question = rng.choice(
        (
            f"What is the {noun} in {first} and in {second}?",
            f"Compare the {noun} in {first} and {second}.",
        )
    )
    thought = f"The user asks for the {noun} in {first} and {second}. I call {name} twice."
    calls = [(name, {arguments[0]: city}) for city in (first, second)]
    return _task("two calls", question, tools, thought, "", calls)


def _without(rng: random.Random) -> Task:
    topic = rng.choice(list(_TOPICS))
    asked = _TOPICS[topic](rng)
    tools = _tools(rng, [], without=topic) if rng.random() < 0.7 else []
    thought = f"The user asks for {asked.about}. No tool does that."
    return _task("no tool", asked.question, tools, thought, "I have no tool for that.", [])


def _talk(rng: random.Random) -> Task:
    questions, about, answer = rng.choice(_TALK)
    tools = _tools(rng, []) if rng.random() < 0.6 else []
    return _task("talk", rng.choice(questions), tools, f"This is {about}.", answer, [])


def _result(rng: random.Random) -> Task:
    topic = rng.choice(list(_TOPICS))
    asked, tools = _TOPICS[topic](rng), _tools(rng, [topic])
    name, arguments = _call(tools, topic, asked)
    call_id = f"call_{rng.randrange(1 << 32):08x}"
    function = {"name": name, "arguments": arguments}
    more: list[dict[str, Any]] = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call_id, "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": call_id, "content": json.dumps(asked.result)},
    ]
    thought = f"{name} has answered."
    task = _task("result", asked.question, tools, thought, asked.answer, [])
    return Task(task.kind, task.messages + more, task.tools, task.thought, task.text, task.calls)


KINDS: dict[str, tuple[float, Callable[[random.Random], Task]]] = {
    "one call": (4.0, _one),
    "two calls": (1.5, _two),
    "no tool": (1.5, _without),
    "talk": (1.0, _talk),
    "result": (2.0, _result),
}
"""The relative frequency of each kind of task in training, and its maker."""


def _task(
    kind: str,
    question: str,
    tools: list[_Tool],
    thought: str,
    text: str,
    calls: list[tuple[str, dict[str, Any]]],
) -> Task:
    messages = [{"role": "user", "content": question}]
    return Task(kind, messages, [tool.described for tool in tools], thought, text, calls)


def make_task(rng: random.Random, kind: str | None = None) -> Task:
    """A random task, of one kind if given; some have a system message."""
    if kind is None:
        kind = rng.choices(list(KINDS), [weight for weight, _ in KINDS.values()])[0]
    task = KINDS[kind][1](rng)
    if rng.random() < 0.3:
        task.messages.insert(0, {"role": "system", "content": rng.choice(SYSTEMS)})
    return task


def held_out(count: int, seed: int) -> list[Task]:
    """Tasks that training never sees: its generators are seeded with text, this one with a
    number."""
    rng = random.Random(seed)
    return [make_task(rng) for _ in range(count)]
