"""NaN, unreadable photos, full and read-only disks: one clear line, and nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from roadwork.monitoring.runlog import read_last_per_step
from tests.conftest import Launch
from tests.faults.scenes import DRILL, STEPS, complete, counters, damaged_shards, losses, options, plan, state
from tests.launching import ROOT, environment, lacking

pytestmark = pytest.mark.timeout(900)
MIB = 2**20


def alone(*command: str) -> subprocess.CompletedProcess[str]:
    """One process without a launcher."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900
    )


def said(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB; without the right to mount one the test is skipped, where Slurm is required it fails."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        lacking("slurm", f"mounting a small tmpfs is not permitted: {done.stderr.strip()}")  # CI is root for both
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_nan_on_one_rank_steps_no_rank_an_unreadable_photo_is_left_out_and_a_slow_rank_is_told(
    launch: Launch, shards: Path, tmp_path: Path
) -> None:
    run, copy = tmp_path / "run", tmp_path / "shards"
    (photo,) = damaged_shards(shards, copy, 1)
    # The loss of one rank is NaN, or one of its gradients infinite while the loss is finite, in either micro-batch.
    planned = {1: ("nan", 0), 4: ("inf", 0), 5: ("nan", 1), 6: ("nan", 1)}
    events = [{"step": step, "micro": micro, "rank": 1, "do": do} for step, (do, micro) in planned.items()]
    events += [{"step": 2, "micro": micro, "rank": micro, "do": "sleep", "seconds": 4 - micro} for micro in range(2)]
    more = ["--checkpoint.every_steps=1", "--checkpoint.keep_last=9", "--training.validate_every_steps=100"]
    done = launch(DRILL, plan(*events), *options(run, copy, *more))

    assert "2" in [word for line in done.output.splitlines() if "exitcode" in line for word in line.split()]
    assert len(said(done.output)) == 1 and "3 steps in a row" in said(done.output)[0]
    assert "step 2 skipped on all ranks: the loss of rank 1 is not finite" in done.output
    assert "step 5 skipped on all ranks: a gradient is not finite" in done.output
    before, after, later = (state(run, step) for step in (1, 2, 3))
    for file in before:
        assert all(torch.equal(before[file][name], after[file][name]) for name in before[file]), file
    assert any(not torch.equal(after["master"][name], later["master"][name]) for name in after["master"])
    assert all(torch.isfinite(tensor).all() for tensor in state(run, 6)["master"].values())
    assert [i + 1 for i, loss in enumerate(losses(run)) if loss is None] == [2, 6, 7]
    assert (counters(run, 2)["nonfinite_steps"], counters(run, 3)["nonfinite_steps"]) == (1, 0)

    # Rank 0 slept before the first micro-batch for longer than rank 1 before the second: each waited for the other.
    slow = read_last_per_step(run / "metrics.jsonl")[2]
    assert slow["slowest_rank"] == 0 and slow["slowest_over_median"] > 1 and slow["step_s"] > 7

    lines = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [photo] and lines[0]["reason"]
    assert [name for name, _ in counters(run, 6)["skipped"]] == [photo]
    assert f"photo {photo} is left out" in done.output


def test_too_many_unreadable_photos_stop_every_rank_with_one_line(launch: Launch, shards: Path, tmp_path: Path) -> None:
    """The budget is judged over all ranks: no rank leaves alone, whichever read the broken photos."""
    copy = tmp_path / "shards"
    damaged_shards(shards, copy, 6)
    done = launch("launch/pretrain.py", *options(tmp_path / "run", copy))
    assert done.status != 0
    assert len(said(done.output)) == 1 and "data.bad_sample_budget" in said(done.output)[0], done.output[-2000:]
    assert done.output.count("Traceback") == 1, "only the launcher's own"


@pytest.mark.parametrize("accident", ["fill", "readonly"])
def test_a_disk_that_takes_no_more_costs_a_checkpoint_and_a_launch_on_a_read_only_one_is_refused(
    accident: str, small_disk: Path, shards: Path, tmp_path: Path
) -> None:
    run, note = small_disk / "run", tmp_path / "note.json"
    fill = {"step": 3, "rank": 0, "do": accident, "leave": 0}  # after the checkpoint of step 2: 3's line does not fit
    free = {"step": 5, "rank": 0, "do": "free", "note": str(note)}
    done = alone(DRILL, plan(fill, free), *options(run, shards))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "checkpoint not written" in done.stderr and "Logging error" not in done.stderr
    assert json.loads(note.read_text()) == ["step-00000002"], "the newest complete checkpoint was lost"
    assert complete(run) == ["step-00000006", "step-00000008"]
    assert len(losses(run)) == STEPS, "lines that the full disk refused were not written later"

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused = alone("launch/pretrain.py", *options(run, shards))
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1 and "cannot be written" in said(refused.stderr)[0], refused.stderr
    assert os.access(run / "checkpoints" / "step-00000008" / "COMPLETE", os.R_OK)
