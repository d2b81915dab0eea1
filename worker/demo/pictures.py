"""Images of coloured shapes, and questions about them that have exactly one right answer.

Turns a `random.Random` into images, questions and answers, the same ones for the same generator
state. Used for training, measuring and the example of `client demo`: must never import torch or
transformers, read a file or draw from global randomness.

A scene is a few items in the cells of a three by three grid. `ask` words one question of a given
kind about zero, one or several scenes; `render` draws a scene.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

__all__ = [
    "COLOURS",
    "FALLBACK_ANSWER",
    "IMAGE_COUNTS",
    "KINDS",
    "SHAPES",
    "Item",
    "Scene",
    "ask",
    "example",
    "held_out",
    "make_scene",
    "render",
]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (140, 60, 180),
    "orange": (245, 140, 30),
    "black": (30, 30, 30),
    "pink": (250, 150, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
GRID = 3
# Where a cell is, by row and column.
PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the center", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)
NUMBERS = ("no", "one", "two", "three", "four")
ORDINALS = ("first", "second", "third")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FALLBACK_ANSWER = "I am only a tiny demo model. Ask me about coloured shapes."
NO_PICTURE_ANSWER = "I see no picture here. Please send me one."

DESCRIBE_QUESTIONS = (
    "What is in this image?",
    "What is in the image?",
    "Describe the image.",
    "Describe this image.",
    "Describe this picture.",
    "What is in this picture?",
    "What do you see?",
    "What is shown here?",
    "What is this?",
)
EACH_QUESTIONS = (
    "What is in each image?",
    "Describe each image.",
    "Compare the images.",
    "What do the images show?",
    "What is in these images?",
)
# Small talk: ways to say it, and the answer.
CHAT: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello!", "Hi", "Hello", "Hey", "Hi there!", "Good morning!", "Hello, how are you?"),
        "Hello! Show me a picture of coloured shapes.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Which model are you?"),
        "I am the tokenbus demo model. I am tiny, but I can see coloured shapes.",
    ),
    (
        ("What can you do?", "Help", "How can you help me?", "What do you know?"),
        "I can describe pictures of coloured shapes, add small numbers, count, "
        "name the days of the week and tell a story.",
    ),
    (("Thank you!", "Thanks", "Thank you very much."), "You are welcome."),
    (("Bye", "Goodbye!", "See you later."), "Goodbye! Come back soon."),
    (
        ("Tell me a story.", "Tell me a short story.", "Write a story.", "Write a short story."),
        "Once upon a time a red circle met a blue square. They rolled down a green hill, "
        "sang a song to the yellow stars and became good friends. In the morning they woke up "
        "in the top left of a white page, and there they live to this day. The end.",
    ),
    (
        ("Name the colours you know.", "Which colours do you know?", "Name some colours."),
        "Red, green, blue, yellow, purple, orange, black and pink.",
    ),
    (
        ("Name the shapes you know.", "Which shapes do you know?", "Name some shapes."),
        "Circle, square, triangle, star and cross.",
    ),
    (
        ("Name the days of the week.", "What are the days of the week?", "List the weekdays."),
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    (
        (
            "What is the capital of France?",
            "Write a poem about the sea.",
            "Translate this into German.",
            "What is the weather today?",
            "How tall is the highest mountain?",
            "Who wrote this book?",
            "Explain how a computer works.",
            "Write a program in Python.",
            "What is the meaning of life?",
            "Give me a recipe for bread.",
            "How far away is the moon?",
            "Summarise this text.",
        ),
        FALLBACK_ANSWER,
    ),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One shape in a cell of the grid; row and column count from zero at the top left."""

    colour: str
    shape: str
    row: int
    column: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]


# Items in reading order; no two have the same colour and shape.
Scene = tuple[Item, ...]


def make_scene(rng: random.Random, item_count: int | None = None) -> Scene:
    """Draw a random scene of `item_count` items; None: of one to four."""
    count = item_count or rng.choices((1, 2, 3, 4), (35, 35, 20, 10))[0]
    cells = rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], count)
    names: set[tuple[str, str]] = set()
    while len(names) < count:
        names.add((rng.choice(tuple(COLOURS)), rng.choice(SHAPES)))
    # Sorted because the order of a set differs from one process to the next.
    looks = sorted(names)
    rng.shuffle(looks)
    items = [Item(*look, *cell) for look, cell in zip(looks, cells, strict=True)]
    return tuple(sorted(items, key=lambda item: (item.row, item.column)))


def render(scene: Scene, rng: random.Random, side_px: int = 192) -> Image.Image:
    """Draw a scene on a light background; sizes, positions in the cell and tints vary with
    `rng`."""
    grey = rng.randint(228, 255)
    page = tuple(min(255, grey + rng.randint(-6, 6)) for _ in range(3))
    image = Image.new("RGB", (side_px, side_px), page)
    draw = ImageDraw.Draw(image)
    cell_px = side_px / GRID
    for item in scene:
        radius = rng.uniform(0.27, 0.42)
        # The largest shape reaches 1.1 radii from its middle; none may leave its cell.
        slack = 0.49 - 1.1 * radius
        x = (item.column + 0.5 + rng.uniform(-slack, slack)) * cell_px
        y = (item.row + 0.5 + rng.uniform(-slack, slack)) * cell_px
        tint = tuple(
            max(0, min(255, level + rng.randint(-14, 14))) for level in COLOURS[item.colour]
        )
        _draw_shape(draw, item.shape, x, y, radius * cell_px, tint)
    return image


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, ...]
) -> None:
    match shape:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        case "square":
            half = 0.88 * r
            draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
        case "triangle":
            draw.polygon(((x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)), fill=fill)
        case "star":
            corners = []
            for corner in range(10):
                reach = r * (1.1 if corner % 2 == 0 else 0.45)
                angle = corner * math.pi / 5
                corners.append((x + reach * math.sin(angle), y - reach * math.cos(angle)))
            draw.polygon(corners, fill=fill)
        case "cross":
            arm = 0.33 * r
            draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
            draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
        case _:
            raise ValueError(f"no such shape: {shape!r}; choose one of {', '.join(SHAPES)}")


def _a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def _describe(scene: Scene) -> str:
    names = [_a(item.name) for item in scene]
    if len(scene) == 1:
        return f"{names[0]} {scene[0].place}."
    if len(scene) == 2:
        relation = "left of" if scene[0].row == scene[1].row else "above"
        return f"{names[0]} {relation} {names[1]}."
    return f"{', '.join(names[:-1])} and {names[-1]}."


def _there_are(count: int, one: str, many: str) -> str:
    return f"There is one {one}." if count == 1 else f"There are {NUMBERS[count]} {many}."


# A question and its answer, or None if the scenes allow no such question.
_Asked = tuple[str, str] | None


def _ask_describe(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    answer = _describe(scenes[0])
    return rng.choice(DESCRIBE_QUESTIONS), answer[0].upper() + answer[1:]


def _ask_count(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    (scene,) = scenes
    what = rng.choice(("all", "shape", "colour"))
    if what == "all":
        question = rng.choice(("How many shapes are there?", "How many shapes are in the image?"))
        return question, _there_are(len(scene), "shape", "shapes")
    if what == "shape":
        shape = rng.choice((*SHAPES, *(item.shape for item in scene)))
        count = sum(item.shape == shape for item in scene)
        return f"How many {PLURALS[shape]} are there?", _there_are(count, shape, PLURALS[shape])
    colour = rng.choice((*COLOURS, *(item.colour for item in scene for _ in range(2))))
    count = sum(item.colour == colour for item in scene)
    answer = _there_are(count, f"{colour} shape", f"{colour} shapes")
    return f"How many {colour} shapes are there?", answer


def _ask_colour(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    shapes = [item.shape for item in scenes[0]]
    single = [item for item in scenes[0] if shapes.count(item.shape) == 1]
    if not single:
        return None
    item = rng.choice(single)
    word = rng.choice(("colour", "color"))
    return f"What {word} is the {item.shape}?", f"The {item.shape} is {item.colour}."


def _ask_shape(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    colours = [item.colour for item in scenes[0]]
    single = [item for item in scenes[0] if colours.count(item.colour) == 1]
    if not single:
        return None
    item = rng.choice(single)
    question = rng.choice(
        (f"What shape is the {item.colour} object?", f"What shape is {item.colour}?")
    )
    return question, f"The {item.colour} shape is a {item.shape}."


def _ask_where(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    item = rng.choice(scenes[0])
    return f"Where is the {item.name}?", f"The {item.name} is {item.place}."


def _ask_exists(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    (scene,) = scenes
    present = {(item.colour, item.shape) for item in scene}
    item = rng.choice(scene)
    look = (item.colour, item.shape)
    if rng.random() < 0.5:
        # Half of the absent looks share colour or shape with an item: both must be checked.
        match rng.randrange(4):
            case 0:
                look = (item.colour, rng.choice(SHAPES))
            case 1:
                look = (rng.choice(tuple(COLOURS)), item.shape)
            case _:
                look = (rng.choice(tuple(COLOURS)), rng.choice(SHAPES))
    name = " ".join(look)
    question = f"Is there {_a(name)}?"
    if look in present:
        return question, f"Yes, there is {_a(name)}."
    return question, f"No, there is no {name}."


def _ask_nth(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    index = rng.randrange(len(scenes))
    ordinal = ORDINALS[index]
    question = rng.choice(
        (
            f"What is in the {ordinal} image?",
            f"Describe the {ordinal} image.",
            f"What does the {ordinal} image show?",
        )
    )
    return question, f"The {ordinal} image shows {_describe(scenes[index])}"


def _ask_which(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    names_of: Callable[[Item], str] = rng.choice(
        (
            lambda item: item.shape,
            lambda item: f"{item.colour} shape",
            lambda item: item.name,
        )
    )
    index = rng.randrange(len(scenes))
    others = {names_of(i) for j, scene in enumerate(scenes) if j != index for i in scene}
    only_here = sorted({names_of(item) for item in scenes[index]} - others)
    if not only_here:
        return None
    name = rng.choice(only_here)
    verb = rng.choice(("has", "shows"))
    return f"Which image {verb} {_a(name)}?", f"The {ORDINALS[index]} image has {_a(name)}."


def _ask_each(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    questions = [*EACH_QUESTIONS, "Describe both images."] if len(scenes) == 2 else EACH_QUESTIONS
    parts = [
        f"{ordinal.capitalize()}: {_describe(scene)}"
        for ordinal, scene in zip(ORDINALS, scenes, strict=False)
    ]
    return rng.choice(questions), " ".join(parts)


def _ask_images(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    answer = _there_are(len(scenes), "image", "images")
    return rng.choice(("How many images are there?", "How many images do you see?")), answer


def _ask_sum(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    sign = rng.choice(("plus", "+"))
    return f"What is {a} {sign} {b}?", f"{a} plus {b} is {a + b}."


def _ask_day(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    day = rng.randrange(len(DAYS))
    if rng.random() < 0.5:
        next_day = DAYS[(day + 1) % len(DAYS)]
        return f"What day comes after {DAYS[day]}?", f"{next_day} comes after {DAYS[day]}."
    previous_day = DAYS[(day - 1) % len(DAYS)]
    return f"What day comes before {DAYS[day]}?", f"{previous_day} comes before {DAYS[day]}."


def _ask_count_to(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    end = rng.choice((*range(3, 21), 25, 30, 40, 50))
    return f"Count to {end}.", " ".join(str(number) for number in range(1, end + 1))


def _ask_chat(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    questions, answer = rng.choice(CHAT)
    return rng.choice(questions), answer


def _ask_no_picture(rng: random.Random, scenes: Sequence[Scene]) -> _Asked:
    question = rng.choice(
        (*DESCRIBE_QUESTIONS, f"What colour is the {rng.choice(SHAPES)}?", "What is shown?")
    )
    return question, NO_PICTURE_ANSWER


_ASKERS: dict[str, Callable[[random.Random, Sequence[Scene]], _Asked]] = {
    "describe": _ask_describe,
    "count": _ask_count,
    "colour": _ask_colour,
    "shape": _ask_shape,
    "where": _ask_where,
    "exists": _ask_exists,
    "nth image": _ask_nth,
    "which image": _ask_which,
    "each image": _ask_each,
    "how many images": _ask_images,
    "sum": _ask_sum,
    "day": _ask_day,
    "count to": _ask_count_to,
    "chat": _ask_chat,
    "no picture": _ask_no_picture,
}
# Kinds by the number of images they need, with their share of a held-out set in percent.
_ONE_IMAGE = {"describe": 14, "count": 9, "colour": 9, "shape": 9, "where": 9, "exists": 9}
_SEVERAL_IMAGES = {"nth image": 9, "which image": 8, "each image": 7, "how many images": 1}
_NO_IMAGES = {"sum": 4, "day": 3, "count to": 3, "chat": 4, "no picture": 2}
_SHARES = {**_ONE_IMAGE, **_SEVERAL_IMAGES, **_NO_IMAGES}
KINDS = tuple(_SHARES)
# How many images a question of each kind may come with.
IMAGE_COUNTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(_ONE_IMAGE, (1,)),
    **dict.fromkeys(_SEVERAL_IMAGES, (2, 3)),
    **dict.fromkeys(_NO_IMAGES, (0,)),
}


def ask(rng: random.Random, scenes: Sequence[Scene], kind: str) -> tuple[str, str] | None:
    """Word a question of `kind` about `scenes`; return it with its answer.

    None means that these scenes allow no such question (every colour occurs twice, say): try other
    scenes or another kind. Raises ValueError unless the number of scenes is in
    `IMAGE_COUNTS[kind]`.
    """
    if len(scenes) not in IMAGE_COUNTS[kind]:
        raise ValueError(
            f"a {kind!r} question takes {IMAGE_COUNTS[kind]} scenes, not {len(scenes)}"
        )
    return _ASKERS[kind](rng, scenes)


def held_out(count: int, seed: int) -> Iterator[tuple[list[Image.Image], str, str, str]]:
    """Yield `count` cases as (images, question, answer, kind), the same ones for the same seed.

    Training seeds its generators with text (see `train`), so no integer seed repeats its images.
    """
    rng = random.Random(seed)
    made = 0
    while made < count:
        kind = rng.choices(KINDS, tuple(_SHARES.values()))[0]
        choices = IMAGE_COUNTS[kind]
        # Of questions with several images, most have two; three are rarer and harder.
        image_count = choices[0] if rng.random() < 0.7 else choices[-1]
        scenes = [make_scene(rng) for _ in range(image_count)]
        asked = ask(rng, scenes, kind)
        if asked is None:
            continue
        made += 1
        images = [render(scene, rng, rng.choice((144, 192, 224, 320))) for scene in scenes]
        yield images, *asked, kind


def example() -> tuple[Image.Image, str, str]:
    """Return one fixed image with a question and its right answer."""
    scene = (Item("red", "circle", 1, 0), Item("blue", "square", 1, 2))
    question, answer = DESCRIBE_QUESTIONS[0], _describe(scene)
    return render(scene, random.Random(0), 240), question, answer[0].upper() + answer[1:]
