"""What the drills share: options of a short run, damaged files, and what a run folder says."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from roadwork.data.index import ShardIndex
from roadwork.monitoring.runlog import read_last_per_step
from tests.launching import TINY

DRILL = "tests/faults/drill.py"
STEPS = 8


def options(run: Path, shards: Path, *more: str) -> list[str]:
    """A run of STEPS steps with two micro-batches each, validated after steps 3 and 6, saved after 2, 4, 6."""
    return [
        *TINY, "--engine.threads=1", f"--run.dir={run}", f"--data.shards={shards}", f"--training.max_steps={STEPS}",
        "--checkpoint.every_steps=2", "--training.validate_every_steps=3", *more,
    ]  # fmt: skip


def plan(*accidents: dict[str, Any]) -> str:
    return json.dumps(accidents)


def complete(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("checkpoints/step-*/COMPLETE"))


def losses(run: Path) -> list[float | None]:
    return [line["loss"] for line in read_last_per_step(run / "metrics.jsonl")]


def state(run: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run / "checkpoints" / f"step-{step:08d}"
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}


def counters(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "counters.json").read_text())


def assert_same_end(one: Path, other: Path) -> None:
    """Losses, every tensor of the last checkpoint, its counters and best/ are equal, bit for bit."""
    assert losses(one) == losses(other)
    assert complete(one)[-1] == complete(other)[-1]
    end = int(complete(other)[-1].removeprefix("step-"))
    mine, theirs = state(one, end), state(other, end)
    assert set(mine) == set(theirs)
    for file, tensors in mine.items():
        assert all(torch.equal(tensor, theirs[file][name]) for name, tensor in tensors.items()), file
    assert counters(one, end) == counters(other, end)
    assert (one / "best" / "model.safetensors").read_bytes() == (other / "best" / "model.safetensors").read_bytes()
    curves = [read_last_per_step(run / "validation.jsonl") for run in (one, other)]
    assert curves[0] == curves[1]


def wait_for(path: Path, seconds: float = 200) -> None:
    """Until a file is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear in {seconds} s"
        time.sleep(0.2)


def ranks(run: Path) -> list[int]:
    """Process ids that the ranks left in the run folder."""
    return [json.loads(path.read_text())["pid"] for path in sorted(run.glob("ranks/rank-*.json"))]


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def damaged_shards(shards: Path, to: Path, photos: int) -> list[str]:
    """A copy whose first training photos in the order of a run with seed 0 have broken pictures; their ids."""
    from roadwork.data.order import EndlessOrder

    shutil.copytree(shards, to)
    index = ShardIndex.open(str(to), "train")
    drawn = EndlessOrder(index.gps_weight, 0).at(torch.arange(STEPS * 8).numpy())
    rows = list(dict.fromkeys(int(row) for row in drawn))[:photos]
    for row in rows:
        with open(index.paths[int(index.shard[row])], "r+b") as file:
            file.seek(int(index.views_offset[row]) + int(index.views_size[row]) // 2)
            file.write(bytes(64))
            os.fsync(file.fileno())
    return [str(index.id[row]) for row in rows]
