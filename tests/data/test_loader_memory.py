"""What a loader process holds in memory with photos of the size that real runs have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from roadwork.data.index import ShardIndex
from roadwork.data.loader import TrainLoader
from roadwork.data.order import EndlessOrder
from tests.data.sheets import build
from tests.launching import ROOT, environment

LIMIT_MIB = 300
"""Per worker, above the bare process."""


def proportional_mib(pid: int) -> float:
    """MiB of RAM of a process; a page shared with others (the batches are) counts by its share."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("\nPss:")[1].split()[0]) / 1024


def bare_worker_mib() -> float:
    """A process that has imported what a worker imports, and has not seen a photo."""
    code = "import roadwork.data.worker; print('ready', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment(), **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == b"ready\n"
        bare = proportional_mib(process.pid)
        process.communicate(b"\n")
    return float(bare)


def test_a_worker_with_views_of_512_stays_within_its_memory(tmp_path: Path) -> None:
    """A batch of 4 photos of 8 views of 512 px has 24 MiB; several lie in shared memory at a time."""
    bare = bare_worker_mib()
    folder = build(tmp_path / "shards", {"train": 10}, size=512)
    index = ShardIndex.open(folder, "train")
    loader = TrainLoader(
        index, EndlessOrder(index.gps_weight, 1), global_batch=4, micro_batch=4, workers=2, end_position=None
    )
    batches = iter(loader)
    peak = 0.0
    for _ in range(20):
        batch = next(batches)
        assert batch.views.shape[2:] == (3, 512, 512) and batch.views.shape[1] >= 8
        peak = max(peak, *(proportional_mib(process.pid) - bare for process in loader._pools[0]._processes))
    loader.close()
    assert 24 / 3 < peak <= LIMIT_MIB, f"{peak:.0f} MiB above the bare process of {bare:.0f} MiB"
