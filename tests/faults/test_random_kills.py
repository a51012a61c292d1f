"""The kill drill itself: a short one, what it looks for, and how it counts. `make drill` runs the long one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.kills import PLACES, VICTIMS, WORD, Drill, broken, members, newest, torn

pytestmark = pytest.mark.timeout(900)


@pytest.mark.skipif(os.environ.get("ROADWORK_DRILL") != "long", reason="the long drill: make drill")
def test_killed_inside_a_write_it_ends_as_if_nothing_had_happened_and_the_drill_goes_on(
    shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "shards").symlink_to(shards)
    Drill(tmp_path, kills=1, steps=6).go_on()
    found = Drill(tmp_path, kills=1, steps=6)
    found.go_on()  # nothing is left to do
    figures = found.figures()
    assert broken(figures) == [], (tmp_path / "kills.jsonl").read_text()
    assert (figures["kills"], figures["relaunched"], figures["curves"]) == (1, 1, 1 + figures["after_the_end"])
    assert figures["inside"] == figures["torn"] == 1, "rank 0 was killed and left no torn checkpoint"


def test_a_process_whose_parents_are_gone_is_still_of_its_launch() -> None:
    sleeper = "import time; print(1, flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
    environment = {**os.environ, WORD: "one of a kind"}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"1\n"
    parent.wait()
    orphans = members("one of a kind")
    assert len(orphans) == 1 and members("one") == []
    os.kill(orphans[0], signal.SIGKILL)
    while members("one of a kind"):
        time.sleep(0.01)
    parent.stdout.close()


def test_a_torn_checkpoint_is_one_that_was_begun_after_the_newest_complete_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in (
        "step-00000003",
        "step-00000004",
        "step-00000005",
        ".writing-step-00000006-77",
        ".writing-old-step-00000005-7",
    ):
        (folder / name).mkdir(parents=True)
    (folder / "step-00000004" / "COMPLETE").write_text("{}")
    names = {name for name, _ in torn(tmp_path)}
    assert names == {"step-00000005", ".writing-step-00000006-77"}, "step 3 is an old one on its way out"
    assert newest(tmp_path) == "step-00000004"
    (folder / "step-00000004" / "COMPLETE").write_text(json.dumps({"master.safetensors": "0"}))
    assert newest(tmp_path) == "", "a damaged checkpoint counts as lost"


def kill(victim: str, where: str, outcome: str = "hit", **changes: Any) -> dict[str, Any]:
    usual = {"inside": True, "torn": 1, "relaunched": True, "orphans": 0, "checkpoints_lost": False, "gone_s": 1.0}
    return {"kind": "kill", "commit": "a", "victim": victim, "where": where, "outcome": outcome, **usual, **changes}


def drill_of(folder: Path, *lines: dict[str, Any]) -> Drill:
    (folder / "shards").mkdir()
    (folder / "shards" / "manifest.json").touch()
    (folder / "kills.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Drill(folder, kills=8)


def test_kills_are_counted_where_they_hit_and_those_behind_the_end_apart(tmp_path: Path) -> None:
    every = [kill(victim, where) for where in PLACES for victim in VICTIMS]
    missed = kill("rank 1", PLACES[0], "missed", inside=False, torn=0)
    late = {"kind": "kill", "commit": "b", "victim": "rank 0", "where": PLACES[1], "outcome": "late"}
    curve = {"kind": "curve", "commit": "a", "run": "run-000", "fault": "", "samples": 0}
    drill = drill_of(tmp_path, *every[:-1], missed, late, curve)
    assert drill.left() == 1
    figures = drill.figures()
    assert (figures["kills"], figures["missed_the_write"], figures["after_the_end"], figures["curves"]) == (7, 1, 1, 1)
    assert figures["commits"] == ["a", "b"] and [row["kills"] for row in figures["rows"]] == [1] * 7 + [0]
    assert broken(figures) == []


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (kill("rank 0", PLACES[0], orphans=2), "orphans: 2"),
        (kill("rank 0", PLACES[0], "late", checkpoints_lost=True), "checkpoints_lost: 1"),
        ({"kind": "curve", "commit": "a", "run": "run-000", "fault": "losses", "samples": 0}, "differing_curves: 1"),
        ({"kind": "curve", "commit": "a", "run": "r", "fault": "", "samples": -8}, "samples_lost_or_doubled: 8"),
        ({"kind": "refused", "commit": "a", "status": 1, "output": ""}, "refused: 1"),
    ],
)
def test_whatever_breaks_a_promise_is_named(line: dict[str, Any], named: str, tmp_path: Path) -> None:
    assert broken(drill_of(tmp_path, line).figures()) == [named]
