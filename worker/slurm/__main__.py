"""`python -m worker slurm`: keep workers for a broker running as Slurm jobs.

Runs wherever `sbatch` does; needs no GPU. Exit status: 0 when told to stop, 1 if `sbatch` is not
installed, 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from broker.protocol import logs
from broker.protocol.logs import FORMATS, LEVELS
from client import BusError, Client, Timeout
from worker import config as worker_config
from worker.engines import registry
from worker.slurm import commands
from worker.slurm.commands import SlurmError
from worker.slurm.core import Bounds, Fleet, Job, Plan, Sight, WorkerRow

log = logging.getLogger("worker.slurm")

LOOK_S: Final = 2.0
SLURM_S: Final = 5.0
"""Interval between questions to Slurm's controller, which serves the whole cluster."""
NEVER: Final = -math.inf
EXPECT_MS: Final = 30_000
FRONT: Final = "tcp://127.0.0.1:5555"

_EPILOG: Final = """\
What follows -- are options of `python -m worker`, as in the job's script; --worker-id is chosen
here. Each worker knows the limit of its job, and its streams move to another one in time.

example:
  python -m worker slurm --partition gpu --gres gpu:1 --time 1:00:00 --max 8 -- \\
      --broker tcp://login1:5556 --model-path Qwen/Qwen2.5-7B-Instruct
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m worker slurm",
        description="Submit workers as Slurm jobs while requests wait, and let them end when "
        "nothing does.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--front", metavar="ADDRESS", default=FRONT, help=f"the broker's front address [{FRONT}]"
    )
    made.add_argument("--server-key", metavar="FILE", help="the broker's public CURVE key")
    made.add_argument(
        "--operator-key", metavar="FILE", help="CURVE key pair of an operator (.key_secret)"
    )
    made.add_argument("--min", type=int, default=0, metavar="N", help="jobs always kept [0]")
    made.add_argument(
        "--max",
        type=int,
        default=4,
        metavar="N",
        help="maximum number of jobs, but for those that end soon [4]",
    )
    made.add_argument(
        "--idle-s",
        type=float,
        default=60.0,
        metavar="S",
        help="end a worker that has been idle for this long [60]",
    )
    made.add_argument(
        "--lead-s",
        type=float,
        default=60.0,
        metavar="S",
        help="submit a successor this long before a job that is needed ends [60]",
    )
    made.add_argument(
        "--name", default="tokenbus", help="name of the jobs, unique per launcher [tokenbus]"
    )
    for option, what in (
        ("partition", "partition"),
        ("gres", "such as gpu:1"),
        ("time", "time limit of a job, such as 1:00:00"),
        ("account", "account"),
        ("qos", "quality of service"),
        ("constraint", "features of the node"),
        ("cpus-per-task", "cores"),
        ("mem", "memory, such as 32G"),
        ("output", "file for the job's output"),
    ):
        made.add_argument(f"--{option}", metavar="X", help=f"for sbatch: {what}")
    made.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="any other option of sbatch, such as --sbatch=--exclusive; repeatable",
    )
    made.add_argument(
        "--setup",
        default="",
        metavar="LINE",
        help="shell line run before the worker, such as module load cuda",
    )
    made.add_argument("--log-level", choices=LEVELS, default="info")
    made.add_argument("--log-format", choices=FORMATS, default="auto")
    made.add_argument("worker", nargs=argparse.REMAINDER, metavar="-- WORKER OPTIONS")
    return made


_SBATCH: Final = (
    *("partition", "gres", "time", "account", "qos", "constraint"),
    *("cpus_per_task", "mem", "output"),
)


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    args = parser().parse_args(arguments)
    options = [option for option in args.worker if option != "--"]
    try:
        logs.configure(args.log_level, args.log_format, None)
        if "--worker-id" in options:
            raise worker_config.ConfigError("--worker-id is chosen here, from the job's number")
        if not 0 <= args.min <= args.max:
            raise worker_config.ConfigError("--min must be from 0 to --max")
        config = worker_config.parse(options)
    except worker_config.ConfigError as error:
        print(f"worker slurm: {error}", file=sys.stderr)
        return 2
    if shutil.which("sbatch") is None:
        print(
            "worker slurm: sbatch is not installed here: run this where jobs may be submitted",
            file=sys.stderr,
        )
        return 1
    launcher = Launcher(args, options, config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: launcher.stop.set())
    return launcher.run()


class Launcher:
    """The loop: look at broker and Slurm, decide, act."""

    def __init__(
        self,
        args: argparse.Namespace,
        options: list[str],
        config: worker_config.WorkerConfig,
    ) -> None:
        self.stop = threading.Event()
        self._args = args
        self._models = list(registry.announced(config.engine))
        bounds = Bounds(args.min, args.max, config.engine.slots or 8, args.idle_s, args.lead_s)
        self._fleet = Fleet(bounds, args.name)
        given = ((name, getattr(args, name)) for name in _SBATCH)
        self._sbatch = [f"--{name.replace('_', '-')}={value}" for name, value in given if value]
        self._sbatch += args.sbatch
        self._script = commands.script(args.name, options, Path.cwd(), args.setup)
        self._note = "starting: the launcher has just begun"
        self._jobs: list[Job] = []
        self._asked_s = NEVER

    def run(self) -> int:
        """Work until told to stop. Running workers stay; jobs that have not begun are cancelled."""
        keys: dict[str, Any] = {}
        if self._args.server_key or self._args.operator_key:
            keys = {"server_key": self._args.server_key, "key": self._args.operator_key}
        fields = {"models": ", ".join(self._models), "broker": self._args.front}
        log.info("launcher starts", extra={"fields": fields})
        with Client(self._args.front, timeout=Timeout(connect=5.0), **keys) as client:
            while not self.stop.is_set():
                try:
                    self._look(client)
                except BusError as error:
                    log.warning("broker", extra={"fields": {"cause": error.message}})
                except SlurmError as error:
                    log.warning("slurm", extra={"fields": {"cause": str(error)}})
                    self._note = "starting: Slurm accepts no jobs now"
                self.stop.wait(LOOK_S)
        with contextlib.suppress(SlurmError):
            jobs = commands.jobs(self._args.name)
            commands.cancel([job.id for job in jobs if job.state == "PENDING"])
        log.info("launcher ends", extra={"fields": {"running": "stay until their limits"}})
        return 0

    def _look(self, client: Client) -> None:
        args = {"models": self._models, "note": self._note, "ttl_ms": EXPECT_MS}
        seen = client.query("bus.expect", args, timeout=10.0)
        if time.monotonic() - self._asked_s >= SLURM_S:
            # If this fails nothing is decided: a job that is not seen would be submitted once more.
            self._jobs = commands.jobs(self._args.name)
            self._asked_s = time.monotonic()
        plan = self._fleet.decide(
            Sight(
                time.monotonic(),
                sum(seen["waiting"].values()),
                sum(seen["running"].values()),
                tuple(_row(row) for row in seen["workers"]),
                tuple(self._jobs),
            )
        )
        self._act(client, plan)

    def _act(self, client: Client, plan: Plan) -> None:
        if plan.note != self._note:
            self._note = plan.note
            client.query(
                "bus.expect", {"models": self._models, "note": plan.note, "ttl_ms": EXPECT_MS}
            )
        if plan.submit or plan.cancel:
            # Known again only when Slurm is asked again, also if a command fails after it worked.
            self._asked_s = NEVER
        for _ in range(plan.submit):
            job = commands.submit(self._args.name, self._sbatch, self._script)
            log.info("job submitted", extra={"fields": {"job": job}})
        if plan.cancel:
            commands.cancel(plan.cancel)
            log.info("jobs cancelled", extra={"fields": {"jobs": ", ".join(plan.cancel)}})
        for name in plan.drain:
            log.info("worker ends", extra={"fields": {"worker": name, "cause": "nothing to do"}})
            client.drain(name, reason="nothing waits")


def _row(row: dict[str, Any]) -> WorkerRow:
    left_ms = row.get("ends_in_ms")
    ends_in_s = None if left_ms is None else left_ms / 1000
    return WorkerRow(row["name"], row["state"], row["capacity"], row["running"], ends_in_s)
