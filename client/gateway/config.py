"""The gateway's options: one table, read from flags, then `TOKENBUS_GATEWAY_...`, then defaults.

Refuses a configuration that would be unsafe by accident: an address reachable from other
machines, without keys.
"""

# ruff: noqa: RUF009 (the call makes a dataclass field)

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from broker.protocol.limits import MAX_ATTACHMENT_BYTES, MAX_ATTACHMENTS_BYTES, MAX_REQUEST_BYTES
from broker.protocol.logs import FORMATS, LEVELS
from broker.protocol.options import OptionParser, misspelt, parse_bool
from broker.protocol.structs import check_name
from client import BusError
from client.gateway.addresses import Network
from client.gateway.images import ImagePolicy
from client.options import MOST_IN_FLIGHT, Connection
from client.version import version

__all__ = ["Config", "ConfigError", "parse_args"]

PREFIX = "TOKENBUS_GATEWAY_"


_REPLACED = {
    **dict.fromkeys(
        ("--controller-address", "--controller-url", "--controller"),
        "--broker tcp://HOST:5555, the broker's front address",
    ),
    "--api-keys": "--keys FILE; `python -m client.gateway keys add NAME` makes a key",
    "--allowed-origins": "--cors-origins URLS, comma separated",
    **dict.fromkeys(
        ("--allow-credentials", "--allowed-methods", "--allowed-headers"),
        "not needed: allowed origins may use every method and header",
    ),
    "--ssl": "--tls-cert FILE and --tls-key FILE",
    **dict.fromkeys(
        ("--concurrency-count", "--model-list-mode"),
        "not needed: the gateway asks the bus for its models",
    ),
    "--share": "there is no tunnel; see --host, --keys and --tls-cert",
    "--moderate": "there is no moderation",
}
"""Options of the API and web servers that the gateway replaces, and the options to use now."""


_REASONING_FIELDS = ("reasoning_content", "reasoning")
"""Names of the reasoning in a chat's answer: other servers send one of them, and a client that
reads the other one would lose it."""


class ConfigError(Exception):
    """An option has an impossible value; the message names it."""


def _text(value: str) -> str:
    return value


def _whole(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"must be an integer, got {value!r}") from None


def _reasoning_field(value: str) -> str:
    if value not in ("both", *_REASONING_FIELDS):
        raise ValueError(f"must be {', '.join(_REASONING_FIELDS)} or both, got {value!r}")
    return value


def _port(value: str) -> int:
    number = _whole(value)
    if not 0 <= number < 65536:
        raise ValueError(f"must be a port from 0 to 65535, got {value}")
    return number


def _positive(value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"must be a number, got {value!r}") from None
    if not 0 < number < 1e9:
        raise ValueError(f"must be above 0, got {value}")
    return number


def _count(value: str) -> int:
    number = _whole(value)
    if number < 0:
        raise ValueError(f"must not be negative, got {value}")
    return number


def _at_least_one(value: str) -> int:
    number = _whole(value)
    if number < 1:
        raise ValueError(f"must be 1 or more, got {value}")
    return number


def _in_flight(value: str) -> int:
    number = _at_least_one(value)
    if number > MOST_IN_FLIGHT:
        raise ValueError(f"must be {MOST_IN_FLIGHT} or less, got {value}")
    return number


def _words(value: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in value.split(",") if word.strip())


def _urls(value: str) -> tuple[str, ...]:
    urls = _words(value)
    for url in urls:
        split = urlsplit(url)
        if split.scheme not in ("http", "https") or not split.hostname or split.path.strip("/"):
            raise ValueError(f"{url!r} is not http://HOST:PORT")
    return urls


def _aliases(value: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for word in _words(value):
        alias, equals, model = (part.strip() for part in word.partition("="))
        if not (alias and equals and model):
            raise ValueError(f"{word!r} is not ALIAS=MODEL")
        check_name(model)
        pairs.append((alias, model))
    return tuple(pairs)


def _networks(value: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(word) for word in _words(value))


def _one_of(*choices: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, got {value!r}")
        return value

    return read


#: Room for all images of a request as base64, plus its text.
_DEFAULT_BODY_BYTES = MAX_ATTACHMENTS_BYTES * 4 // 3 + 2 * MAX_REQUEST_BYTES


def _option(read: Callable[[str], Any], default: Any, help: str, metavar: str = "") -> Any:
    """One option; flag and environment variable are named after the attribute."""
    return field(default=default, metadata={"read": read, "help": help, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every option with its value: the only table, from which flags, variables and
    help are made."""

    broker: tuple[str, ...] = _option(
        _words, (), "front address of the broker, or several", "FRONT"
    )
    server_key: str | None = _option(_text, None, "the broker's CURVE public key", "Z85")
    key_file: str | None = _option(_text, None, "this gateway's CURVE certificate", "FILE")
    join: str | None = _option(
        _text, None, "an invitation or a file that holds one: address and keys", "LINE|FILE"
    )
    host: str = _option(_text, "127.0.0.1", "address to listen on")
    port: int = _option(_port, 8000, "port to listen on; 0 picks a free one")
    keys: Path | None = _option(
        Path, None, "file of API keys; without it, no key is required", "FILE"
    )
    usage: Path | None = _option(
        Path, None, "SQLite file of tokens by key, model and day; gateways may share it", "FILE"
    )
    batch_folder: Path | None = _option(
        Path, None, "folder of batches and their files; serves /v1/batches and /v1/files", "FOLDER"
    )
    response_folder: Path | None = _option(
        Path,
        None,
        "folder of stored responses; gateways that share it go on with each other's",
        "FOLDER",
    )
    response_bytes: int = _option(
        _at_least_one, 4 << 30, "disk for the response folder; the oldest make room, bytes", "N"
    )
    batch_concurrency: int = _option(
        _in_flight, 256, "lines of batches at once; fewer where workers run fewer", "N"
    )
    batch_file_bytes: int = _option(_count, 200 << 20, "largest file for a batch, bytes", "N")
    batch_bytes: int = _option(
        _count, 16 << 30, "disk for all files of the batch folder, bytes", "N"
    )
    insecure: bool = _option(parse_bool, False, "listen beyond this machine without keys")
    public_url: str | None = _option(_text, None, "URL at which others reach this gateway", "URL")
    allowed_hosts: tuple[str, ...] = _option(
        _words, (), "additional host names to answer to", "NAMES"
    )
    cors_origins: tuple[str, ...] = _option(
        _words, (), "origins of web pages that may call this gateway; * is any", "URLS"
    )
    tls_cert: Path | None = _option(Path, None, "certificate chain, PEM; serves https", "FILE")
    tls_key: Path | None = _option(Path, None, "private key, PEM", "FILE")
    alias: tuple[tuple[str, str], ...] = _option(
        _aliases,
        (),
        "other names of models, comma separated; * in a name stands for anything",
        "ALIAS=MODEL",
    )
    signing_key: Path | None = _option(
        Path,
        None,
        "secret for the signatures of thinking blocks, the same for all gateways of a bus",
        "FILE",
    )
    reasoning_field: str = _option(
        _reasoning_field,
        "both",
        "name of the reasoning in chats: reasoning_content, reasoning, or both",
        "NAME",
    )
    max_tokens_beyond: str = _option(
        _one_of("cut", "refuse"),
        "cut",
        "max_tokens beyond the room in the context: cut to what fits, or refused",
        "cut|refuse",
    )
    allow_remote_images: bool = _option(parse_bool, False, "fetch images from http(s) addresses")
    image_networks: tuple[Network, ...] = _option(
        _networks, (), "non-public networks from which images may be fetched", "CIDRS"
    )
    image_timeout_s: float = _option(
        _positive, 10.0, "total time for fetching one image, seconds", "S"
    )
    image_bytes: int = _option(_count, MAX_ATTACHMENT_BYTES, "largest image, bytes", "N")
    body_bytes: int = _option(_count, _DEFAULT_BODY_BYTES, "largest request body, bytes", "N")
    bodies_bytes: int = _option(
        _count, 1 << 30, "memory for the bodies of all running requests, bytes", "N"
    )
    max_connections: int = _option(_count, 4096, "HTTP connections at once", "N")
    head_s: float = _option(
        _positive, 10.0, "time for the head of a request to arrive, seconds", "S"
    )
    body_s: float = _option(
        _positive,
        30.0,
        "time for its body to arrive, seconds, plus one for every 16 KiB of it",
        "S",
    )
    keep_alive_s: float = _option(
        _positive, 15.0, "silence before a comment line is sent, seconds", "S"
    )
    reattach_s: float = _option(_positive, 60.0, "time to re-attach to an answer, seconds", "S")
    peers: tuple[str, ...] = _option(
        _urls, (), "other gateways of this bus, asked for the answers that they keep", "URLS"
    )
    store_entries: int = _option(_count, 1000, "answers kept for re-attaching and follow-up", "N")
    store_bytes: int = _option(
        _count, 64 << 20, "memory for kept answers, running ones included, bytes", "N"
    )
    legacy_dialect: str = _option(
        _one_of("auto", "fastchat", "llava"), "auto", "older API: auto, fastchat or llava", "NAME"
    )
    no_legacy: bool = _option(parse_bool, False, "do not serve the older controller and worker API")
    no_page: bool = _option(parse_bool, False, "do not serve the web page")
    shutdown_s: float = _option(
        _positive, 10.0, "grace period for running answers when stopping, seconds", "S"
    )
    log_level: str = _option(_one_of(*LEVELS), "info", "debug, info, warning or error", "LEVEL")
    log_format: str = _option(
        _one_of(*FORMATS),
        "auto",
        "text, json, or auto: text on a terminal, JSON elsewhere",
        "STYLE",
    )
    log_file: Path | None = _option(
        Path, None, "write the log there instead of standard error", "FILE"
    )

    def served_name(self, model: str) -> str:
        """The name under which the bus serves the model that a request names."""
        return next((name for alias, name in self.alias if fnmatchcase(model, alias)), model)

    @property
    def reasoning_fields(self) -> tuple[str, ...]:
        """The fields of a chat's message that hold the reasoning."""
        if self.reasoning_field == "both":
            return _REASONING_FIELDS
        return (self.reasoning_field,)

    @property
    def images(self) -> ImagePolicy:
        """The policy for loading images."""
        return ImagePolicy(
            allow_remote=self.allow_remote_images,
            max_bytes=self.image_bytes,
            timeout_s=self.image_timeout_s,
            allowed_networks=self.image_networks,
        )

    @property
    def loopback(self) -> bool:
        """Whether only programs on this machine can reach the gateway."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def check(self) -> None:
        """Raises ConfigError for an invalid or unsafe combination of options."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together")
        if not self.loopback and self.keys is None and not self.insecure:
            raise ConfigError(
                f"--host {self.host} can be reached from other machines, and there are no keys: "
                "make some with `keys add NAME` and pass --keys FILE, or pass --insecure if "
                "something in front of the gateway authenticates callers"
            )
        try:
            self.connection()
        except BusError as error:
            raise ConfigError(error.message) from None

    def connection(self) -> Connection:
        """The connection to the bus. Raises InvalidRequest for a malformed address; does not
        read key files."""
        return Connection.resolve(
            self.broker or None,
            server_key=self.server_key,
            key_file=self.key_file,
            join=self.join,
        )


def parse_args(argv: Sequence[str], environment: Mapping[str, str] = os.environ) -> Config:
    """The configuration from flags and environment. Raises ConfigError."""
    parser = OptionParser(
        replaced=_REPLACED,
        raises=ConfigError,
        prog="python -m client.gateway",
        description="Serve the models of a tokenbus broker over HTTP: OpenAI's, Anthropic's and "
        "Ollama's API, the older FastChat and LLaVA API, and a web page.",
        epilog="Each option can also be set as an environment variable: "
        f"{PREFIX}PORT=8080 is --port 8080. Flags win. Keys: "
        "`python -m client.gateway keys --help`.",
    )
    parser.add_argument("--version", action="version", version=f"tokenbus-gateway {version()}")
    for option in fields(Config):
        flag = "--" + option.name.replace("_", "-")
        words = option.metadata["help"]
        if option.metadata["read"] is parse_bool:
            parser.add_argument(flag, action="store_const", const="1", help=words)
            continue
        if option.default not in (None, ()):
            words += f" (default {option.default})"
        flags = (
            ("--key", flag) if option.name == "key_file" else (flag,)
        )  # the same name as elsewhere
        parser.add_argument(
            *flags,
            dest=option.name,
            metavar=option.metadata["metavar"] or "VALUE",
            help=words,
            # Of any other option the last one counts.
            action="append" if option.name == "alias" else "store",
        )
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for option in fields(Config):
        text = given[option.name]
        if isinstance(text, list):
            text = ",".join(text)
        source = "--" + option.name.replace("_", "-")
        if text is None:
            source = PREFIX + option.name.upper()
            text = environment.get(source)
        if text is None:
            continue
        try:
            values[option.name] = option.metadata["read"](text)
        except ValueError as error:
            wrong.append(f"{source}: {error}")
    if wrong:
        raise ConfigError("\n".join(wrong))
    config = Config(**values)
    config.check()
    return config


def misspelt_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each `TOKENBUS_GATEWAY_...` variable that is not an option."""
    known = {PREFIX + option.name.upper() for option in fields(Config)}
    return misspelt(environment, known, PREFIX)
