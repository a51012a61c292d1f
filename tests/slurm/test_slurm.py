"""launch/slurm under a real Slurm: two nodes train, are interrupted in every way that Slurm has, and end as if nothing was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launching import TINY, require
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
STEPS = 16
OPTIONS = [
    *TINY, "--engine.threads=1", f"--training.max_steps={STEPS}", "--checkpoint.every_steps=4",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two idle nodes; whatever was started is stopped at the end."""
    for program in ("slurmctld", "slurmd", "sbatch", "munged"):
        require("slurm", program, "apt-get install slurmctld slurmd slurm-client munge")
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def submit(cluster: Cluster, stage: str, *words: str, sbatch: tuple[str, ...] = ("--nodes=2",)) -> str:
    """Submit a batch script of the repository; returns the job's number."""
    export = f"--export=ALL,PYTHON={sys.executable}"
    output = f"--output={cluster.folder}/job-%j.log"
    return cluster.tell("sbatch", "--parsable", export, output, *sbatch, f"launch/slurm/{stage}.sbatch", *words)


def said(cluster: Cluster, job: str) -> str:
    """What the job has printed, on all its launches."""
    path = cluster.folder / f"job-{job}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def ended(cluster: Cluster, job: str) -> bool:
    """True once a job is complete; fails at once where it ended in any other way."""
    state = cluster.state(job).get("JobState", "")
    if state in ("FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY"):
        pytest.fail(f"job {job} is {state}:\n{said(cluster, job)[-6000:]}")
    return state == "COMPLETED"


def steps(folder: Path) -> dict[int, dict[str, float]]:
    """Last whole line for each step of metrics.jsonl."""
    found = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # being written
        found[record["step"]] = record
    return found


def losses(folder: Path) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and photos seen of every step."""
    return [(r["loss"], r["grad_norm"], r["samples_seen"]) for _, r in sorted(steps(folder).items())]


def ranks(folder: Path) -> list[dict[str, int]]:
    """Host, pid and phase of the ranks."""
    return [json.loads(path.read_text()) for path in sorted((folder / "ranks").glob("rank-*.json"))]


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a two-node job that nobody disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    job = submit(cluster, "pretrain", f"--run.dir={folder}", f"--data.shards={shards}", *OPTIONS)
    cluster.until(lambda: ended(cluster, job), 180, f"job {job} to end")
    return folder


def test_two_nodes_train_one_model(cluster, uninterrupted):
    assert sorted(steps(uninterrupted)) == list(range(1, STEPS + 1))
    assert [rank["rank"] for rank in ranks(uninterrupted)] == [0, 1]
    assert (uninterrupted / "best" / "model.safetensors").is_file()
    written = {path.parent.name for path in uninterrupted.glob("logs/slurm-*/node-*")}
    assert len(written) == 1
    nodes = {path.name for path in uninterrupted.glob("logs/slurm-*/node-*")}
    assert nodes == {"node-0-n0", "node-1-n1"}
