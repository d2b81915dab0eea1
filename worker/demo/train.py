"""Train the demo model (`build`) from scratch: tokenizer, vision tower and language model.

There are two stages, as for any LLaVA. First the CLIP tower learns to see: small heads, thrown away
afterwards, name colour and shape in every cell of the grid. Then the whole model learns to answer.
Every image is drawn for one step and used once, so nothing can be memorised.

Batches are built from token ids directly because that is fast; `evaluate` goes through the
processor and thereby checks that both give the same prompts. Must never use the held-out images:
all randomness here comes from generators seeded with text, while `held_out` takes integers.
"""

import argparse
import math
import os
import random
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

# Read when transformers is first imported, so it must be set before.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional

from worker.demo.build import (
    ASSISTANT,
    BOS,
    END,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    SIDE_PX,
    SYSTEM,
    SYSTEM_PROMPTS,
    TOWER_WIDTH,
    USER,
    build_model,
    build_processor,
    build_tokenizer,
)
from worker.demo.evaluate import count_right, load, report
from worker.demo.pictures import (
    COLOURS,
    IMAGE_COUNTS,
    KINDS,
    SHAPES,
    Scene,
    ask,
    held_out,
    make_scene,
    render,
)

__all__ = ["main"]

ONE_IMAGE_KINDS = tuple(kind for kind in KINDS if IMAGE_COUNTS[kind] == (1,))
SEVERAL_IMAGES_KINDS = tuple(kind for kind in KINDS if IMAGE_COUNTS[kind] == (2, 3))
NO_IMAGES_KINDS = tuple(kind for kind in KINDS if IMAGE_COUNTS[kind] == (0,))
# Relative frequency of a kind among those with the same number of images; 1 if not listed.
KIND_WEIGHTS = {
    "count": 2.0,
    "shape": 0.7,
    "where": 4.0,
    "nth image": 0.7,
    "which image": 4.0,
    "each image": 0.5,
    "how many images": 0.15,
    "sum": 3.0,
    "count to": 0.7,
    "no picture": 0.7,
}


@dataclass(slots=True)
class Conversation:
    """Token ids of a whole conversation, the weight of each in the loss, and its images."""

    ids: list[int]
    # For each id, the weight of its loss: zero outside the answers.
    weights: list[float]
    scenes: list[Scene]


class ConversationMaker:
    """Makes endless conversations; holds the tokenizer and the random state."""

    def __init__(self, tokenizer: Any, rng: random.Random) -> None:
        self._rng = rng
        self._encode = lru_cache(maxsize=100_000)(
            lambda text: tuple(tokenizer(text, add_special_tokens=False).input_ids)
        )

    def make(self, kinds: Sequence[str]) -> Conversation:
        """Make a conversation of one to three turns that begins with one of `kinds`."""
        rng = self._rng
        image_counts = IMAGE_COUNTS[kinds[0]]
        image_count = image_counts[0] if rng.random() < 0.7 else image_counts[-1]
        scenes = [make_scene(rng) for _ in range(image_count)]
        turns = [self._turn(kinds, scenes)]
        while len(turns) < 3 and rng.random() < 0.4:
            if rng.random() < 0.1:
                # A change of subject; "no picture" would be wrong if there is an image.
                turns.append(self._turn([k for k in NO_IMAGES_KINDS if k != "no picture"], []))
            else:
                turns.append(self._turn(kinds, scenes))
        conversation = Conversation([BOS], [0.0], scenes)
        if rng.random() < 0.15:
            self._add(conversation, SYSTEM, self._encode(rng.choice(SYSTEM_PROMPTS)))
        image_ids: list[int] = []
        for number in range(1, image_count + 1):
            image_ids += [*self._encode(f"#{number}"), *[IMAGE] * IMAGE_TOKENS]
        for question, answer in turns:
            words = self._encode(self._loosen(question))
            self._add(conversation, USER, [*image_ids, *words])
            # A compromise between a mean over tokens, in which short answers hardly count, and a
            # mean over answers, with which the end of a long answer is never learned.
            answer_ids = self._encode(answer)
            self._add(conversation, ASSISTANT, answer_ids, (len(answer_ids) + 1) ** -0.5)
            image_ids = []
        return conversation

    def _turn(self, kinds: Sequence[str], scenes: Sequence[Scene]) -> tuple[str, str]:
        weights = [KIND_WEIGHTS.get(kind, 1.0) for kind in kinds]
        while True:
            kind = self._rng.choices(kinds, weights)[0]
            asked = ask(self._rng, scenes, kind)
            if asked is not None:
                return asked

    def _loosen(self, question: str) -> str:
        """Write a question as people type: sometimes in lower case or without the question mark."""
        if self._rng.random() < 0.1:
            question = question.lower()
        if self._rng.random() < 0.1:
            question = question.rstrip("?.!")
        return question

    @staticmethod
    def _add(
        conversation: Conversation, role: int, ids: Sequence[int], weight: float = 0.0
    ) -> None:
        conversation.ids += [role, *ids, END]
        conversation.weights += [0.0, *[weight] * (len(ids) + 1)]


def draw(scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    """Draw scenes as the image processor would pass them to the tower: float32 [N, 3, side, side],
    -1 to 1."""
    images = [
        render(scene, rng, rng.choice((144, 144, 192, 288))).resize(
            (SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC
        )
        for scene in scenes
    ]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


class CellHeads(nn.Module):
    """Names colour and shape in every cell from the tower's features; never saved."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Linear(TOWER_WIDTH, 1 + len(COLOURS))
        self.shape = nn.Linear(TOWER_WIDTH, 1 + len(SHAPES))
        self.place = nn.Linear(TOWER_WIDTH, IMAGE_TOKENS)
        # Most cells are empty, and those are also the easiest to recognise.
        self._colour_weights = torch.tensor([0.2] + [1.0] * len(COLOURS))
        self._shape_weights = torch.tensor([0.2] + [1.0] * len(SHAPES))

    def loss(self, features: Tensor, scenes: Sequence[Scene]) -> Tensor:
        """Return the loss of naming what is in each cell of each scene."""
        colours = torch.zeros(len(scenes), IMAGE_TOKENS, dtype=torch.long)
        shapes = torch.zeros_like(colours)
        for index, scene in enumerate(scenes):
            for item in scene:
                cell = 3 * item.row + item.column
                colours[index, cell] = 1 + tuple(COLOURS).index(item.colour)
                shapes[index, cell] = 1 + SHAPES.index(item.shape)
        places = torch.arange(IMAGE_TOKENS).repeat(len(scenes))
        flat = features.flatten(0, 1)
        return (
            functional.cross_entropy(self.colour(flat), colours.flatten(), self._colour_weights)
            + functional.cross_entropy(self.shape(flat), shapes.flatten(), self._shape_weights)
            + 0.3 * functional.cross_entropy(self.place(flat), places)
        )


def _up_to(count: int, multiple: int) -> int:
    """Round up to a multiple. oneDNN compiles for every new matrix shape, so shapes must be few."""
    return -(-count // multiple) * multiple


def see(model: Any, pixels: Tensor) -> Tensor:
    """Return the tower's features [N, patches, width] as LLaVA takes them: without the class
    token."""
    count = len(pixels)
    padded = functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, _up_to(count, 16) - count))
    features: Tensor = model.model.vision_tower(padded).last_hidden_state[:count, 1:]
    return features


def answer_loss(model: Any, batch: Sequence[Conversation], features: Tensor | None) -> Tensor:
    """Return the summed weighted loss of all answers in a batch, padded on the right."""
    length = _up_to(max(len(conversation.ids) for conversation in batch), 16)
    ids = torch.tensor([c.ids + [PAD] * (length - len(c.ids)) for c in batch])
    weights = torch.tensor([c.weights + [0.0] * (length - len(c.ids)) for c in batch])
    embeddings = model.get_input_embeddings()(ids)
    if features is not None:
        padded = functional.pad(
            features, (0, 0, 0, 0, 0, _up_to(len(features), 16) - len(features))
        )
        projected = model.model.multi_modal_projector(padded)[: len(features)]
        mask = (ids == IMAGE).unsqueeze(-1).expand_as(embeddings)
        embeddings = embeddings.masked_scatter(mask, projected.to(embeddings.dtype))
    # No attention mask: attention is causal, so only padding attends to padding on the right.
    hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False)
    # Only the positions before an answer's tokens need logits.
    wanted = (weights[:, 1:] > 0).nonzero()
    wanted = functional.pad(wanted, (0, 0, 0, _up_to(len(wanted), 256) - len(wanted)))
    rows, columns = wanted.unbind(1)
    logits = model.lm_head(hidden.last_hidden_state[rows, columns])
    losses = functional.cross_entropy(logits.float(), ids[rows, columns + 1], reduction="none")
    # Padding rows point at the first token, whose weight is zero.
    return (losses * weights[rows, columns + 1]).sum()


@contextmanager
def shaken(model: Any, strength: float) -> Iterator[None]:
    """Temporarily add noise to the matrices, `strength` times their own standard deviation.

    A model that still answers correctly also tolerates rounding to 8 or 4 bits, which adds noise of
    about a tenth of the standard deviation.
    """
    # The output layer is also the embedding, which is never rounded.
    inner = [
        part.weight
        for part in model.modules()
        if isinstance(part, nn.Linear) and part is not model.lm_head
    ]
    with torch.no_grad():
        noises = [torch.randn_like(weight) * (strength * weight.std()) for weight in inner]
        torch._foreach_add_(inner, noises)
    yield
    with torch.no_grad():
        torch._foreach_sub_(inner, noises)


def make_optimizers(
    modules: Sequence[nn.Module], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside layers, which it trains far faster, and AdamW for the rest.

    Embeddings, the output layer tied to them, biases and gains are not matrices in Muon's sense.
    """
    parts = {id(p): p for module in modules for p in module.parameters()}
    embeddings = {
        id(part.weight)
        for module in modules
        for part in module.modules()
        if isinstance(part, nn.Embedding)
    }
    matrices = [p for key, p in parts.items() if p.ndim == 2 and key not in embeddings]
    inner = {id(p) for p in matrices}
    others = [p for key, p in parts.items() if key not in inner]
    return [
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Team:
    """The processes that train together, each on its own images.

    On a small processor two processes of one thread each are nearly twice as fast as one process
    with two threads: the matrices are too small to divide.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self._size = size

    def say(self, text: str) -> None:
        """Print a line, once for the whole team."""
        if self.rank == 0:
            print(text, flush=True)

    def step(
        self,
        optimizers: Sequence[torch.optim.Optimizer],
        learning_rate: float,
        numbers: Sequence[float],
    ) -> list[float]:
        """Average gradients and `numbers` over the team, take a step, return the averages.

        All processes get the same numbers, so they can base the same decisions on them (such as
        when to stop).
        """
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [p for group in groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor(numbers)])
        if self._size > 1:
            distributed.all_reduce(flat)
            flat /= self._size
        *pieces, averages = torch.split(flat, [*(g.numel() for g in gradients), len(numbers)])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in groups:
            group["lr"] = learning_rate
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return [float(average) for average in averages]


def schedule(peak: float, done: float, step: int) -> float:
    """Return the learning rate at a fraction `done` of the time: warm up, stay constant, fall to
    zero."""
    warm_up = min(1.0, (step + 1) / 100)
    return peak * warm_up * min(1.0, (1.0 - done) / 0.5)


def train_tower(model: Any, heads: CellHeads, team: Team, options: argparse.Namespace) -> None:
    """Stage one: teach the tower to see."""
    rng = random.Random(f"tower {options.seed} {team.rank}")
    optimizers = make_optimizers([model.model.vision_tower, heads], 0.02)
    started, step, elapsed_s, mean_loss = time.monotonic(), 0, 0.0, math.nan
    while (done := elapsed_s / (60 * options.tower_minutes)) < 1:
        scenes = [make_scene(rng, rng.randint(1, 5)) for _ in range(options.batch)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = see(model, draw(scenes, rng))
        loss = heads.loss(features.float(), scenes)
        torch.autograd.backward(loss)
        numbers = (time.monotonic() - started, loss.item())
        elapsed_s, mean_loss = team.step(optimizers, schedule(options.rate, done, step), numbers)
        step += 1
        if step % 200 == 0:
            team.say(f"tower: {elapsed_s:.0f} s, step {step}, loss {mean_loss:.4f}")
    team.say(f"tower: {step} steps, last loss {mean_loss:.4f}")


def train_all(
    model: Any, tokenizer: Any, heads: CellHeads | None, team: Team, options: argparse.Namespace
) -> None:
    """Stage two: teach the whole model to answer; `heads`, if given, keep training the tower."""
    rng = random.Random(f"answers {options.seed} {team.rank}")
    maker = ConversationMaker(tokenizer, rng)
    optimizers = make_optimizers([model, heads] if heads else [model], 0.05)
    # Conversations with the same number of images have similar lengths, so groups need little
    # padding.
    size = options.batch
    groups = (
        (ONE_IMAGE_KINDS, size // 2),
        (SEVERAL_IMAGES_KINDS, size * 3 // 8),
        (NO_IMAGES_KINDS, size // 8),
    )
    started, step, elapsed_s, next_report_s = time.monotonic(), 0, 0.0, 30.0
    recent: deque[float] = deque(maxlen=50)
    while (done := elapsed_s / (60 * options.minutes)) < 1:
        batches = []
        for kinds, count in groups:
            group = sorted((maker.make(kinds) for _ in range(count)), key=lambda c: len(c.ids))
            # The longest get their own batch: padding the rest to their length would double the
            # work.
            batches += [group[: count * 3 // 4], group[count * 3 // 4 :]]
        total_weight = sum(sum(c.weights) for batch in batches for c in batch)
        loss_value = 0.0
        with shaken(model, options.shake):
            for batch in batches:
                scenes = [scene for conversation in batch for scene in conversation.scenes]
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    features = see(model, draw(scenes, rng)) if scenes else None
                    loss = answer_loss(model, batch, features) / total_weight
                loss_value += loss.item()
                if heads is not None and features is not None:
                    loss = loss + 0.05 * heads.loss(features.float(), scenes)
                torch.autograd.backward(loss)
        numbers = (time.monotonic() - started, loss_value)
        elapsed_s, mean_loss = team.step(optimizers, schedule(options.rate, done, step), numbers)
        step += 1
        recent.append(mean_loss)
        if elapsed_s > next_report_s:
            next_report_s += 30
            mean = sum(recent) / len(recent)
            team.say(f"answers: {elapsed_s:.0f} s, step {step}, loss {mean:.4f}")


def train(rank: int, meeting_file: Path, options: argparse.Namespace) -> None:
    """Train as one of the team's processes; the first of them saves the model."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    team = Team(rank, options.processes)
    distributed.init_process_group(
        "gloo", f"file://{meeting_file}", rank=rank, world_size=options.processes
    )
    tokenizer = build_tokenizer()
    heads = None if options.init else CellHeads()
    model: Any = load(options.init)[0] if options.init else build_model()
    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    team.say(f"{parameter_count:,} parameters, {len(tokenizer)} tokens")
    # torch's fused attention has a slow backward pass on a CPU.
    model.set_attn_implementation("eager")
    if options.compile:
        model.model.vision_tower.compile(dynamic=True)
        model.model.language_model.compile(dynamic=True)
    model.train()
    if heads is not None:
        train_tower(model, heads, team, options)
    train_all(model, tokenizer, heads, team, options)
    if rank == 0:
        model.eval().to(torch.bfloat16)
        # With --init the parts still record the dtype that they were loaded in, which
        # dtype="auto" would use.
        for part in (model.config, model.config.text_config, model.config.vision_config):
            part.dtype = torch.bfloat16
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
            do_sample=False,
            max_new_tokens=256,
        )
        model.save_pretrained(options.out)
        build_processor(tokenizer).save_pretrained(options.out)
    distributed.destroy_process_group()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `python -m worker.demo.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m worker.demo.train",
        description="Train the tiny demo model on generated images, save it and measure it.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to save it")
    parser.add_argument(
        "--minutes",
        type=float,
        default=30,
        metavar="M",
        help="minutes of stage two, learning to answer; default: 30",
    )
    parser.add_argument(
        "--tower-minutes",
        type=float,
        default=3,
        metavar="M",
        help="minutes of stage one, learning to see; default: 3; no effect with --init",
    )
    parser.add_argument(
        "--init", type=Path, metavar="DIR", help="continue with a model saved by --out"
    )
    parser.add_argument("--rate", type=float, default=3e-3, help="top learning rate; default: 3e-3")
    parser.add_argument(
        "--batch",
        type=int,
        default=64,
        metavar="N",
        help="conversations per step, in each process; default: 64",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=2,
        metavar="N",
        help="processes of one thread each; default: 2",
    )
    parser.add_argument(
        "--shake",
        type=float,
        default=0.0,
        metavar="S",
        help="noise on the weights, so that the model tolerates rounding to few bits: 0.1 at the "
        "end of training; default: 0",
    )
    parser.add_argument("--compile", action="store_true", help="50 %% faster; needs a C++ compiler")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and questions; default: 0"
    )
    parser.add_argument(
        "--cases", type=int, default=1000, help="held-out cases at the end; default: 1000"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        work = (Path(folder) / "meeting", options)
        spawn(train, work, options.processes)  # type: ignore[no-untyped-call]
    # Measure the saved model, rounded as it was written.
    print(report(count_right(*load(options.out), held_out(options.cases, seed=1)), show_wrong=3))


if __name__ == "__main__":
    main()
