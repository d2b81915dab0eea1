"""How options are read, the same for broker, worker, client and gateway.

No party accepts an abbreviation, silently ignores a misspelt name, or reads booleans in its own
way. Pure: never reads the environment or a file itself.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn

__all__ = ["OptionParser", "count", "misspelt", "number", "parse_bool"]

ENVIRONMENT: Final = "TOKENBUS_"
_PARTIES: Final = ("TOKENBUS_WORKER_", "TOKENBUS_GATEWAY_")
#: Set by Kubernetes for a service that is called `tokenbus`.
_SERVICE_LINKS: Final = re.compile(r"_SERVICE_(HOST|PORT)|_PORT(_\d+_(TCP|UDP).*)?$")


def parse_bool(text: str) -> bool:
    """A boolean as text: true, yes, on, 1 or their opposites; the empty string is false.
    Raises `ValueError`."""
    word = text.strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0", ""):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def count(text: str) -> int:
    """For argparse's `type=`: a whole number from 1 up."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {text!r}")
    return value


def number(text: str) -> float:
    """For `type=` of an option with bounds of its own: NaN, which no bounds take, for a word."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def misspelt(
    environment: Mapping[str, str],
    known: Iterable[str],
    prefix: str = ENVIRONMENT,
    *,
    near_only: bool = False,
) -> list[str]:
    """A line for each variable that begins like ours but is not an option.

    `known` are the names that the caller reads; `prefix` is the beginning of those that it checks
    (the broker's excludes those of the worker and the gateway). `near_only`: report only names
    similar to one in `known`, since another program may read the rest.
    """
    names = sorted(known)
    lines = []
    for name in sorted(environment):
        others = [party for party in _PARTIES if party != prefix]
        if not name.startswith(prefix) or name.startswith(tuple(others)) or name in names:
            continue
        if _SERVICE_LINKS.search(name):
            continue
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.8 if near_only else 0.6)
        if near_only and not near:
            continue
        hint = f"did you mean {near[0]}?" if near else "--help lists all options"
        lines.append(f"{name} is set but is not an option; {hint}")
    return lines


class OptionParser(argparse.ArgumentParser):
    """argparse without abbreviations. Reports every unknown option and wrong value at once, each
    option with the most similar one, or with the replacement of an option of a replaced system."""

    def __init__(
        self,
        *args: Any,
        replaced: Mapping[str, str] | None = None,
        raises: type[Exception] | None = None,
        **kwargs: Any,
    ) -> None:
        """`replaced`: advice by option of a replaced system. `raises`: the exception for a mistake;
        without it, argparse ends the process with status 2."""
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self._replaced = dict(replaced or {})
        self._raises = raises
        #: What was wrong with values, in the order of the command line.
        self._wrong: list[str] = []

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Like argparse, with all unknown options and wrong values in one message."""
        words = sys.argv[1:] if args is None else args
        parsed, rest = self.parse_known_args(words, namespace)
        wrong = self._unknown(rest, words) if rest else []
        for parser in _parsers(self, words):
            if isinstance(parser, OptionParser):
                wrong += parser._wrong
                parser._wrong = []
        if wrong:
            self.error("\n".join(wrong))
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            self._wrong.append(str(error))
            return None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(action.choices)}"
            raise argparse.ArgumentError(None, f"there is no command {value!r}; {hint}")
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if value is not None:  # else it was told
                self._wrong.append(str(error))

    def _unknown(self, rest: Sequence[str], words: Sequence[str]) -> list[str]:
        # Without the dashes, which would make short names alike.
        known = {
            option.lstrip("-"): option
            for action in _actions(self, words)
            for option in action.option_strings
        }
        names = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if not names:
            return [f"unrecognized arguments: {' '.join(rest)}"]
        lines = []
        for name in dict.fromkeys(names):
            spelt = name.replace("_", "-")
            instead = self._replaced.get(name) or self._replaced.get(spelt)
            near = difflib.get_close_matches(spelt.lstrip("-"), list(known), n=1)
            if instead:
                lines.append(f"{name}: {instead}")
            elif near:
                lines.append(f"there is no option {name}; did you mean {known[near[0]]}?")
            else:
                lines.append(f"there is no option {name}; --help lists all options")
        return lines

    def error(self, message: str) -> NoReturn:
        if self._raises is not None:
            raise self._raises(message)
        super().error(message)


def _actions(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[argparse.Action]:
    """Options of the parser and of the command in use; those of other commands would not help."""
    for one in _parsers(parser, words):
        yield from one._actions


def _parsers(
    parser: argparse.ArgumentParser, words: Sequence[str]
) -> Iterator[argparse.ArgumentParser]:
    """The parser and that of the command that was given."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            command = next((word for word in words if word in action.choices), None)
            if command is not None:
                yield from _parsers(action.choices[command], words)
