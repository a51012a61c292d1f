"""A real Slurm of three one-processor nodes on this machine, in a folder of its own: munged, slurmctld, three slurmd."""

from __future__ import annotations

import getpass
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launching import ROOT, environment, free_port

CONFIGURATION = """
ClusterName=roadwork
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
# The job's number gives its port: another such cluster may run on this machine.
FirstJobId={first}
# Tests ask for a job that ended however long those beside them take.
MinJobAge=7200
KillWait=60
ReturnToService=2
PropagateResourceLimits=NONE
NodeName=n0 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[4]} CPUs=1
PartitionName=all Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP
# For a job that only waits, beside those that compute.
PartitionName=aside Nodes=n2 MaxTime=INFINITE State=UP
"""
NODES = ("n0", "n1", "n2")


class Cluster:
    """Starts the daemons in the foreground as children of the test, so that it stops what it started and no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"))

    def start(self) -> None:
        """Bring all nodes to idle. Fails the test with the daemons' logs where that takes a minute."""
        folder = self.folder
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        ports = [free_port() for _ in range(5)]
        first = 1 + 20 * secrets.randbelow(500)
        text = CONFIGURATION.format(folder=folder, ports=ports, first=first, user=getpass.getuser())
        (folder / "slurm.conf").write_text(text)
        files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        self.until(lambda: (folder / "munge.socket").exists(), 20, "munged to listen")
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self.until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 3, 60, "idle nodes")

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}-{len(self.daemons)}.out", "wb") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append((command[0], process))

    def ask(self, *command: str) -> str:
        """Output of a Slurm command; empty where it fails (the controller may still be starting)."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)
        return done.stdout if done.returncode == 0 else ""

    def tell(self, *command: str) -> str:
        """Output of a Slurm command that must work."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, holds: Callable[[], object], timeout: float, what: str) -> None:
        """Wait for something; a time-out fails the test and shows the daemons' logs."""
        deadline = time.monotonic() + timeout
        while not holds():
            if time.monotonic() > deadline:
                pytest.fail(f"waited {timeout:.0f} s for {what}\n{self.logs()}")
            time.sleep(0.25)

    def logs(self) -> str:
        """Ends of all logs, for the message of a failed test."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in files)

    def stop(self) -> None:
        """Cancel this cluster's jobs, then end the daemons, newest first."""
        self.ask("scancel", "--quiet", "--full", "--signal=KILL", "--user", getpass.getuser())
        if self.daemons:
            deadline = time.monotonic() + 15
            while self.ask("squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.25)
        for _, process in reversed(self.daemons):
            process.send_signal(signal.SIGTERM)
        for _, process in reversed(self.daemons):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
