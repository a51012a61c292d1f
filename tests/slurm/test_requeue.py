"""Whether the batch shell puts a failed job back: programs on the PATH stand for Slurm's, so no cluster is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launching import ROOT, environment

SCONTROL = """#!/usr/bin/env bash
case $1 in
  requeue) echo "$2" >> "$NOTES/requeued" ;;
  show)
    [ -e "$NOTES/ending" ] && state=COMPLETING || state=RUNNING
    case $2 in
      hostnames) echo localhost ;;
      node) echo "NodeName=n0 NodeAddr=127.0.0.1 " ;;
      job) # first another task, of which the opposite holds
        echo "JobId=8 ArrayJobId=7 JobState=RUNNING Reason=TimeLimit "
        echo "JobId=7 ArrayJobId=7 JobState=$state Reason=${REASON:-None} " ;;
    esac ;;
esac
"""
SRUN = """#!/usr/bin/env bash
mkdir -p "$(dirname "$MADE")" && [ "$MADE" != /dev/null ] && echo more >> "$MADE"
if [ -n "${REASON:-}" ]; then touch "$NOTES/ending"; kill -TERM "$(cat "$NOTES/shell")"; sleep 1; fi
exit "$STATUS"
"""


def job(stage: str, folder: Path, made: str, status: int = 1, reason: str = "") -> tuple[int, bool, str]:
    """Run a stage's job whose ranks leave a file in the run folder and end with a status: (status, requeued, output).

    With a reason, as in `scontrol show job`, Slurm terminates the job (SIGTERM to the batch shell) while they run.
    """
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    notes = folder / "requeued"
    for left in (notes, folder / "ending"):
        left.unlink(missing_ok=True)
    given = environment(
        PATH=f"{programs}:{os.environ['PATH']}", PYTHON=sys.executable, NOTES=str(folder), STATUS=str(status),
        MADE=str(folder / "run" / made) if made else "/dev/null", SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n0",
        SLURM_JOB_NUM_NODES="1", REASON=reason,
    )  # fmt: skip
    script = (
        f"echo $$ > {folder / 'shell'}; source launch/slurm/launch.sh; roadwork_job {stage} --run.dir={folder / 'run'}"
    )
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    return done.returncode, notes.exists(), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("stage", "made"),
    [("dora_folds", "folds/prefix/chunk-00000"), ("predict", "parts/test-rank-00000.jsonl")],
)
def test_a_lost_rank_puts_the_job_back_once_it_has_come_further(stage: str, made: str, tmp_path: Path) -> None:
    status, requeued, output = job(stage, tmp_path, made)
    assert requeued and status == 0, output
    assert "after it had come further" in output


def test_a_job_that_comes_no_further_stays_down(tmp_path: Path) -> None:
    assert job("pseudo_masks", tmp_path, "masks/photo.png")[1]
    status, requeued, output = job("pseudo_masks", tmp_path, "logs/pseudo_masks-rank-0000.log")
    assert not requeued and status == 1, output


@pytest.mark.parametrize(("reason", "comes_back"), [("TimeLimit", True), ("JobHeldUser", False)])
def test_a_job_that_its_time_limit_ends_comes_back_and_one_that_was_cancelled_does_not(
    reason: str, comes_back: bool, tmp_path: Path
) -> None:
    status, requeued, output = job("pretrain", tmp_path, "", status=143, reason=reason)
    assert "terminated (SIGTERM): the ranks save and stop" in output
    assert (requeued, status) == ((True, 0) if comes_back else (False, 143)), output


def test_a_stage_that_a_time_limit_cut_off_is_not_called_done_although_srun_said_0(tmp_path: Path) -> None:
    status, requeued, output = job("predict", tmp_path, "", status=0, reason="TimeLimit")
    assert requeued and status == 0, output
    assert "predict is done" not in output and "not finished: back into the queue" in output


def test_a_job_that_is_done_is_not_put_back(tmp_path: Path) -> None:
    status, requeued, output = job("pseudo_masks", tmp_path, "masks/photo.png", status=0)
    assert not requeued and status == 0 and "pseudo_masks is done" in output
