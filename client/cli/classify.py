"""`rerank`, `classify`: documents by relevance, and texts by the labels of a classifier."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from broker.protocol.options import count
from client import InvalidRequest
from client.cli import arguments as flags
from client.cli.terminal import Terminal

#: Of a document in the table.
_SHOWN_CHARACTERS: Final = 80


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    parser = commands.add_parser(
        "rerank",
        help="order documents by relevance",
        description="Order documents by their relevance to a query. Takes a cross-encoder.",
    )
    parser.add_argument("query", help="what the documents are to answer")
    parser.add_argument(
        "document", nargs="*", help="documents; without them, lines of standard input"
    )
    parser.add_argument(
        "--top-n", type=count, metavar="N", help="only the N most relevant documents [all]"
    )
    _add_common(parser)
    parser.set_defaults(run=rerank)

    parser = commands.add_parser(
        "classify",
        help="label texts",
        description="The scores of a classifier's labels for texts.",
    )
    parser.add_argument("text", nargs="*", help="texts; without them, lines of standard input")
    _add_common(parser)
    parser.set_defaults(run=classify)


def _add_common(parser: argparse.ArgumentParser) -> None:
    flags.add_model(parser)
    parser.add_argument(
        "--logits", action="store_true", help="the model's logits instead of its scores"
    )
    parser.add_argument(
        "--truncate",
        action="store_true",
        help="leave out the end of a text that is too long, instead of refusing it",
    )
    flags.add_json(parser)
    flags.add_connection(parser)


def rerank(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print the documents, the most relevant first."""
    documents = _texts(arguments.document)
    with flags.connect(arguments) as client:
        ranked = client.rerank(
            arguments.query,
            documents,
            model=arguments.model,
            top_n=arguments.top_n,
            **_options(arguments),
        )
    if arguments.json:
        for one in ranked:
            terminal.json({"index": one.index, "score": one.score, "document": one.document})
    else:
        rows = [(f"{one.score:.4f}", str(one.index), _short(one.document)) for one in ranked]
        terminal.table("documents", ("score", "index", "document"), rows)
    return 0


def classify(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Print each text's label."""
    texts = _texts(arguments.text)
    with flags.connect(arguments) as client:
        classified = client.classify(texts, model=arguments.model, **_options(arguments))
    if arguments.json:
        for text, one in zip(texts, classified, strict=True):
            terminal.json(
                {"text": text, "label": one.label, "score": one.score, "scores": one.scores}
            )
    else:
        rows = [
            (one.label, f"{one.score:.4f}", _short(text))
            for text, one in zip(texts, classified, strict=True)
        ]
        terminal.table("texts", ("label", "score", "text"), rows)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {"truncate": True} if arguments.truncate else {}
    return options | ({"activation": False} if arguments.logits else {})


def _texts(given: list[str]) -> list[str]:
    texts = given or [line.rstrip("\n") for line in sys.stdin]
    if not texts:
        raise InvalidRequest("no texts; give them as arguments or as lines of standard input")
    return texts


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
