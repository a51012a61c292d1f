"""launch/find_lr.py on two real processes under ZeRO-2: what it leaves, and that nothing else is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Launch
from tests.launching import TINY


def test_it_leaves_its_curve_and_neither_a_checkpoint_nor_changed_weights(
    launch: Launch, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = launch("tests/distributed/watch_lr.py", str(tmp_path / "seen"), *TINY, f"--run.dir={run}",
                  f"--data.shards={shards}", "--training.max_steps=9", "--lr_finder.steps=4", "--lr_finder.start=1e-5",
                  "--lr_finder.end=1e-2", "--lr_finder.divergence=100", "--data.workers=0")  # fmt: skip
    assert done.status == 0, done.output[-3000:]
    for rank in range(2):
        seen = json.loads((tmp_path / f"seen-{rank}.json").read_text())
        assert (seen["stage"], seen["world"]) == (2, 2)
        assert all(seen["moved"].values()), "the test trained nothing"
        assert not any(seen["left"].values()), "the test left its own weights or optimizer state"
    found = json.loads((run / "lr_finder.json").read_text())
    assert found["rates"] == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2]) and len(found["losses"]) == 4
    assert (run / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    said = "suggested learning rate: " if found["suggestion"] else "the loss never fell"
    assert done.output.count(said) == 1, "rank 0 alone says what it found"
    board = EventAccumulator(str(run / "tensorboard" / "lr_finder")).Reload()
    assert [event.value for event in board.Scalars("lr_finder/loss")] == pytest.approx(found["losses"])
    assert "lr_finder/curve" in board.Tags()["images"]
    assert not list(run.glob("checkpoints/*")) and not (run / "metrics.jsonl").exists()
