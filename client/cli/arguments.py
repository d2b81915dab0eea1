"""Flags that several commands share; the sampling flags are generated from `Params`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, Final

import msgspec

from broker.protocol.messages import Params
from client import Client, Timeout
from client.parameters import Sampling, described

#: argparse converters by field type; other fields are set with `--param`.
_READERS: Final[dict[type[msgspec.inspect.Type], Callable[[str], Any]]] = {
    msgspec.inspect.IntType: int,
    msgspec.inspect.FloatType: float,
}


def add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the broker and the key."""
    group = parser.add_argument_group("connection")
    group.add_argument(
        "--broker",
        metavar="ADDRESS",
        help="front address; several separated by commas [$TOKENBUS_BROKER or tcp://127.0.0.1:5555]",
    )
    group.add_argument("--server-key", metavar="KEY", help="CURVE: the broker's public key or file")
    group.add_argument(
        *("--key", "--key-file"),
        dest="key_file",
        metavar="FILE",
        help="CURVE: our own .key_secret file",
    )
    group.add_argument(
        "--join",
        metavar="LINE|FILE",
        help="an invitation (`python -m broker invite`) or a file that holds one: address and keys",
    )
    group.add_argument(
        "--connect-timeout",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds to wait for a broker [5]",
    )
    group.add_argument(
        "--timeout", type=float, metavar="S", help="seconds for each whole request [no limit]"
    )


def connect(arguments: argparse.Namespace, **timeouts: float | None) -> Client:
    """The client that the flags describe."""
    limits: dict[str, float | None] = {
        "connect": arguments.connect_timeout,
        "total": arguments.timeout,
        **timeouts,
    }
    return Client(
        arguments.broker,
        server_key=arguments.server_key,
        key_file=arguments.key_file,
        join=arguments.join,
        timeout=Timeout(**limits),
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the flag that chooses the model."""
    parser.add_argument(
        "--model", "-m", metavar="NAME", help="the model to ask [the only one served]"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag for machine-readable output."""
    parser.add_argument("--json", action="store_true", help="JSON, one value per line")


def add_params(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every simple sampling parameter, and `--param` for the others."""
    group = parser.add_argument_group(
        "sampling (SPEC.md section 4.2)",
        "For defaults with *, the model's generation config takes precedence.",
    )
    texts = described(Sampling)
    for name, kind in _flags().items():
        flag = "--" + name.replace("_", "-")
        if kind is bool:
            group.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=texts[name]
            )
        elif kind is list:
            group.add_argument(
                flag, action="append", metavar="TEXT", help=f"{texts[name]}; repeatable"
            )
        else:
            group.add_argument(flag, type=kind, metavar="N", help=texts[name])
    group.add_argument(
        "--param",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=JSON",
        help='any other parameter, such as logit_bias={"5":2.5}',
    )


def params_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The parameters that were given."""
    given = {name: getattr(arguments, name) for name in _flags()}
    return {name: value for name, value in given.items() if value is not None} | dict(
        arguments.param
    )


def read_param(name: str, text: str) -> Any:
    """Parse a parameter's value as a person types it. Raises `ValueError`."""
    kind = _flags().get(name)
    if kind is list:
        return [text]
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            wanted = "an integer" if kind is int else "a number"
            raise ValueError(f"{name}: must be {wanted}, got {text!r}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _flags() -> dict[str, Any]:
    flags: dict[str, Any] = {}
    info = msgspec.inspect.type_info(Params)
    assert isinstance(info, msgspec.inspect.StructType)
    for field in info.fields:
        if field.name == "model_defaults":  # derived from the parameters that were not given
            continue
        kind = field.type
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = next(t for t in kind.types if not isinstance(t, msgspec.inspect.NoneType))
        if isinstance(kind, msgspec.inspect.BoolType):
            flags[field.name] = bool
        elif type(kind) in _READERS:
            flags[field.name] = _READERS[type(kind)]
        elif isinstance(kind, msgspec.inspect.ListType) and isinstance(
            kind.item_type, msgspec.inspect.StrType
        ):
            flags[field.name] = list
    return flags


def _assignment(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    name = name.strip().replace("-", "_")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=JSON")
    try:
        return name, read_param(name, value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
