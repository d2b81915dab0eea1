"""`chat`: a conversation at the terminal, with images. Ctrl-C stops the answer, Ctrl-D leaves.

Piped, every line of standard input is a turn and only answers go to standard output.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from client import BusError, Client, ConnectTimeout, InvalidRequest, ModelUnavailable
from client.calls import check_option
from client.cli import arguments as flags, thoughts
from client.cli.generate import show, summary
from client.cli.terminal import Terminal, cause
from client.images import check_file

HELP: Final = """\
/image PATH     add an image to the next question
/reset          forget the conversation
/undo           remove the image just added, or the last question and its answer
/regen          answer the last question again
/system TEXT    set the system prompt (empty: none)
/thoughts       show the last thought; followed by show, fold or hide: for thoughts to come
/set NAME VALUE set a parameter, such as temperature 0.5 (empty value: back to its default)
/model NAME     talk to another model
/save FILE      write the conversation to a file
/load FILE      continue a conversation from a file
/help           this text
/exit           leave (or Ctrl-D); Ctrl-C stops an answer"""

FORMAT: Final = "tokenbus-chat-1"


@dataclass(slots=True)
class Conversation:
    """A conversation and its settings. Plain data, so that it can be saved."""

    model: str | None = None
    system: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    #: Turns as {"role", "content", "images", "reasoning"}; `images` are paths.
    turns: list[dict[str, Any]] = field(default_factory=list)
    #: Images for the next question.
    images: list[str] = field(default_factory=list)

    def messages(self) -> list[dict[str, Any]]:
        """The messages as the library expects them."""
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": self.system})
        for turn in self.turns:
            parts = [{"type": "image", "image": path} for path in turn.get("images", ())]
            text = turn["content"]
            content = [*parts, {"type": "text", "text": text}] if parts else text
            message = {"role": turn["role"], "content": content}
            if turn.get("reasoning"):
                message["reasoning_content"] = turn["reasoning"]
            messages.append(message)
        return messages

    def undo(self) -> bool:
        """Forget the last question and everything after it. False if there is none."""
        for index in reversed(range(len(self.turns))):
            if self.turns[index]["role"] == "user":
                del self.turns[index:]
                return True
        return False

    def save(self, path: Path) -> None:
        """Write as JSON. Raises `OSError`."""
        whole = {
            "format": FORMAT,
            "model": self.model,
            "system": self.system,
            "params": self.params,
            "turns": self.turns,
        }
        path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Conversation:
        """Read what `save` wrote. Raises `OSError`, `ValueError`."""
        whole = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            raise ValueError(f"{path} is not a saved conversation")
        model, system = whole.get("model"), whole.get("system", "")
        params, turns = whole.get("params", {}), whole.get("turns", [])
        if not (
            isinstance(model, str | None)
            and isinstance(system, str)
            and isinstance(params, dict)
            and isinstance(turns, list)
        ):
            raise ValueError(f"{path}: model, system, params or turns is not what /save writes")
        if not all(
            isinstance(turn, dict)
            and turn.get("role") in ("user", "assistant")
            and isinstance(turn.get("content"), str)
            and isinstance(turn.get("images", []), list)
            and all(isinstance(path, str) for path in turn.get("images", []))
            and isinstance(turn.get("reasoning", ""), str)
            for turn in turns
        ):
            raise ValueError(f"{path}: a turn is not what /save writes")
        return cls(model, system, params, turns)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model, with images",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_model(parser)
    parser.add_argument(
        "--image",
        "-i",
        action="append",
        default=[],
        metavar="PATH",
        help="image for the first question; repeatable",
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--load", metavar="FILE", help="continue a saved conversation")
    parser.add_argument("--stats", action="store_true", help="tokens and times after each answer")
    thoughts.add(parser)
    flags.add_params(parser)
    flags.add_connection(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Talk until the end of the input."""
    interactive = sys.stdin.isatty()
    with flags.connect(arguments) as client:
        mode = thoughts.mode_of(arguments.thoughts)
        chat = _Chat(client, terminal, interactive, arguments.stats, mode)
        if arguments.load:
            chat.do_load(arguments.load)
        conversation = chat.conversation
        conversation.params |= flags.params_of(arguments)
        conversation.system = arguments.system or conversation.system
        conversation.model = arguments.model or conversation.model
        for path in arguments.image:
            chat.do_image(path)
        if interactive:
            chat.greet()
        return chat.loop()


class _Chat:
    """The loop of reading and answering."""

    def __init__(
        self, client: Client, terminal: Terminal, interactive: bool, stats: bool, mode: str
    ) -> None:
        self.conversation = Conversation()
        self._client = client
        self._terminal = terminal
        self._interactive = interactive
        self._stats = stats
        #: What is done with thoughts.
        self._mode = mode
        self._failed = False
        #: Each command and what it does with the rest of its line.
        self._commands: dict[str, Callable[[str], None]] = {
            name.removeprefix("do_"): getattr(self, name)
            for name in dir(self)
            if name.startswith("do_")
        }

    def greet(self) -> None:
        """Wait for broker and model, in whichever order they start; then print the models."""
        conversation = self.conversation
        where = " or ".join(self._client.brokers)
        with self._terminal.waiting(f"looking for a broker at {where} ...") as tell:
            while True:
                try:
                    names = [row["name"] for row in self._client.models()]
                except ConnectTimeout:
                    tell(f"waiting for a broker at {where} (start one: python -m broker)")
                    continue
                if names:
                    break
                tell("the broker serves no model yet: start one with `python -m worker`")
                time.sleep(0.5)
        if conversation.model is None:
            if len(names) > 1:
                self._terminal.notice(
                    f"models served: {', '.join(names)}; /model NAME picks another"
                )
            conversation.model = names[0]
        self._terminal.notice(
            f"talking to {conversation.model}; /help lists the commands, Ctrl-D leaves"
        )
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives input() editing and history

    def loop(self) -> int:
        """Read lines until the end."""
        read_any = False
        while True:
            try:
                line = input("you> " if self._interactive else "")
            except EOFError:
                if self._interactive:
                    self._terminal.line()
                elif not read_any:
                    self._complain(
                        "standard input is empty, so nothing was asked of the broker at "
                        f"{' or '.join(self._client.brokers)}: talk at a terminal, or pipe in "
                        "questions, one a line"
                    )
                return self._status()
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._terminal.notice("\n(Ctrl-D or /exit leaves)")
                continue
            text = line.strip()
            if not text:
                continue
            read_any = True
            if text.startswith("/"):
                if text in ("/exit", "/quit"):
                    return self._status()
                self._command(text)
            else:
                self._ask(text)

    def _status(self) -> int:
        """The exit status: scripts are told of failed commands; a person has already seen them."""
        return 1 if self._failed and not self._interactive else 0

    def _command(self, text: str) -> None:
        name, _, rest = text[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._complain(f"no command /{name}; /help lists them")
            return
        try:
            command(rest.strip())
        except (OSError, ValueError, BusError) as error:
            self._complain(cause(error))

    def _complain(self, text: str) -> None:
        self._failed = True
        self._terminal.error(text)

    # --- answering ---

    def _ask(self, text: str) -> None:
        conversation = self.conversation
        turn: dict[str, Any] = {"role": "user", "content": text}
        if conversation.images:
            turn["images"] = conversation.images
        conversation.turns.append(turn)
        if self._answer():
            conversation.images = []
        else:
            conversation.turns.pop()  # so that the question can be asked again
            if conversation.images and self._interactive:
                self._terminal.notice(
                    "(its images are kept for the next question; /undo removes them)"
                )

    def _answer(self) -> bool:
        """Answer the last question; False if there is no answer at all."""
        conversation = self.conversation
        try:
            stream = self._client.chat(
                conversation.model, conversation.messages(), stream=True, **conversation.params
            )
        except (BusError, TypeError) as error:
            self._complain(str(error))
            return False
        with stream:
            try:
                end = show(stream, self._terminal, self._mode)
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._terminal.notice("\n(stopped)")
            except BusError as error:
                if stream.text_so_far:
                    self._terminal.line()
                self._complain(str(error))
                if isinstance(error, ModelUnavailable) and self._interactive:
                    self._terminal.notice("(/model NAME picks another model)")
                if not stream.text_so_far:
                    return False
            else:
                if self._stats:
                    self._terminal.notice(f"({summary(end)})")
        answer = {"role": "assistant", "content": stream.text_so_far}
        if stream.reasoning_so_far:
            answer["reasoning"] = stream.reasoning_so_far
        conversation.turns.append(answer)
        return True

    # --- commands ---

    def do_image(self, rest: str) -> None:
        """Add an image to the next question."""
        if not rest:
            raise ValueError("/image needs the path of an image")
        for path in _paths(rest):
            check_file(path)  # report a wrong path now, not with the question
            self.conversation.images.append(path)
            self._say(f"image {len(self.conversation.images)} of the next question: {path}")

    def do_reset(self, _: str) -> None:
        """Forget the conversation."""
        self.conversation.turns.clear()
        self.conversation.images.clear()
        self._say("the conversation is forgotten")

    def do_undo(self, _: str) -> None:
        """Remove the image just added, otherwise the last question and its answer."""
        if self.conversation.images:
            self._say(f"{self.conversation.images.pop()} is removed")
            return
        if not self.conversation.undo():
            raise ValueError("there is nothing to undo")
        self._say("the last question and its answer are forgotten")

    def do_regen(self, _: str) -> None:
        """Answer the last question again."""
        turns = self.conversation.turns
        before = list(turns)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise ValueError("there is no question to answer again")
        if not self._answer():
            turns[:] = before

    def do_system(self, rest: str) -> None:
        """Set the system prompt."""
        self.conversation.system = rest
        self._say("system prompt set" if rest else "no system prompt")

    def do_thoughts(self, rest: str) -> None:
        """Show the thought of the last answer, or say what is done with those to come."""
        if rest:
            if rest not in thoughts.MODES:
                raise ValueError(f"/thoughts is followed by nothing, {' or '.join(thoughts.MODES)}")
            self._mode = rest
            self._say(f"thoughts: {rest}")
            return
        turns = self.conversation.turns
        thought = turns[-1].get("reasoning") if turns else None
        if not thought:
            raise ValueError("nothing was thought for the last answer")
        self._terminal.aside(f"{thought}\n")

    def do_set(self, rest: str) -> None:
        """Set a parameter."""
        name, _, text = rest.partition(" ")
        name = name.replace("-", "_")
        if not name:
            shown = ", ".join(f"{k}={v}" for k, v in self.conversation.params.items())
            self._say(shown or "no parameters are set")
        elif not text.strip():
            self.conversation.params.pop(name, None)
            self._say(f"{name} is back to its default")
        else:
            value = flags.read_param(name, text.strip())
            check_option(name, value)
            self.conversation.params[name] = value
            self._say(f"{name} = {self.conversation.params[name]}")

    def do_model(self, rest: str) -> None:
        """Talk to another model."""
        if not rest:
            raise ValueError("/model needs a name; `python -m client models` lists them")
        served = [row["name"] for row in self._client.models()]
        if rest not in served:
            raise ValueError(
                f"no worker serves {rest!r}; models served: {', '.join(served) or 'none'}"
            )
        self.conversation.model = rest
        self._say(f"talking to {rest}")

    def do_save(self, rest: str) -> None:
        """Write the conversation to a file."""
        if not rest:
            raise ValueError("/save needs a file name")
        self.conversation.save(Path(rest).expanduser())
        self._say(f"saved to {rest}")

    def do_load(self, rest: str) -> None:
        """Continue a conversation from a file."""
        if not rest:
            raise ValueError("/load needs a file name")
        try:
            loaded = Conversation.load(Path(rest).expanduser())
            for turn in loaded.turns:
                for path in turn.get("images", ()):
                    check_file(path)
            self.conversation = loaded
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{rest} is not a saved conversation: {error}") from None
        except (OSError, ValueError) as error:
            raise InvalidRequest(cause(error)) from None
        self._say(f"{len(self.conversation.turns)} turns loaded from {rest}")

    def do_help(self, _: str) -> None:
        """List the commands."""
        self._terminal.notice(HELP)

    def _say(self, text: str) -> None:
        if self._interactive:
            self._terminal.notice(f"({text})")


def _paths(text: str) -> list[str]:
    """The files that `text` names: one plain path, or what a terminal inserts for dropped files
    (quoted, with backslashes, as file:// addresses, several)."""
    whole = Path(text).expanduser()
    if whole.exists():
        return [str(whole)]
    with contextlib.suppress(ValueError):  # an open quotation mark
        words = [
            unquote(urlsplit(word).path) if word.startswith("file://") else word
            for word in shlex.split(text)
        ]
        paths = [Path(word).expanduser() for word in words]
        if len(paths) == 1 or all(path.exists() for path in paths):
            return [str(path) for path in paths]
    return [str(whole)]
