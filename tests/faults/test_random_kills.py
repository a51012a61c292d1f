"""SIGKILL of a rank, of all, or of the launcher at random instants, relaunched at once: the curve does not show it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.scenes import assert_same_end, options, ranks
from tests.launching import start

LONG = os.environ.get("ROADWORK_DRILL") == "long"
KILLS = int(os.environ.get("ROADWORK_KILLS", "100"))
pytestmark = [
    pytest.mark.skipif(not LONG, reason="the long drill: make drill"),
    pytest.mark.timeout(KILLS * 240 + 600),
]


def test_killed_at_random_instants_it_ends_as_if_nothing_had_happened(shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ["--checkpoint.every_steps=1"]
    assert start("launch/pretrain.py", *options(whole, shards, *more)).wait(600).status == 0
    draw = random.Random(0)
    for kill in range(KILLS):
        for path in run.glob("ranks/rank-*.json"):
            path.unlink()
        job = start("launch/pretrain.py", *options(run, shards, *more))
        try:
            # From the engine's start on: a second more than what is left to train, checkpoint writes included.
            until = time.monotonic() + 200
            while len(list(run.glob("ranks/rank-*.json"))) < 2 and job.process.poll() is None:
                assert time.monotonic() < until, "the ranks did not start"
                time.sleep(0.05)
            time.sleep(draw.uniform(0, 6))
            victims = draw.choice([[job.process.pid], ranks(run)[:1], ranks(run)[1:], ranks(run)])
            for pid in victims:
                if job.process.poll() is None:
                    os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it had ended by itself
        finally:
            job.kill()
            job.process.communicate()
        if kill % 10 == 9:  # let it end now and then, and begin again
            assert start("launch/pretrain.py", *options(run, shards, *more)).wait(600).status == 0
            assert_same_end(run, whole)
            run = tmp_path / f"run-{kill}"
    assert start("launch/pretrain.py", *options(run, shards, *more)).wait(600).status == 0
    assert_same_end(run, whole)
