"""Every option of the worker: flag, environment variable, default, unit and reason.

Flags take precedence over the environment (`TOKENBUS_WORKER_...`), and the environment over the
defaults. Old spellings of the replaced systems are accepted, or refused with the name of their
replacement (`replaced`). Must never import zmq or torch, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import math
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from broker.protocol.invitation import Invitation, InvitationError, read
from broker.protocol.logs import FORMATS, LEVELS
from broker.protocol.options import OptionParser, count, misspelt, parse_bool
from broker.protocol.structs import check_name
from broker.protocol.version import version
from worker import option_values
from worker.conversations import NAMED_TEMPLATES, read_template
from worker.demo import caller, model_path
from worker.ending import times
from worker.engines import registry
from worker.engines.base import EngineOptions
from worker.engines.common.reasoning import parser_names
from worker.naming import pair_names
from worker.option_values import CLOUDS, NEVER
from worker.replaced import REPLACED

ENVIRONMENT_PREFIX: Final = "TOKENBUS_WORKER_"
DEFAULT_BROKER: Final = "tcp://127.0.0.1:5556"
DEMO_NAME: Final = "demo"
ON_DEMAND_SLOTS: Final = 16
"""With --models the number of slots is the same, whichever model is loaded."""
ADAPTERS_FOLDER: Final = "adapters_folder"
"""The argument of engines that load adapters while they run."""
BUNDLED: Final = {DEMO_NAME: model_path, "demo-tools": caller.model_path}
"""Models that need no download, by the name that stands for their path."""

_EPILOG: Final = f"""\
Every option can be set by an environment variable: {ENVIRONMENT_PREFIX}LIMIT_MODEL_CONCURRENCY=4;
lists are separated by commas, switches are true or false.

examples:
  python -m worker                                       the bundled demo model, offline
  python -m worker --model-path demo-tools               another: it thinks and calls tools
  python -m worker --model-path Qwen/Qwen2.5-0.5B-Instruct --broker tcp://gpu-bus:5556
  python -m worker --model-path /data/tuned/checkpoint-400 --model-name tuned,tuned-latest
  python -m worker --engine openai --engine-arg base_url=http://gpu-7:8000/v1
                                                         in front of a server that already runs
  python -m worker --engine echo --slots 64              no model: for tests and benchmarks
"""


class ConfigError(Exception):
    """An option is wrong; the message names it and says what to do."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """The options of `python -m worker`."""

    worker_id: str
    brokers: tuple[str, ...]
    register: bool
    speed: float
    grace_s: float
    drain_s: float
    engine_stall_s: float
    #: Unix time; None: no option names an end.
    ends_at: float | None
    end_margin_s: float
    #: Clouds whose metadata service is asked for a spot notice.
    spot: tuple[str, ...]
    notice_command: str | None
    #: Whether the time limit of the Slurm job in which this process runs counts as its end.
    slurm: bool
    threads: int | None
    server_key: Path | None
    key: Path | None
    #: Address and keys in one line; `brokers` are its addresses unless others are given.
    join: Invitation | None
    log_level: str
    log_format: str
    log_file: Path | None
    progress: bool
    #: CUDA_VISIBLE_DEVICES of the engine; None: the same as the worker's own.
    gpus: str | None
    #: Environment variables that look like options but are not.
    misspelt: tuple[str, ...]
    engine: EngineOptions
    #: Whether models are loaded on demand: one at a time, or as many as fit into
    #: `models_memory_bytes`. They are unloaded after `unload_idle_s` without a request.
    on_demand: bool = False
    models_memory_bytes: int = 0
    unload_idle_s: float = math.inf


def software() -> str:
    """The software string sent in HELLO."""
    return f"tokenbus-worker/{version()}"


def parser() -> argparse.ArgumentParser:
    """The command line. Defaults are None here, since the environment comes between flags and
    defaults."""
    made = OptionParser(
        replaced=REPLACED,
        raises=ConfigError,
        prog="python -m worker",
        description="Serve models on a tokenbus: connect to a broker, and run the engine in a "
        "separate process.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=None,
    )
    models = made.add_argument_group("model")
    models.add_argument(
        "--model-path",
        "--model",
        action="append",
        metavar="PATH",
        help="local folder or hub id; repeat, or separate by commas, for several [the demo model]",
    )
    models.add_argument(
        "--model-name",
        "--model-names",
        action="append",
        metavar="NAME",
        help="name to serve it under, several separated by commas; once per model "
        "[the path's last part]",
    )
    models.add_argument(
        "--models",
        metavar="FOLDER|LIST",
        help="models to load on demand, one at a time: the folder that holds them, or a list "
        "separated by commas; the broker decides which is loaded [none]",
    )
    models.add_argument(
        "--models-memory",
        type=option_values.size,
        metavar="SIZE",
        help="with --models: keep as many loaded as fit into this memory (20GiB, 8e9); the least "
        "recently used are unloaded first [one at a time]",
    )
    models.add_argument(
        "--unload-idle-s",
        type=option_values.positive,
        metavar="S",
        help="with --models: unload a model that nobody has used for this long [never]",
    )
    models.add_argument(
        "--model-base", metavar="PATH", help="base model of an adapter or a projector"
    )
    models.add_argument("--revision", metavar="REV", help="branch, tag or commit on the hub [main]")
    models.add_argument(
        "--trust-remote-code",
        "--trust_remote_code",
        action="store_true",
        help="run Python code that comes with the model: only for models that you trust [no]",
    )

    models.add_argument(
        "--chat-template",
        "--conv-template",
        type=option_values.template,
        metavar="FILE|NAME",
        help="Jinja file that renders conversations, for models without one, or one of "
        f"{', '.join(NAMED_TEMPLATES)} [the model's own]",
    )
    models.add_argument(
        "--reasoning-parser",
        metavar="NAME|none",
        help="how the models mark their reasoning, which is sent apart from the answer: "
        f"{', '.join(parser_names())} [as each model shows]",
    )

    engine = made.add_argument_group("engine")
    engine.add_argument(
        "--engine", metavar="NAME", help=f"{', '.join(registry.BUILT_IN)}, ... [transformers]"
    )
    engine.add_argument(
        "--engine-arg",
        action="append",
        metavar="KEY=VALUE",
        help="an option of the engine itself; repeatable",
    )
    engine.add_argument(
        "--device", metavar="DEV", help="auto, cpu, cuda, cuda:1, mps, xpu, npu [auto]"
    )
    engine.add_argument(
        "--gpus", metavar="LIST", help="GPUs that the engine sees, such as 0,1 [all]"
    )
    engine.add_argument("--dtype", metavar="TYPE", help="auto, float32, float16, bfloat16 [auto]")
    engine.add_argument("--load-8bit", action="store_true", help="quantise weights to 8 bits")
    engine.add_argument("--load-4bit", action="store_true", help="quantise weights to 4 bits")
    engine.add_argument(
        "--draft-model",
        metavar="FOLDER",
        help="small model with the same vocabulary that drafts answers, which the model verifies: "
        "several tokens in a step, and the same answers (--engine transformers) [none]",
    )
    engine.add_argument(
        "--limit-model-concurrency",
        "--limit-worker-concurrency",
        "--limit",
        "--slots",
        dest="slots",
        type=option_values.slots,
        metavar="N",
        help="requests that run at once [the engine's choice]",
    )
    engine.add_argument(
        "--threads", type=count, metavar="N", help="CPU threads of the engine [all cores]"
    )
    engine.add_argument(
        "--engine-stall-s",
        type=option_values.positive,
        metavar="S",
        help="kill and restart an engine that has work but finishes no step for this long [120]",
    )

    bus = made.add_argument_group("bus")
    bus.add_argument(
        "--broker",
        "--controller-address",
        "--controller",
        action="append",
        type=option_values.addresses,
        metavar="ADDRESS",
        help=f"back address of a broker; repeat to serve several from one pool [{DEFAULT_BROKER}]",
    )
    bus.add_argument(
        "--join",
        metavar="LINE|FILE",
        help="an invitation, as `python -m broker invite` prints it, or a file that holds one: "
        "address and keys in one line; --broker then gives another address of the same broker",
    )
    bus.add_argument(
        "--worker-id", metavar="NAME", help="name on the bus, unique [host name and 6 hex digits]"
    )
    bus.add_argument(
        "--no-register",
        action="store_true",
        help="join no broker: load the engine, answer one prompt as a check, and exit. (The "
        "replaced systems kept an unregistered HTTP server here; a bus worker has no address, so "
        "nobody could reach it.)",
    )
    bus.add_argument(
        "--speed",
        type=option_values.positive,
        metavar="X",
        help="weight in the broker's placement [1]",
    )
    bus.add_argument(
        "--grace-s",
        type=option_values.seconds,
        metavar="S",
        help="how long requests keep running after their broker is lost [30]",
    )
    bus.add_argument(
        "--drain-s",
        type=option_values.seconds,
        metavar="S",
        help="how long running requests may take after the worker is told to stop [30]",
    )
    ends = made.add_argument_group(
        "end",
        "A worker that knows when it will be gone tells the broker, which moves running\n"
        "streams away in time. In a Slurm job, the job's limit is known without an option.",
    )
    ends.add_argument(
        "--ends-at",
        type=option_values.point,
        metavar="TIME",
        help=f"21:00, 2026-11-30T21:00 or seconds since 1970; {NEVER}: not even at the job's limit "
        "[the limit of the Slurm job]",
    )
    ends.add_argument(
        "--ends-in",
        type=option_values.length,
        metavar="TIME",
        help="the same, counted from now: 90s, 15m, 8h, 1:30:00",
    )
    ends.add_argument(
        "--spot",
        type=option_values.clouds,
        metavar="CLOUD",
        help=f"look for spot notices at the metadata service of {', '.join(CLOUDS)} [none]",
    )
    ends.add_argument(
        "--notice-command",
        type=option_values.command,
        metavar="COMMAND",
        help="run every 5 s; once an end is known it must print the seconds left, or a time, and "
        "before that nothing",
    )
    ends.add_argument(
        "--end-margin-s",
        type=option_values.seconds,
        metavar="S",
        help="leave this long before a known end [2]",
    )
    bus.add_argument(
        "--server-key", metavar="FILE", help="the broker's public CURVE key (.key file)"
    )
    bus.add_argument(
        "--key", metavar="FILE", help="this worker's own CURVE key pair (.key_secret file)"
    )

    logs = made.add_argument_group("log")
    logs.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning, error [info]")
    logs.add_argument(
        "--log-format", metavar="STYLE", help="auto, text (for terminals) or json [auto]"
    )
    logs.add_argument("--log-file", metavar="FILE", help="write the log there [standard error]")
    logs.add_argument("--no-progress", action="store_true", help="show no loading progress")
    made.add_argument("--version", action="version", version=software())
    return made


_DEFAULTS: Final[dict[str, Any]] = {
    "engine": "transformers",
    "device": "auto",
    "dtype": "auto",
    "slots": 0,
    "speed": 1.0,
    "grace_s": 30.0,
    "drain_s": 30.0,
    "engine_stall_s": 120.0,
    "end_margin_s": 2.0,
    "log_level": "info",
    "log_format": "auto",
}
_CHOICES: Final = {
    "dtype": ("auto", "float32", "float16", "bfloat16"),
    "log_level": LEVELS,
    "log_format": FORMATS,
}


def _from_environment(action: argparse.Action, text: str, name: str) -> Any:
    """The value of an option that is set by an environment variable."""
    if isinstance(action, argparse._StoreTrueAction):
        try:
            return parse_bool(text)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
    read = action.type if callable(action.type) else str
    try:
        if isinstance(action, argparse._AppendAction):
            return [read(item) for item in text.split(",") if item]
        return read(text)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{name}={text}: {error}") from None


def parse(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> WorkerConfig:
    """Parse the configuration. Raises ConfigError; `--help` and `--version` end the process."""
    command_line = parser()
    given = vars(command_line.parse_args(arguments))
    values: dict[str, Any] = {}
    known: set[str] = set()
    for action in command_line._actions:
        if action.dest in ("help", "version"):
            continue
        value = given[action.dest]
        spellings = [o.lstrip("-").replace("-", "_").upper() for o in action.option_strings]
        for name in (ENVIRONMENT_PREFIX + spelling for spelling in spellings):
            known.add(name)
            if value in (None, False) and environment.get(name):
                value = _from_environment(action, environment[name], name)
        values[action.dest] = _DEFAULTS.get(action.dest) if value is None else value
    for option, choices in _CHOICES.items():
        if values[option] not in choices:
            flag = "--" + option.replace("_", "-")
            raise ConfigError(f"{flag} {values[option]}: must be one of {', '.join(choices)}")
    values["misspelt"] = tuple(misspelt(environment, known, ENVIRONMENT_PREFIX))
    return _checked(values)


def _checked(values: dict[str, Any]) -> WorkerConfig:
    join = _invitation(values)
    brokers = tuple(
        dict.fromkeys(
            address
            for group in values["broker"] or (join.brokers if join else [DEFAULT_BROKER])
            for address in group.split(",")
        )
    )
    if (values["server_key"] is None) != (values["key"] is None):
        raise ConfigError("--server-key and --key go together: give both or neither")
    if values["ends_at"] is not None and values["ends_in"] is not None:
        raise ConfigError("--ends-at and --ends-in exclude each other")
    ends_at = None
    if values["ends_in"] is not None:
        ends_at = time.time() + values["ends_in"]
    elif values["ends_at"] not in (None, NEVER):
        ends_at = times.point(values["ends_at"], datetime.now())
    if ends_at is not None and ends_at <= time.time() + values["end_margin_s"]:
        raise ConfigError(
            "the end (--ends-at, --ends-in) must lie further ahead than --end-margin-s"
        )
    worker_id = values["worker_id"] or f"{socket.gethostname()[:200]}-{secrets.token_hex(3)}"
    try:
        check_name(worker_id)
    except ValueError as error:
        raise ConfigError(f"--worker-id: {error}") from None
    return WorkerConfig(
        worker_id=worker_id,
        brokers=brokers,
        register=not values["no_register"],
        speed=values["speed"],
        grace_s=values["grace_s"],
        drain_s=values["drain_s"],
        engine_stall_s=values["engine_stall_s"],
        ends_at=ends_at,
        end_margin_s=values["end_margin_s"],
        spot=tuple(dict.fromkeys(values["spot"].split(","))) if values["spot"] else (),
        notice_command=values["notice_command"],
        slurm=values["ends_at"] != NEVER,
        threads=values["threads"],
        server_key=Path(values["server_key"]) if values["server_key"] else None,
        key=Path(values["key"]) if values["key"] else None,
        join=join,
        log_level=values["log_level"],
        log_format=values["log_format"],
        log_file=Path(values["log_file"]) if values["log_file"] else None,
        progress=not values["no_progress"],
        gpus=values["gpus"],
        misspelt=values["misspelt"],
        engine=_engine_options(values),
        on_demand=values["models"] is not None,
        models_memory_bytes=values["models_memory"] or 0,
        unload_idle_s=values["unload_idle_s"] or math.inf,
    )


def _invitation(values: dict[str, Any]) -> Invitation | None:
    if values["join"] is None:
        return None
    if values["server_key"] is not None or values["key"] is not None:
        raise ConfigError("--join holds the keys: omit --server-key and --key")
    try:
        return read(values["join"], "worker")
    except InvitationError as error:
        raise ConfigError(f"--join: {error}") from None


def _found(path: str) -> str:
    """The folder of a bundled model; any other path, or an existing one of that name, as it is."""
    bundled = path in BUNDLED and not Path(path).exists()
    return str(BUNDLED[path]()) if bundled else path


def _engine_options(values: dict[str, Any]) -> EngineOptions:
    paths: list[str] = values["model_path"] or []
    names: list[str] = values["model_name"] or []
    if values["models"] is not None:
        if paths:
            raise ConfigError(
                "--models and --model-path exclude each other: the first loads one model at a time"
            )
        if values["engine"] == "openai":
            raise ConfigError("--models: the server behind --engine openai loads its models itself")
        try:
            paths = option_values.models_in(values["models"])
        except ValueError as error:
            raise ConfigError(str(error)) from None
    elif values["models_memory"]:
        raise ConfigError("--models-memory needs --models: it limits the memory of those models")
    if values["load_8bit"] and values["load_4bit"]:
        raise ConfigError("--load-8bit and --load-4bit exclude each other")
    if values["draft_model"] and values["engine"] in {*registry.BUILT_IN} - {"transformers"}:
        raise ConfigError(
            f"--draft-model: engine {values['engine']} does not take one; only --engine "
            "transformers does"
        )
    engine_args = {}
    for item in values["engine_arg"] or []:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"--engine-arg {item}: must be KEY=VALUE")
        engine_args[key.replace("-", "_")] = text
    if values["models"] is not None and ADAPTERS_FOLDER in engine_args:
        raise ConfigError(
            f"--engine-arg {ADAPTERS_FOLDER} is for the adapters of one model: name it with "
            "--model-path instead of --models"
        )
    if not paths:
        if values["engine"] == "transformers":
            paths, names = [str(model_path())], names or [DEMO_NAME]
        elif values["engine"] == "openai":
            paths = []  # the models of the server
        elif values["engine"] in registry.NEED_MODEL:
            raise ConfigError(
                f"--engine {values['engine']} needs --model-path: a folder, a file or a hub id"
            )
        else:
            paths, names = [values["engine"]], names or [values["engine"]]
    try:
        models, groups = pair_names(paths, names)
        models = tuple(_found(path) for path in models)
        template = read_template(values["chat_template"]) if values["chat_template"] else ""
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return EngineOptions(
        engine=values["engine"],
        model_paths=models,
        model_names=groups,
        model_base=values["model_base"],
        device=values["device"],
        dtype=values["dtype"],
        load_8bit=values["load_8bit"],
        load_4bit=values["load_4bit"],
        slots=values["slots"] or (ON_DEMAND_SLOTS if values["models"] is not None else 0),
        revision=values["revision"],
        trust_remote_code=values["trust_remote_code"],
        chat_template=template,
        reasoning_parser=values["reasoning_parser"] or "",
        draft_model=values["draft_model"] or "",
        engine_args=engine_args,
    )
