"""Signals, kills, damaged and half-written checkpoints: a relaunch ends where an uninterrupted run ends, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.faults.scenes import (
    DRILL,
    alive,
    assert_same_end,
    complete,
    counters,
    options,
    plan,
    ranks,
    wait_for,
)
from tests.launching import Finished, start

pytestmark = pytest.mark.timeout(900)


def ended_well(done: Finished) -> Finished:
    assert done.status == 0, done.output[-3000:]
    return done


@pytest.fixture(scope="module")
def whole(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    ended_well(start("launch/pretrain.py", *options(run, shards)).wait(900))
    return run


def test_stopped_twice_and_damaged_it_ends_as_if_nothing_had_happened(
    launch: Launch, whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = options(run, shards)
    # SIGKILL to all ranks at the worst instant of a write: step 4's folder has its name and every file, but no COMPLETE.
    torn = launch(DRILL, plan({"step": 4, "where": "writing", "rank": 0, "do": "SIGKILL", "all": True}), *common)
    assert torn.status != 0 and complete(run) == ["step-00000002"]
    assert (run / "checkpoints" / "step-00000004" / "master.safetensors").is_file()
    # While blocks compile a signal ends both ranks at once: nothing is unsaved.
    compiling = [{"step": 2, "rank": rank, "do": "SIGTERM"} for rank in range(2)]
    ended_well(launch(DRILL, plan(*compiling), *common, "--model.compile=true"))
    assert complete(run) == ["step-00000002"]
    # SIGTERM reaches one rank alone while step 4 is saved: both leave step 5 after its first micro-batch, with 0.
    term = {"step": 4, "where": "saving", "rank": 1, "do": "SIGTERM"}
    ended_well(launch(DRILL, plan(term), *common))
    assert complete(run)[-1] == "step-00000004" and not counters(run, 4)["finished"]

    # Half-written things that a kill can leave: ignored, mended, removed.
    for left in ("checkpoints/step-00000099", "checkpoints/.writing-step-00000007-1"):
        (run / left).mkdir()
        (run / left / "master.safetensors").write_bytes(b"torn")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "los')
    # SIGUSR2 while validating after step 6: the validation is cut short and made up for later.
    usr2 = {"step": 6, "where": "validation", "rank": 0, "do": "SIGUSR2"}
    ended_well(launch(DRILL, plan(usr2), *common))
    assert complete(run) == ["step-00000004", "step-00000006"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == complete(run)
    assert counters(run, 6)["validated_step"] == 3

    # The newest checkpoint is damaged: named, and the one before is used.
    with open(run / "checkpoints" / "step-00000006" / "master.safetensors", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damage")
    done = ended_well(launch("launch/pretrain.py", *common))
    assert "step-00000006 is damaged (master.safetensors does not have its sha256)" in done.output
    assert_same_end(run, whole)
    assert len(complete(run)) == 2


def test_an_error_on_one_rank_ends_the_job_with_that_error(launch: Launch, shards: Path, tmp_path: Path) -> None:
    """In the middle of the first of two backward passes. A rank that cleaned up by a collective would wait for the others."""
    done = launch(DRILL, plan({"step": 1, "micro": 0, "rank": 1, "do": "raise"}), *options(tmp_path / "run", shards))
    assert done.status != 0 and "RuntimeError: a planned failure" in done.output
    assert "hangs in" not in done.output


def test_a_launcher_killed_or_stopped_takes_its_ranks_along_a_hung_rank_is_named_and_it_ends_as_if_nothing_was(
    launch: Launch, whole: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    common = options(run, shards)
    job = start(DRILL, plan({"step": 3, "rank": 1, "do": "sleep", "seconds": 600}), *common)
    try:
        wait_for(run / "asleep")
        pids = ranks(run)
        assert len(pids) == 2 and all(alive(pid) for pid in pids)
        os.kill(job.process.pid, signal.SIGKILL)  # the launcher alone; its ranks are in sessions of their own
        # Relaunched at once: the lock waits for the dying ranks. Then a rank hangs.
        hang = {"step": 5, "micro": 1, "rank": 1, "do": "sleep", "seconds": 600}
        done = launch(DRILL, plan(hang), *common, "--engine.timeout_s=20")
        assert not any(alive(pid) for pid in pids), "an orphan goes on"
    finally:
        job.kill()
    assert done.status != 0
    assert "hangs in forward of step 5" in done.output and "rank 1 (" in done.output
    assert "rank 0 (" not in done.output, "the waiting rank is accused, too"
    assert (
        "sleep" in (run / "ranks" / "rank-0001.stacks").read_text()
        or "_suffer" in (run / "ranks" / "rank-0001.stacks").read_text()
    )
    assert complete(run)[-1] == "step-00000004"
    # SIGTERM to the launcher alone: it passes it on, and both ranks save the step that they were in, or the next.
    done = launch(DRILL, plan({"step": 4, "micro": 1, "rank": 1, "do": "SIGTERM", "launcher": True}), *common)
    assert "pretrain stopped; launch again" in done.output, done.output[-3000:]
    assert complete(run)[-1] in ("step-00000005", "step-00000006")
    ended_well(launch("launch/pretrain.py", *common))
    assert_same_end(run, whole)
