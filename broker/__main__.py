"""`python -m broker`: start a broker, make its keys, invite somebody, or check its options.

Puts the parts together and turns every failure into one line and an exit code: 2 for a wrong
option, 1 for a failure, 0 for a clean stop.
"""

from __future__ import annotations

from broker.protocol import early  # noqa: F401  # first: it handles signals from here on

# isort: split

import contextlib
import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from broker import config as options
from broker.config import PROGRAM, Config, ConfigError, StartError, software
from broker.core.controller import BrokerCore
from broker.core.events import Side
from broker.log import Logger
from broker.loop import BrokerLoop
from broker.protocol.descriptors import raise_descriptor_limit
from broker.sockets import (
    BindError,
    SocketSettings,
    bind,
    check_address,
    collide,
    is_local,
    make_context,
    make_router,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m broker` and of `tokenbus-broker`."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if argv[:1] == ["keys"]:
            from broker import auth

            print(auth.keys_command(argv[1:], program=f"{PROGRAM} keys"))
            return 0
        if argv[:1] == ["invite"]:
            from broker import invite

            line, told = invite.invite(argv[1:], program=f"{PROGRAM} invite")
            print(told, file=sys.stderr)
            print(line)
            return 0
        if argv[:1] == ["revoke"]:
            from broker import invite

            print(invite.revoke(argv[1:], program=f"{PROGRAM} revoke"))
            return 0
        if argv[:1] == ["check"]:
            # `check broker.toml` is what people type.
            flags = ["--config"] if argv[1:] and not argv[1].startswith("-") else []
            return _check(options.read([*flags, *argv[1:]], program=f"{PROGRAM} check"))
        return _serve(options.read(argv, program=PROGRAM))
    except ConfigError as error:
        return _complain(str(error), 2)
    except StartError as error:
        return _complain(str(error), 1)


def _complain(message: str, code: int) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return code


def _serve(config: Config) -> int:
    _check_addresses(config)
    # Each peer costs a descriptor; when they run out, accept fails in a tight loop.
    raise_descriptor_limit(2 * (config.max_clients + config.max_workers) + 256)
    log = _logger(config)
    for line in options.misspelt_variables():
        log("warning", "environment", {"ignored": line})
    settings = SocketSettings(config.high_water_mark, config.linger_ms, config.io_threads)
    context = make_context(settings)
    front = make_router(context, settings, front=True)
    back = make_router(context, settings, front=False)
    gate = upstream = None
    server_key, relay_keys = "", None
    try:
        if config.keys:
            from broker import auth

            public, secret = auth.load_broker_key(Path(config.keys))
            server_key = public.decode("ascii")
            if config.upstream:
                relay_keys = auth.fresh_pair()
            gate = auth.Gate(context, Path(config.keys), log, relay_keys and relay_keys[0])
            auth.protect(front, Side.FRONT, secret)
            auth.protect(back, Side.BACK, secret)
        fronts = bind(front, config.front)
        backs = bind(back, config.back)
        access = gate.event() if gate is not None else None
        core = BrokerCore(config, access=access, now_s=time.monotonic(), software=software())
        if config.upstream:
            from broker.upstream import Upstream

            upstream = Upstream(config, fronts[0], log, server_key=server_key, keys=relay_keys)
        loop = BrokerLoop(config, core, front, back, log, gate=gate, upstream=upstream)
        loop.catch_signals()
        _announce(config, fronts, backs)
        gc.collect()
        gc.freeze()
        loop.run()
    except (ConfigError, StartError):
        raise  # `main` reports it in one line
    except Exception:
        # Log it now: closing the sockets may abort the process (a libzmq assertion), and the cause
        # would be lost.
        traceback.print_exc()
        return 1
    finally:
        if upstream is not None:
            upstream.close()
        front.close()
        back.close()
        if gate is not None:
            gate.socket.close()
        context.term()
    return 0


def _logger(config: Config) -> Logger:
    if not config.log_file:
        return Logger(form=config.log_format, level=config.log_level)
    try:
        # Open for the life of the process; line-buffered, so that a crash loses nothing.
        stream = Path(config.log_file).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise StartError(f"--log-file {config.log_file}: {error.strerror}") from None
    return Logger(stream, form=config.log_format, level=config.log_level)


def _check_addresses(config: Config) -> None:
    for address in (*config.front, *config.back):
        try:
            check_address(address)
        except BindError as error:
            raise ConfigError(str(error)) from None
        if not (is_local(address) or config.keys or config.insecure):
            raise ConfigError(
                f"{address} can be reached from other machines and CURVE is off: everybody there "
                "could read and send. Make keys with `python -m broker keys` and give --keys, or "
                "say --insecure"
            )
    for one, other in itertools.combinations((*config.front, *config.back), 2):
        if collide(one, other):
            raise ConfigError(
                f"{one} and {other} are one port: each front and back address needs its own"
            )
    if config.upstream or config.upstream_key or config.upstream_server_key:
        from broker.upstream import check

        check(config)


def _check(config: Config) -> int:
    """Say whether a broker could start with these options, without starting one."""
    _check_addresses(config)
    misspelt = options.misspelt_variables()
    if misspelt:
        raise ConfigError("\n".join(misspelt))
    if config.keys:
        from broker import auth

        auth.load_broker_key(Path(config.keys))
        allowed = auth.load_allow_lists(Path(config.keys)).as_event()
        print(
            f"CURVE on: keys at the front: {len(allowed.clients)}, of them operators: "
            f"{len(allowed.operators)}; keys of workers: {len(allowed.workers)}"
        )
    for name, value in options.changed(config).items():
        print(f"{name} = {value!r}")
    print("configuration OK")
    return 0


def _announce(config: Config, fronts: list[str], backs: list[str]) -> None:
    """Print where the broker listens, and what to do next."""
    worker_keys = client_keys = ""
    if config.keys:
        server_key = f" --server-key {config.keys}/broker.key"
        worker_keys = f"{server_key} --key {config.keys}/worker.key_secret"
        client_keys = f"{server_key} --key {config.keys}/client.key_secret"
    lines = [
        f"tokenbus broker listens: clients {', '.join(fronts)}   workers {', '.join(backs)}",
        f"next:  python -m worker --broker {backs[0]}{worker_keys}",
        f"       python -m client chat --broker {fronts[0]}{client_keys}",
    ]
    # On a full disk these lines are lost; the broker runs on.
    with contextlib.suppress(OSError):
        print("\n".join(lines), flush=True)
    if config.ready_file:
        ready = {"front": fronts, "back": backs, "pid": os.getpid()}
        path = Path(config.ready_file)
        # Whoever waits for the file must never read a half-written one.
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(json.dumps(ready), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise StartError(f"--ready-file {path} cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
