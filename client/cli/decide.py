"""`decide`: typed questions about a text and its images, answered with probabilities."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from client import ChoiceAnswer, Decisions, InvalidRequest, NoulAnswer, ScoreAnswer
from client.cli import arguments as flags
from client.cli.generate import read_text
from client.cli.terminal import Terminal, cause


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "decide",
        help="answer questions about a text with probabilities",
        description="Answer typed questions about a text and its images, each with a probability "
        "for every allowed answer; no text is written.",
    )
    parser.add_argument("state", nargs="*", help="the text; what is piped in goes before it")
    flags.add_model(parser)
    parser.add_argument(
        *("--image", "-i"),
        action="append",
        default=[],
        metavar="PATH",
        help="image, called <image-1>, <image-2>, ... in the texts; repeatable",
    )
    group = parser.add_argument_group("questions, each repeatable")
    for kind, metavar, words in (
        ("noul", "NAME=QUESTION", "true or false"),
        ("choice", "NAME=QUESTION|OPTION|...", "one of the options; OPTION: DESCRIPTION explains"),
        ("score", "NAME=QUESTION|LEVEL|...", "a level, the lowest first"),
    ):
        group.add_argument(
            f"--{kind}",
            dest="questions",
            action="append",
            type=_reader(kind),
            metavar=metavar,
            help=words,
        )
    group.add_argument(
        "--questions",
        dest="files",
        action="append",
        default=[],
        metavar="FILE",
        help="JSON: questions by name, each with type, instructions and criteria",
    )
    flags.add_json(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=decide, questions=[])


def decide(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Ask, and print the answers."""
    questions: dict[str, Any] = {}
    for name, question in [*arguments.questions, *_from_files(arguments.files)]:
        if name in questions:
            raise InvalidRequest(f"two questions have the name {name!r}")
        questions[name] = question
    if not questions:
        raise InvalidRequest("no questions; give --noul, --choice, --score or --questions")
    state = read_text(arguments.state)
    with flags.connect(arguments) as client:
        answers = client.decide(arguments.model, state, questions, images=arguments.image)
    if arguments.json:
        terminal.json(
            {
                "model": answers.model,
                "answers": answers.answers,
                "usage": answers.usage,
                "worker": answers.worker,
            }
        )
    else:
        terminal.table("decisions", ("question", "answer", "probabilities"), _rows(answers))
    return 0


def _rows(answers: Decisions) -> list[tuple[str, str, str]]:
    rows = []
    for name, answer in answers.items():
        shares = answer.probabilities
        match answer:
            case ChoiceAnswer():
                shown = answer.choice
            case ScoreAnswer():
                shown = f"{answer.score:.2f}"
                shares = {str(answer.legend[level]): share for level, share in shares.items()}
            case NoulAnswer():
                shown = "true" if answer.noul >= 0.5 else "false"
        told = ", ".join(f"{option} {share:.1%}" for option, share in shares.items())
        rows.append((name, shown, told))
    return rows


def _reader(kind: str) -> Any:
    """Reads a question of one type as a person types it."""

    def read(text: str) -> tuple[str, dict[str, Any]]:
        name, separator, rest = text.partition("=")
        instructions, *answers = (piece.strip() for piece in rest.split("|"))
        if not separator or not name.strip():
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=QUESTION")
        question: dict[str, Any] = {"type": kind, "instructions": instructions}
        if kind == "noul" and answers:
            raise argparse.ArgumentTypeError(f"{text!r}: noul is answered with true or false")
        if kind == "choice":
            parts = [answer.partition(": ") for answer in answers]
            question["criteria"] = {option: meaning or None for option, _, meaning in parts}
            if len(question["criteria"]) < len(answers):
                raise argparse.ArgumentTypeError(f"{text!r} has an option twice")
        elif kind == "score":
            question["criteria"] = answers
        return name.strip(), question

    return read


def _from_files(paths: list[str]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for path in paths:
        try:
            questions = json.loads(Path(path).read_bytes())
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"cannot read questions from {path}: {cause(error)}") from None
        if not isinstance(questions, dict):
            raise InvalidRequest(f"{path} holds no JSON object of questions by name")
        found += questions.items()
    return found
