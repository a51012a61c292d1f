"""`launch/pipeline.py` to its end: from a CSV to a report, on a terminal and once more; and the demo's own configuration."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.photos import encode, scene
from tests.evaluation.browser import look
from tests.launching import ROOT, TINY, environment, free_port

STAGES = ("shards", "pretrain", "dora_folds", "predict", "evaluate")
BUILD = ["--view-size", "64", "--max-views", "2", "--test-fraction", "0.4", "--val-fraction", "0.3", "--processes", "1"]
SHORT = [
    "--training.max_steps=2", "--training.global_batch=4", "--data.workers=0", "--folds.num_folds=2",
    "--folds.epochs=1", "--predict.num_augmentations=2", "--predict.image_only=true", "--pipeline.processes=1",
]  # fmt: skip


def photographs(folder: Path, number: int = 24) -> Path:
    """A CSV of small photos; each group holds both labels, so that every split does."""
    lines = ["path,label,group"]
    for k in range(number):
        (folder / f"{k}.jpg").write_bytes(encode(scene(k, 160, 120)))
        lines.append(f"{k}.jpg,{k % 2},drive-{k // 2}")
    table = folder / "photos.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def command(folder: Path, *options: str) -> list[str]:
    """The pipeline with a port of its own, since other tests launch beside this one."""
    accelerate = folder / "accelerate.yaml"
    text = (ROOT / "accelerate_configs" / "cpu.yaml").read_text()
    accelerate.write_text(f"{text.rstrip()}\nmain_process_port: {free_port()}\n")
    return [
        sys.executable, "launch/pipeline.py", *options, f"--run.dir={folder / 'run'}",
        f"--data.shards={folder / 'shards'}", f"--pipeline.accelerate_config={accelerate}",
    ]  # fmt: skip


def on_a_terminal(command: list[str]) -> str:
    """What a person at a terminal sees of a command; it must end with 0."""
    ours, its = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=its, stderr=its)
    os.close(its)
    seen = b""
    with open(ours, "rb", buffering=0) as screen, contextlib.suppress(OSError):  # Linux says so that nobody writes now
        while piece := screen.read(4096):
            seen += piece
    assert process.wait(900) == 0, seen[-3000:].decode()
    return seen.decode()


def in_a_pipe(command: list[str]) -> str:
    """What a command says to no terminal; it must end with 0."""
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """(folder with run and shards, the command, what it said on a terminal)."""
    folder = tmp_path_factory.mktemp("whole")
    options = [*TINY, *SHORT, f"--pipeline.source=csv:{photographs(folder)}", f"--pipeline.build={json.dumps(BUILD)}"]
    whole = command(folder, *options, "--monitoring.console=true")
    return folder, whole, on_a_terminal(whole)


def test_a_csv_becomes_a_report_and_a_second_call_keeps_all_of_it(made: tuple[Path, list[str], str]) -> None:
    folder, whole, screen = made
    run, told = folder / "run", screen.replace("\r\n", "\n")
    assert all(f"{stage}: done in" in told for stage in STAGES)
    counts = json.loads((folder / "shards" / "manifest.json").read_text())["splits"]
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["id"] for row in rows}) == len(rows) == counts["test"]["photos"] > 0
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    (chosen,) = [system for system in json.loads((run / "evaluation.json").read_text())["systems"] if system["chosen"]]
    low, high = chosen["mcc_interval"]
    assert low <= chosen["mcc"] <= high and chosen["n"] == len(rows)
    assert f"report:       {run / 'report' / 'index.html'}\n" in told and "(not made)" not in told
    assert f"scores:       {run / 'evaluation.json'}\n" in told
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*.csv"))}
    again = in_a_pipe(whole)
    assert all(f"{stage}: done before, kept" in again for stage in STAGES) and "done in" not in again
    assert before == {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*.csv"))}


def test_a_terminal_gets_the_bar_of_a_stage_through_the_launcher_and_the_log_its_last_state(
    made: tuple[Path, list[str], str],
) -> None:
    folder, _, screen = made
    states = [state for state in screen.split("\r") if state.startswith("pretrain ") and "/2 |" in state]
    assert len(states) > 1 and any("images/s  loss " in state for state in states), "no line that rewrites itself"
    log = (folder / "run" / "logs" / "pretrain.log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("pretrain 2/2 |")]
    assert len(lines) == 1 and "images/s  loss " in lines[0] and "\r" not in log
    assert "pretrain finished at step 2 of 2" in log


@pytest.mark.browser
def test_a_browser_shows_the_report_of_a_real_run(made: tuple[Path, list[str], str], tmp_path: Path) -> None:
    look(made[0] / "run" / "report" / "index.html", tmp_path, 1200)


def test_the_demos_own_configuration_comes_to_its_end(tmp_path: Path) -> None:
    """What `make demo` runs, with fewer photos, steps and epochs and nothing else changed."""
    fewer = ["--pipeline.source=street:60", "--training.max_steps=2", "--folds.num_folds=2", "--folds.epochs=1"]
    fewer += ["--predict.num_augmentations=2", "--predict.bootstrap=20", "--pipeline.processes=1", "--engine.threads=1"]
    told = in_a_pipe(command(tmp_path, "--config=launch/configs/demo.yaml", *fewer))
    assert all(f"{stage}: done in" in told for stage in STAGES) and "(not made)" not in told
    assert "efficientnet_lite0" in json.dumps(json.loads((tmp_path / "run" / "model" / "config.json").read_text()))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
