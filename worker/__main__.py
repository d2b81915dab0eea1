"""`python -m worker`: serve models on the bus until told to stop.

This process becomes the link; the engine runs in a child process. Exit status: 0 after a drain, 1
when the engine cannot be started or every broker refuses the worker, 2 for a wrong option. Must
never import torch.
"""

from __future__ import annotations

from broker.protocol import early  # noqa: F401  # must be first: handles signals from here on

# isort: split

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from broker.protocol import logs
from broker.protocol.limits import ID_BYTES
from worker import config as options
from worker.process.display import LoadingDisplay

if TYPE_CHECKING:
    from worker.loop import EngineSide

log = logging.getLogger("worker")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["slurm"]:
        from worker.slurm.__main__ import main as slurm

        return slurm(given[1:])
    try:
        config = options.parse(given)
        logs.configure(config.log_level, config.log_format, config.log_file)
    except options.ConfigError as error:
        print(f"worker: {error}\n(python -m worker --help lists the options)", file=sys.stderr)
        return 2
    except OSError as error:
        why = f"{config.log_file}: {error.strerror or error}"
        print(f"worker: the log file cannot be written: {why}", file=sys.stderr)
        return 2
    for line in config.misspelt:
        log.warning("environment", extra={"fields": {"ignored": line}})
    return serve(config) if config.register else check(config)


def _environment(config: options.WorkerConfig) -> dict[str, str]:
    changes = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    return changes | ({} if config.gpus is None else {"CUDA_VISIBLE_DEVICES": config.gpus})


def serve(config: options.WorkerConfig) -> int:
    """Run the worker; returns the exit status."""
    from broker.peer.keys import KeyFileError, Keys
    from broker.protocol.tracing import make_tracer
    from worker.core.session import WorkerCore
    from worker.core.settings import Settings
    from worker.ending import sources
    from worker.ending.watch import EndWatch
    from worker.engines import registry
    from worker.loop import Link
    from worker.process.supervisor import Supervisor

    keys = None
    if config.join is not None:
        keys = Keys.invited(config.join)
    elif config.server_key is not None and config.key is not None:
        try:
            keys = Keys.load(config.server_key, config.key)
        except KeyFileError as error:
            print(f"worker: {error}", file=sys.stderr)
            return 2
    settings = Settings(
        name=config.worker_id,
        brokers=config.brokers,
        models=registry.announced(config.engine),
        instance=os.urandom(ID_BYTES),
        software=options.software(),
        speed=config.speed,
        engine=config.engine.engine,
        device=config.engine.device,
        grace_s=config.grace_s,
        drain_s=config.drain_s,
        stall_s=config.engine_stall_s,
        on_demand=config.on_demand or options.ADAPTERS_FOLDER in config.engine.engine_args,
    )
    fields = {
        "worker": config.worker_id,
        "models": ", ".join(settings.models),
        "broker": ", ".join(config.brokers),
    }
    log.info("worker starts", extra={"fields": fields})
    supervisor = Supervisor(config.engine, _environment(config))
    engine: EngineSide = supervisor
    load: Callable[[str, Collection[str]], None] = supervisor.load
    if config.on_demand:
        from worker.process.shelf import Shelf

        shelf = Shelf(
            config.engine,
            _environment(config),
            unload_idle_s=config.unload_idle_s,
            memory_bytes=config.models_memory_bytes,
            stall_s=config.engine_stall_s,
        )
        engine, load = shelf, shelf.load
    tracer = make_tracer("tokenbus-worker")
    if tracer is not None:
        from worker.process.traces import TracedEngine

        engine = TracedEngine(engine, tracer, config.worker_id)
    link = Link(
        WorkerCore(settings, time.monotonic()),
        engine,
        config.brokers,
        keys,
        LoadingDisplay(config.progress),
        ends=EndWatch(
            sources.chosen(config.ends_at, config.spot, config.notice_command, slurm=config.slurm),
            config.end_margin_s,
        ),
        load=load,
    )
    end = link.run()
    if end.message:
        with contextlib.suppress(OSError):  # a full disk does not change the exit status
            print(f"worker: {end.message}", file=sys.stderr)
    log.info("worker ends", extra={"fields": {"status": end.code}})
    return end.code


def check(config: options.WorkerConfig) -> int:
    """`--no-register`: load the engine and let each model answer one prompt; returns the exit
    status."""
    from worker.check import CheckFailed, check_engine

    try:
        report = check_engine(config.engine, _environment(config), LoadingDisplay(config.progress))
    except CheckFailed as error:
        print(f"worker: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
