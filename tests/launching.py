"""Real processes through the real launcher, with a time-out that kills them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    "--model.backbone=test_vit", "--model.weights=random", "--model.hidden_dim=32", "--model.num_layers=2",
    "--model.num_heads=4", "--model.num_kv_heads=2", "--model.expert_dim=32", "--model.segmentation_size=8",
    "--model.prune_after=1", "--data.workers=1", "--training.global_batch=8", "--training.micro_batch=2",
    "--training.warmup_steps=2", "--training.learning_rate=1e-3", "--training.image_every_steps=0",
    "--monitoring.console=false", "--engine.timeout_s=120",
    "--monitoring.ceiling_tflops=0.05",
]  # fmt: skip
"""A detector and a batch small enough for two processes on two cores; weights are randomly initialised."""


@dataclass
class Finished:
    """A launched job that has ended."""

    status: int
    output: str


class Job:
    """A launcher and its ranks, in a session of their own."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout: float) -> Finished:
        """Its end; a job that outlives the time-out is killed, ranks included, and fails the test."""
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            output, _ = self.process.communicate()
            pytest.fail(f"the job outlived {timeout} s:\n{output[-4000:]}")
        return Finished(self.process.returncode, output)

    def kill(self) -> None:
        """SIGKILL to the launcher's group; the kernel then kills the ranks (PR_SET_PDEATHSIG)."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def environment(**extra: str) -> dict[str, str]:
    """The environment of a launched job: this checkout first, one thread per process, modules compiled once for all."""
    foreign = ("ACCELERATE_", "PET_", "SLURM_", "PYTHONDONTWRITEBYTECODE")
    made = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    made.update(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", CUDA_VISIBLE_DEVICES="", **extra)
    return made


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(script: str, *arguments: str, processes: int = 2, config: str = "cpu.yaml", **extra: str) -> Job:
    """`accelerate launch` of a script of this repository."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", f"accelerate_configs/{config}", "--num_processes", str(processes),
        "--main_process_port", str(free_port()), script, *arguments,
    ]  # fmt: skip
    return Job(command, environment(**extra))


def spawn(function: Callable[..., None], *arguments: Any, processes: int = 2, timeout: float = 240) -> None:
    """`function(rank, *arguments)` in processes of their own; ranks that outlive the time-out are killed and fail the test."""
    import torch.multiprocessing as mp

    context = mp.spawn(function, arguments, nprocs=processes, join=False)
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=max(0.0, min(10.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                pytest.fail(f"the {processes} processes outlived {timeout} s")
    finally:
        for process in context.processes:
            process.kill()


def build_shards(folder: Path) -> None:
    """Shards of the embedded street benchmark: 40 photos, 64 px views, no target region."""
    command = [
        sys.executable, "-m", "shards.build", "--source", "street:40", "--out", str(folder), "--view-size", "64",
        "--processes", "2", "--val-fraction", "0.25",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def require(name: str, program: str, install: str) -> None:
    """Skip where the system lacks a program, unless ROADWORK_REQUIRE says that it must be there."""
    if shutil.which(program) is None:
        lacking(name, f"{program} is missing: {install}")


def lacking(name: str, what: str) -> NoReturn:
    """Skip for want of something, or fail where ROADWORK_REQUIRE says that it must be there."""
    if name in os.environ.get("ROADWORK_REQUIRE", "").split():
        pytest.fail(f"required here (ROADWORK_REQUIRE has {name}): {what}")
    pytest.skip(what)
