"""Options of `python -m broker`, each once: flag > environment > TOML file > default.

The dataclass fields are the only table: name, type, default, unit and reason. Flags, `TOKENBUS_…`
variables, keys of the TOML file and the help text are generated from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.core.settings import CoreSettings, option
from broker.protocol.logs import FORMATS, LEVELS
from broker.protocol.options import OptionParser, misspelt, parse_bool
from broker.protocol.structs import check_name
from broker.protocol.version import version

PROGRAM = "python -m broker"
ENV_PREFIX = "TOKENBUS_"


_REPLACED = {
    **dict.fromkeys(
        ("--host", "--port"),
        "clients and workers have separate addresses: see --front and --back",
    ),
    "--dispatch-method": "--placement lottery, shortest_queue, least_loaded, affinity or "
    "fastest_finish",
    "--ssl": "the bus encrypts with CURVE: see `python -m broker keys` and --keys",
}
"""Options of the controllers that this broker replaces, and the options to use now."""


class StartError(Exception):
    """The broker cannot start; the message says why and what to do."""


class ConfigError(Exception):
    """An option is wrong; the message says which one, where it was set, and which
    values are valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(CoreSettings):
    """All options of the broker process; the core sees only its own part."""

    front: tuple[str, ...] = option(
        ("tcp://127.0.0.1:5555",), "", "where clients connect; tcp:// or ipc://, * = free port"
    )
    back: tuple[str, ...] = option(
        ("tcp://127.0.0.1:5556",), "", "where workers connect; tcp:// or ipc://, * = free port"
    )
    ready_file: str = option("", "", "JSON with the real addresses, written once they are bound")

    keys: str = option("", "", "folder made by `python -m broker keys`; turns CURVE on")
    insecure: bool = option(False, "", "allow other addresses than loopback without CURVE")

    upstream: tuple[str, ...] = option(
        (), "", "back address of a broker above: this one serves there as a worker; repeatable"
    )
    upstream_server_key: str = option("", "", "file of that broker's public CURVE key (.key)")
    upstream_key: str = option(
        "", "", "this broker's own key pair (.key_secret), on that broker's list of workers"
    )

    stranger_s: float = option(
        15.0, "s", "a connection without a session is closed after this time", low=0.1
    )
    shutdown_grace_s: float = option(
        30.0, "s", "from the first SIGTERM until running streams are handed over", low=0
    )
    linger_ms: int = option(
        1000,
        "ms",
        "for the last messages when the sockets close; infinity would hang",
        low=0,
        high=60_000,
    )
    outgoing_messages: int = option(
        1000, "", "queued for one slow peer beyond ZeroMQ's queue; then it is cut off", low=1
    )
    outgoing_bytes: int = option(
        16 << 20, "bytes", "the same in bytes: the memory that one slow peer may cost", low=1
    )
    high_water_mark: int = option(
        1000,
        "",
        "messages in ZeroMQ's queue to one peer; finite, so that slow peers show",
        low=1,
        high=(1 << 31) - 1,
    )
    io_threads: int = option(
        1, "", "ZeroMQ threads; one carries 1 GB/s, CURVE and images want 2", low=1, high=16
    )
    log_format: str = option(
        "auto", "", "auto: text on a terminal, JSON elsewhere", choices=FORMATS
    )
    log_file: str = option("", "", "write the log there instead of standard error")
    log_level: str = option(
        "info",
        "",
        "debug adds a line for each step of a request",
        choices=LEVELS,
    )


def read(
    arguments: Sequence[str], environment: Mapping[str, str] = os.environ, *, program: str
) -> Config:
    """The configuration. Raises `ConfigError`; `--help` and `--version` leave by SystemExit."""
    parser = _parser(program)
    flags = vars(parser.parse_args(arguments))
    file = flags.pop("config") or environment.get(ENV_PREFIX + "CONFIG")
    values: dict[str, Any] = _from_file(Path(file)) if file else {}
    for field in dataclasses.fields(Config):
        name = field.name
        variable = ENV_PREFIX + name.upper()
        if flags.get(name) is not None:
            values[name] = _convert(field, flags[name], _flag(name))
        elif variable in environment:
            text = environment[variable]
            given = text.split(",") if str(field.type).startswith("tuple") else text
            values[name] = _convert(field, given, variable)
    return Config(**values)


def misspelt_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each `TOKENBUS_...` variable that neither broker nor client reads."""
    known = {ENV_PREFIX + field.name.upper() for field in dataclasses.fields(Config)}
    return misspelt(environment, known | {ENV_PREFIX + "CONFIG", ENV_PREFIX + "BROKER"})


def changed(config: Config) -> dict[str, Any]:
    """Options whose value differs from the default."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(Config)
        if getattr(config, field.name) != field.default
    }


def _from_file(path: Path) -> dict[str, Any]:
    import tomllib  # importing it is a tenth of the start-up time, and most brokers have no file

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML: {error}") from None
    fields = {field.name: field for field in dataclasses.fields(Config)}
    unknown = sorted(set(table) - set(fields))
    if unknown:
        near = difflib.get_close_matches(unknown[0], fields, n=1)
        hint = f"did you mean {near[0]}?" if near else "see --help for all"
        raise ConfigError(f"--config {path}: unknown option {unknown[0]!r}; {hint}")
    return {
        name: _convert(fields[name], value, f"{name} in {path}") for name, value in table.items()
    }


def _convert(field: dataclasses.Field[Any], value: Any, source: str) -> Any:
    kind = str(field.type)
    try:
        if kind == "bool":
            return parse_bool(str(value))
        if kind == "int":
            value = int(str(value).replace("_", ""))
        elif kind == "float":
            value = float(value)
        elif kind == "tuple[str, ...]":
            value = tuple([value] if isinstance(value, str) else value)
            if not value or not all(isinstance(item, str) and item for item in value):
                raise ValueError
        elif not isinstance(value, str):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise ConfigError(f"{source}: {value!r} is not {_WANTED[kind]}") from None
    _check_bounds(field, value, source)
    return value


_WANTED = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "tuple[str, ...]": "an address or a list of them",
}


def _check_bounds(field: dataclasses.Field[Any], value: Any, source: str) -> None:
    about = field.metadata
    choices = about.get("choices")
    if choices and value not in choices:
        raise ConfigError(f"{source}: {value!r} must be one of {', '.join(choices)}")
    if about.get("name"):
        try:
            check_name(value)
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
    low, high = about.get("low"), about.get("high")
    # Written so that NaN counts as out of bounds too.
    if low is not None and not value >= low:
        raise ConfigError(f"{source}: {value} is below {low}")
    if high is not None and not value <= high:
        raise ConfigError(f"{source}: {value} is above {high}")


def software() -> str:
    """What this broker is, for WELCOME, `bus.version` and `--version`."""
    return f"tokenbus {version()}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = OptionParser(
        replaced=_REPLACED,
        raises=ConfigError,
        prog=program,
        description="The tokenbus broker: clients at the front, workers at the back.",
        usage=f"{PROGRAM} [OPTION ...] | {PROGRAM} keys --help | {PROGRAM} invite --help | "
        f"{PROGRAM} revoke --help | {PROGRAM} check [FILE] [OPTION ...]",
        epilog=_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=software())
    parser.add_argument("--config", metavar="FILE", help="TOML file with options by their name")
    for field in dataclasses.fields(Config):
        flag = _flag(field.name)
        if field.type == "bool":
            parser.add_argument(
                flag, action=argparse.BooleanOptionalAction, default=None, help=argparse.SUPPRESS
            )
        elif str(field.type).startswith("tuple"):
            parser.add_argument(flag, action="append", default=None, help=argparse.SUPPRESS)
        else:
            parser.add_argument(flag, default=None, help=argparse.SUPPRESS)
    return parser


def _table() -> str:
    rows = [("flag", "environment", "default", "reason")]
    for field in sorted(dataclasses.fields(Config), key=lambda field: _rank(field.name)):
        about = field.metadata
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        unit = f" {about['unit']}" if about["unit"] else ""
        choices = f" ({', '.join(about['choices'])})" if "choices" in about else ""
        rows.append(
            (
                _flag(field.name),
                ENV_PREFIX + field.name.upper(),
                f"{default}{unit}" if default != "" else "-",
                about["reason"] + choices,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    return (
        "Precedence: flags, environment, TOML file (keys named like the flags, with _ for -),"
        "\ndefaults. --front, --back and --upstream may be repeated.\n\n" + "\n".join(lines)
    )


def _rank(name: str) -> tuple[int, int]:
    """The process's own options first: those are the ones people look for."""
    names = [field.name for field in dataclasses.fields(Config)]
    core = {field.name for field in dataclasses.fields(CoreSettings)}
    return (name in core, names.index(name))
