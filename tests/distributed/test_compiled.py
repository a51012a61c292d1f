"""ZeRO-2 in bf16 with compiled blocks and activation checkpointing trains as without them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.launching import TINY


def test_compiled_and_recomputed_steps_are_the_plain_ones(launch: Launch, shards: Path, tmp_path: Path) -> None:
    done = launch("tests/distributed/compiled_worker.py", str(tmp_path), *TINY, f"--data.shards={shards}",
                  "--model.trainable=full", "--model.dropout=0", "--model.metadata_dropout=0", timeout=300)  # fmt: skip
    assert done.status == 0, done.output[-4000:]
    runs = json.loads((tmp_path / "losses.json").read_text())
    plain, compiled = runs["plain"], runs["compiled"]
    assert plain["graphs"] == 0 < compiled["graphs"]
    assert (compiled["stage"], compiled["dtype"]) == (2, "bfloat16")
    assert compiled["compile"] == "per block, default" and compiled["activation_checkpointing"] == "on"
    assert plain["losses"][-1] != plain["losses"][0], "the steps changed nothing"
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=5e-3)
