"""A shard that turns out altered in the middle of a run: every rank stops, one line, and the checkpoints stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from roadwork.data.index import ShardIndex, write_index
from roadwork.data.order import EndlessOrder
from roadwork.data.scan import scan_shard
from roadwork.data.shards import read_samples, shard_name, write_shard
from tests.conftest import Launch
from tests.faults.scenes import complete, losses, options

pytestmark = pytest.mark.timeout(900)


def one_photo_each(shards: Path, to: Path) -> None:
    """The same photos in shards of one photo."""
    to.mkdir()
    scanned = []
    for split in ("train", "val"):
        samples = [sample for path in sorted(shards.glob(f"{split}-*.tar")) for sample in read_samples(path)]
        for number, sample in enumerate(samples):
            path = to / shard_name(split, number)
            write_shard(path, [sample])
            scanned.append(scan_shard(path))
    write_index(to, scanned)


def test_a_shard_altered_at_its_source_stops_every_rank_with_one_line(
    launch: Launch, shards: Path, tmp_path: Path
) -> None:
    """One rank alone meets it, in the third step: neither is its photo left out, nor do its peers wait for it."""
    far = tmp_path / "far"
    one_photo_each(shards, far)
    index = ShardIndex.open(far, "train")
    drawn = EndlessOrder(index.gps_weight, 0).at(np.arange(len(index)))
    row = int(drawn[22])
    assert row not in drawn[:22]
    path = far / index.shards[index.shard[row]].name
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)

    run = tmp_path / "run"
    more = (
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--data.bad_sample_budget=0.9",
        "--training.validate_every_steps=100",
    )
    done = launch("launch/pretrain.py", *options(run, Path("far"), *more, f"--data.shards=file://{far}"))
    said = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert done.status != 0 and len(said) == 1, done.output[-3000:]
    assert f"{path.name} is altered" in said[0] and "launch again" in said[0]
    assert done.output.count("Traceback") == 1, "only the launcher's own"
    assert complete(run) == ["step-00000002"] and len(losses(run)) == 2
