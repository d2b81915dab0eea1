"""A real Slurm of two nodes on this machine, for tests. Needs root, slurmctld, slurmd and munged.

Two `slurmd` of one host work by -N; without systemd or cgroups they need proctrack/linuxproc and
task/none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo", "munge", "munged")
START_S = 60.0
END_S = 30.0


def missing() -> str:
    """Why Slurm cannot run here; empty if it can."""
    if os.geteuid() != 0:
        return "slurmctld and slurmd need root"
    absent = [name for name in NEEDED if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _configuration(folder: Path) -> str:
    host = socket.gethostname().partition(".")[0]
    control, first, second = _free_ports(3)
    return f"""\
ClusterName=t
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/d%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/d%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5
KillWait=5
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=10:00 State=UP
"""


def _munge(folder: Path) -> int | None:
    """Start a munged if none runs; returns its process id."""
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return None
    run, key = Path("/run/munge"), Path("/etc/munge/munge.key")
    run.mkdir(exist_ok=True)
    shutil.chown(run, "munge")
    if not key.exists() or not key.stat().st_size:
        key.write_bytes(os.urandom(1024))
        shutil.chown(key, "munge")
        key.chmod(0o400)
    subprocess.run(["su", "munge", "-s", "/bin/sh", "-c", "munged"], check=True)
    return int((run / "munged.pid").read_text())


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """A cluster; gives the environment for its commands. Its jobs and daemons end with it."""
    for name in ("state", "spooln1", "spooln2"):
        (folder / name).mkdir()
    file = folder / "slurm.conf"
    file.write_text(_configuration(folder))
    environment = {**os.environ, "SLURM_CONF": str(file)}
    munged = _munge(folder)
    try:
        subprocess.run(["slurmctld", "-f", str(file)], check=True, env=environment)
        for node in ("n1", "n2"):
            subprocess.run(["slurmd", "-N", node, "-f", str(file)], check=True, env=environment)
        until_s = time.monotonic() + START_S
        command = ["sinfo", "-h", "-o", "%T%D"]
        while "idle2" not in (
            said := subprocess.run(command, capture_output=True, text=True, env=environment).stdout
        ):
            assert time.monotonic() < until_s, f"the nodes are not idle: {said!r}"
            time.sleep(0.2)
        yield environment
    finally:
        subprocess.run(["scancel", "-u", "root"], env=environment, check=False)
        time.sleep(1.0)  # its slurmd must still be there to end a job
        pids = [folder / name for name in ("dn1.pid", "dn2.pid", "ctld.pid")]
        found = [int(pid.read_text()) for pid in pids if pid.exists()]
        for pid in [*found, *([munged] if munged is not None else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 15)
        until_s = time.monotonic() + END_S  # they write their state into the folder
        while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < until_s:
            time.sleep(0.1)
