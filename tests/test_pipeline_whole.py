"""`launch/pipeline.py` to its end: from a CSV to a report, with random weights, twice; and the demo's own configuration."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

from tests.data.photos import encode, scene
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


def pipeline(folder: Path, *options: str) -> str:
    """What the command says; it must end with 0."""
    accelerate = folder / "accelerate.yaml"  # a port of its own: other tests launch beside this one
    text = (ROOT / "accelerate_configs" / "cpu.yaml").read_text()
    accelerate.write_text(f"{text.rstrip()}\nmain_process_port: {free_port()}\n")
    command = [sys.executable, "launch/pipeline.py", *options, f"--run.dir={folder / 'run'}"]
    command += [f"--data.shards={folder / 'shards'}", f"--pipeline.accelerate_config={folder / 'accelerate.yaml'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_a_csv_becomes_a_report_and_a_second_call_keeps_all_of_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*TINY, *SHORT, f"--pipeline.source=csv:{photographs(tmp_path)}", f"--pipeline.build={json.dumps(BUILD)}"]
    told = pipeline(tmp_path, *options)
    assert all(f"{stage}: done in" in told for stage in STAGES)
    counts = json.loads((tmp_path / "shards" / "manifest.json").read_text())["splits"]
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["id"] for row in rows}) == len(rows) == counts["test"]["photos"] > 0
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)
    (chosen,) = [system for system in json.loads((run / "evaluation.json").read_text())["systems"] if system["chosen"]]
    low, high = chosen["mcc_interval"]
    assert low <= chosen["mcc"] <= high and chosen["n"] == len(rows)
    assert f"report:       {run / 'report' / 'index.html'}\n" in told and "(not made)" not in told
    assert f"scores:       {run / 'evaluation.json'}\n" in told
    assert (run / "report" / "index.html").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*.csv"))}
    again = pipeline(tmp_path, *options)
    assert all(f"{stage}: done before, kept" in again for stage in STAGES) and "done in" not in again
    assert before == {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*.csv"))}


def test_the_demos_own_configuration_comes_to_its_end(tmp_path: Path) -> None:
    """What `make demo` runs, with fewer photos, steps and epochs and nothing else changed."""
    fewer = ["--pipeline.source=street:60", "--training.max_steps=2", "--folds.num_folds=2", "--folds.epochs=1"]
    fewer += ["--predict.num_augmentations=2", "--predict.bootstrap=20", "--pipeline.processes=1", "--engine.threads=1"]
    told = pipeline(tmp_path, "--config=launch/configs/demo.yaml", *fewer)
    assert all(f"{stage}: done in" in told for stage in STAGES) and "(not made)" not in told
    assert "efficientnet_lite0" in json.dumps(json.loads((tmp_path / "run" / "model" / "config.json").read_text()))
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
