"""launch/slurm under a real Slurm: two nodes train, are interrupted in Slurm's own ways, and end as if nothing was."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import pytest

from roadwork.config import save
from tests.inference.small_run import make
from tests.launching import ROOT, TINY, require
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
STEPS = 20
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


def readme_line(stage: str, **places: Path) -> tuple[tuple[str, ...], list[str]]:
    """sbatch's options and the stage's in the README's line for it, its folders `/shared/...` exchanged by their names.

    GPUs are left out: the cluster has none.
    """
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(rf"^sbatch .*launch/slurm/{stage}\.sbatch .*", text, flags=re.M)
    folders = {"/shared/runs/big": "run", "/shared/runs/whole": "run"}
    folders |= {"/shared/shards/natix": "shards", "/shared/runs/whole/shards": "shards"}
    words = [str(places[folders[word]]) if word in folders else word for word in shlex.split(line)]
    at = words.index(f"launch/slurm/{stage}.sbatch")
    return tuple(word for word in words[1:at] if not word.startswith(("--gpus", "--cpus-per-gpu"))), words[at + 1 :]


def submit(cluster: Cluster, stage: str, *words: str, sbatch: tuple[str, ...] = ("--nodes=2",)) -> str:
    """Submit a batch script of the repository; returns the job's number."""
    export = f"--export=ALL,PYTHON={sys.executable}"
    output = f"--output={cluster.folder}/job-%j.log"
    return cluster.tell("sbatch", "--parsable", export, output, *sbatch, f"launch/slurm/{stage}.sbatch", *words)


WAITS = """#!/usr/bin/env bash
# Stands for the stage's python: launched first it waits until it is stopped, or let go by a file, launched again it is
# done at once.
case "$*" in
  *accelerate*) [ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0
    trap 'exit 143' TERM USR2
    until [ -e "$0.go" ]; do sleep 1 & wait $!; done ;;
  *) exec {python} "$@" ;;
esac
"""


def that_waits(folder: Path) -> Path:
    """A stage's python for a job that only waits."""
    python = folder / "python"
    python.write_text(WAITS.format(python=sys.executable))
    python.chmod(0o755)
    return python


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job with a minute to run, Slurm's least, that waits through it on a node of its own beside the other tests."""
    folder = tmp_path_factory.mktemp("limited")
    # The script's own warning would come before the limit: another one, which nobody minds.
    limits = ("--partition=aside", "--time=1", "--signal=B:CONT@1", f"--export=ALL,PYTHON={that_waits(folder)}")
    return submit(cluster, "predict", f"--run.dir={folder / 'run'}", sbatch=limits)


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


def newest(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    return max((int(path.parent.name[-8:]) for path in folder.glob("checkpoints/step-*/COMPLETE")), default=0)


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
    sbatch, words = readme_line("pretrain", run=folder, shards=shards)
    job = submit(cluster, "pretrain", *words, *OPTIONS, sbatch=sbatch)
    cluster.until(lambda: ended(cluster, job), 3 * 180, f"job {job} to end")
    return folder


def test_two_nodes_train_one_model(cluster, uninterrupted):
    assert sorted(steps(uninterrupted)) == list(range(1, STEPS + 1))
    assert [rank["rank"] for rank in ranks(uninterrupted)] == [0, 1]
    assert (uninterrupted / "best" / "model.safetensors").is_file()
    nodes = {path.name for path in uninterrupted.glob("logs/slurm-*/node-*")}
    assert nodes == {"node-0-n0", "node-1-n1"}


@contextmanager
def frozen(cluster: Cluster, job: str, folder: Path, launch: int) -> Iterator[int]:
    """Hold the job in the middle of its training: rank 1 is stopped after two steps of this launch; yields the step."""
    before = len(steps(folder))
    cluster.until(lambda: f"launch {launch}," in said(cluster, job), 3 * 120, f"launch {launch} of job {job}")
    cluster.until(lambda: ended(cluster, job) or len(steps(folder)) >= before + 2, 3 * 180, f"steps of launch {launch}")
    pid = ranks(folder)[1]["pid"]
    os.kill(pid, signal.SIGSTOP)
    try:
        assert len(steps(folder)) < STEPS, "the job was over before it could be held"
        yield len(steps(folder))
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def saved_on(folder: Path, number: int) -> bool:
    """Whether the ranks saved because of this signal."""
    return f"signal {number}: checkpoint of step" in (folder / "logs" / "pretrain-rank-0000.log").read_text()


def test_preempted_out_of_time_and_killed_it_comes_back_by_itself_and_ends_as_if_nothing_was(
    cluster, uninterrupted, shards, tmp_path
):
    folder = tmp_path / "run"
    job = submit(cluster, "pretrain", f"--run.dir={folder}", f"--data.shards={shards}", *OPTIONS)

    with frozen(cluster, job, folder, launch=1):  # preemption: Slurm sends SIGTERM to every process, and requeues
        cluster.tell("scontrol", "requeue", job)
        time.sleep(1)
    cluster.until(lambda: cluster.state(job).get("Restarts") == "1", 3 * 90, "the preempted job to be requeued")
    cluster.until(lambda: saved_on(folder, signal.SIGTERM), 3 * 60, "its checkpoint")
    first = newest(folder)
    assert 0 < first < STEPS

    with frozen(cluster, job, folder, launch=2):  # the time limit comes near: Slurm warns the batch script
        cluster.tell("scontrol", "update", f"JobId={job}", "TimeLimit=2")
        cluster.until(lambda: "warned (SIGUSR2)" in said(cluster, job), 3 * 120, "the warning of the time limit")
        cluster.tell("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.until(lambda: cluster.state(job).get("Restarts") == "2", 3 * 90, "the job to requeue itself")
    cluster.until(lambda: saved_on(folder, signal.SIGUSR2), 3 * 60, "its checkpoint")
    second = newest(folder)
    assert first < second < STEPS

    with frozen(cluster, job, folder, launch=3):  # a rank does not answer the warning: Slurm ends the job at its limit
        cluster.tell("scontrol", "update", f"JobId={job}", "TimeLimit=1")
        cluster.until(lambda: said(cluster, job).count("terminated (SIGTERM)") == 2, 3 * 120, "the time limit")
    cluster.until(
        lambda: cluster.state(job).get("Restarts") == "3", 3 * 120, "the job that ran out of time to requeue itself"
    )
    cluster.tell("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    third = newest(folder)
    assert second <= third < STEPS

    cluster.until(lambda: ended(cluster, job) or newest(folder) > third, 3 * 240, "a checkpoint of launch 4")
    os.kill(ranks(folder)[1]["pid"], signal.SIGKILL)  # a rank is lost: no signal, no save
    cluster.until(lambda: cluster.state(job).get("Restarts") == "4", 3 * 120, "the failed job to requeue itself")
    cluster.until(lambda: ended(cluster, job), 3 * 240, "the job to end")

    assert losses(folder) == losses(uninterrupted)
    assert "pretrain is done" in said(cluster, job)


def array_ends(cluster: Cluster, array: str) -> None:
    """Wait for both tasks of an array; fails with what they printed unless both are complete."""
    cluster.until(lambda: not cluster.ask("squeue", "-h", "-j", array), 3 * 180, f"the tasks of {array} to end")
    states = [cluster.state(f"{array}_{task}").get("JobState") for task in (0, 1)]
    printed = "\n".join(path.read_text() for path in sorted(cluster.folder.glob("job-*.log"))[-2:])
    assert states == ["COMPLETED", "COMPLETED"], printed


def test_the_tasks_of_an_array_share_the_folds_and_a_job_predicts_with_them(cluster, tmp_path):
    config = make(tmp_path)
    folder = Path(config.run.dir)
    config.engine.threads, config.folds.num_folds, config.folds.epochs = 1, 4, 1
    save(config, folder / "config.yaml")
    sbatch, words = readme_line("dora_folds", run=folder)
    array_ends(cluster, submit(cluster, "dora_folds", *words, sbatch=sbatch))
    assert all((folder / "folds" / f"fold-{fold}" / "COMPLETE").is_file() for fold in range(4))
    assert len((folder / "folds" / "oof.csv").read_text().splitlines()) > 1
    assert len(list(folder.glob("logs/slurm-*"))) == 2
    sbatch, words = readme_line("predict", run=folder)
    job = submit(cluster, "predict", *words, sbatch=sbatch)
    cluster.until(lambda: ended(cluster, job), 3 * 180, f"job {job} to end")
    assert (folder / "predictions.csv").is_file() and (folder / "model" / "model.safetensors").is_file()


def test_the_pipelines_line_is_understood(cluster, tmp_path):
    sbatch, words = readme_line("pipeline", run=tmp_path / "run", shards=tmp_path / "shards")
    job = submit(cluster, "pipeline", *words, "--dry_run", sbatch=sbatch)
    cluster.until(lambda: ended(cluster, job), 3 * 90, f"job {job} to end")
    printed = said(cluster, job)
    assert f"--source natix --out {tmp_path / 'shards'}" in printed and "pretrain: to do" in printed


def test_the_tasks_of_an_array_label_each_photo_once(cluster, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)
    for number, photo in enumerate(pixels):
        cv2.imwrite(str(tmp_path / f"{number}.jpg"), photo)
    (tmp_path / "photos.csv").write_text("path,label\n" + "".join(f"{number}.jpg,1\n" for number in range(8)))
    given = [f"--run.dir={tmp_path / 'run'}", f"--masks.source=csv:{tmp_path / 'photos.csv'}", "--engine.threads=1"]
    given += ["--masks.model=random-tiny", "--masks.score_threshold=0.2", "--masks.batch=1"]
    array_ends(cluster, submit(cluster, "pseudo_masks", *given, sbatch=("--array=0-1",)))
    masks = tmp_path / "run" / "masks"
    assert len(list(masks.glob("*.png"))) == len(list(masks.glob("*.json"))) == 8
    assert json.loads((masks / "about" / "summary.json").read_text())["photos"] == 8
    printed = "".join(path.read_text() for path in cluster.folder.glob("job-*.log"))
    assert printed.count("8 photos, masks by random-tiny (randomly initialised), 2 processes") == 2
    assert "8 made now" in printed, "the two together made each photo's once"


def test_a_warning_to_the_task_that_has_its_arrays_number_leaves_the_other_tasks_alone(cluster, tmp_path):
    python = that_waits(tmp_path)
    words = ("--array=0-1", f"--export=ALL,PYTHON={python}")
    array = submit(cluster, "predict", f"--run.dir={tmp_path / 'run'}", sbatch=words)
    tasks = [f"{array}_{number}" for number in (0, 1)]
    running = ("squeue", "-h", "-s", "-j", array, "-o", "%i")
    cluster.until(lambda: {f"{task}.0" for task in tasks} <= {*cluster.ask(*running).split()}, 3 * 60, "both steps")
    warned, other = sorted(tasks, key=lambda task: cluster.state(task)["JobId"] != array)
    cluster.tell("scancel", "--batch", "--signal=USR2", warned)
    cluster.until(lambda: cluster.state(warned).get("Restarts") == "1", 3 * 60, f"{warned} to requeue itself")
    python.with_name("python.go").touch()
    array_ends(cluster, array)
    assert cluster.state(other)["Restarts"] == "0"


def test_a_dry_run_is_done_at_once_and_says_where_processors_are_too_few(cluster, shards, tmp_path):
    words = (f"--run.dir={tmp_path / 'run'}", f"--data.shards={shards}", *OPTIONS, "--dry_run")
    export = f"--export=ALL,PYTHON={sys.executable},ROADWORK_PROCESSES=2"
    job = submit(cluster, "pretrain", *words, sbatch=("--nodes=1", export))
    cluster.until(lambda: ended(cluster, job), 3 * 120, f"job {job} to end")
    assert cluster.state(job)["Restarts"] == "0"
    printed = said(cluster, job)
    assert "pretrain is done" in printed and "1 CPUs on a node for 2 processes" in printed and "parameters" in printed


def test_a_wrong_option_ends_the_job_with_its_line_and_is_not_tried_again(cluster, tmp_path):
    job = submit(cluster, "pretrain", f"--run.dir={tmp_path}", "--training.micro_bach=2")
    cluster.until(lambda: cluster.state(job).get("JobState") == "FAILED", 3 * 60, "the job to fail")
    assert "micro_batch" in said(cluster, job)
    assert cluster.state(job)["ExitCode"] == "2:0"
    assert cluster.state(job)["Restarts"] == "0"


def test_killed_by_its_time_limit_without_a_warning_a_job_comes_back(cluster, limited):
    cluster.until(lambda: cluster.state(limited).get("Restarts") == "1", 3 * 120, "the job to be requeued")
    cluster.until(lambda: cluster.state(limited).get("JobState") == "COMPLETED", 3 * 60, "the job to end")
    printed = said(cluster, limited)
    assert "warned" not in printed and "terminated (SIGTERM): the ranks save and stop" in printed
    assert "not finished: back into the queue" in printed and "predict is done" in printed
