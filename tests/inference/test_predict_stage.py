"""Folds and prediction through `accelerate launch`: real processes, the same files for 1 and 2 of them."""

import csv
import json
import shutil
import time

import numpy as np
import pytest

from roadwork.data.index import ShardIndex
from roadwork.models import RoadworkDetector
from tests.conftest import start
from tests.inference.small_run import COUNTS, make

pytestmark = pytest.mark.timeout(900)  # three launches, on a machine that may be busy


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folds by two processes; predictions by two and, in a copy of the run folder, by one."""
    folder = tmp_path_factory.mktemp("stage")
    config = make(folder)
    options = [
        f"--data.shards={config.data.shards}", "--data.workers=0", "--engine.timeout_s=120", "--folds.num_folds=3",
        "--folds.epochs=2", "--folds.r=4", "--predict.num_augmentations=3", "--predict.batch=3",
        "--predict.bootstrap=50",
    ]  # fmt: skip

    def launch(script: str, name: str, processes: int, *more: str) -> str:
        job = start(f"launch/{script}.py", f"--run.dir={folder / name}", *options, *more, processes=processes)
        try:
            done = job.wait(900)
        finally:
            job.kill()
        assert done.status == 0, done.output[-4000:]
        return done.output

    output = launch("dora_folds", "run", 2)
    shutil.copytree(folder / "run", folder / "one")
    (folder / "one" / "challenge.json").write_text('{"of": "another network"}')
    begin_and_kill(folder / "one", options)
    shutil.copytree(folder / "one" / "predict", folder / "kept")
    output += launch("predict", "run", 2, "--challenge")
    launch("predict", "one", 1)
    return folder, output


def begin_and_kill(run, options):
    """Predict by two processes, and SIGKILL to both as soon as each has written a batch of the first split."""
    job = start("launch/predict.py", f"--run.dir={run}", *options, processes=2)
    try:
        while len([part for part in run.glob("predict/val-3/*.jsonl") if part.stat().st_size]) < 2:
            assert job.process.poll() is None, job.wait(60).output[-4000:]
            time.sleep(0.01)
    finally:
        job.kill()
    job.wait(60)  # the ranks are gone as well
    assert not (run / "predictions.csv").exists()


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_folds_are_spread_over_the_processes_and_all_done(runs):
    folder, output = runs
    assert all(f"fold-{fold}: held-out MCC" in output for fold in range(3))
    pids = {json.loads((folder / "run" / "folds" / f"fold-{fold}.lock").read_text())["pid"] for fold in range(3)}
    assert len(pids) == 2
    assert len(read(folder / "run" / "folds" / "oof.csv")) == len(
        {row["id"] for row in read(folder / "run" / "folds" / "oof.csv")}
    )


def test_one_and_two_processes_give_the_same_predictions(runs):
    folder, _ = runs
    two, one = read(folder / "run" / "predictions.csv"), read(folder / "one" / "predictions.csv")
    assert [row["id"] for row in two] == [row["id"] for row in one]
    assert len({row["id"] for row in two}) == len(two) == COUNTS["test"]
    assert max(abs(float(a["probability"]) - float(b["probability"])) for a, b in zip(two, one, strict=True)) < 1e-4
    parts = list((folder / "run" / "predict" / "test-3").glob("*.jsonl"))
    assert len(parts) == 2
    assert all(part.stat().st_size > 0 for part in parts)
    for column in ("pretrained", "pretrained_tta", "ensemble", "ensemble_tta"):
        a, b = (
            np.array([float(row[column]) for row in read(folder / name / "predictions_tta.csv")])
            for name in ("run", "one")
        )
        assert np.abs(a - b).max() < 1e-4


def test_a_kill_loses_no_finished_photo_and_doubles_none(runs):
    """`one` was begun by two processes, killed, and finished by one."""
    folder, _ = runs
    parts = folder / "one" / "predict" / "val-3"
    for earlier in (folder / "kept" / "val-3").glob("*.jsonl"):
        finished = earlier.read_bytes()[: earlier.read_bytes().rfind(b"\n") + 1]
        assert finished and (parts / earlier.name).read_bytes().startswith(finished)
    ids = [json.loads(line)["id"] for part in parts.glob("*.jsonl") for line in part.read_bytes().splitlines()]
    assert sorted(ids) == sorted(ShardIndex.open(folder / "shards", "val").id.tolist())


def test_the_single_view_stands_beside_all_views_on_the_console_and_in_the_model_card(runs):
    folder, output = runs
    network = json.loads((folder / "run" / "predict_details.json").read_text())["network"]
    whole, alone = network[network["chosen"]]["after"]["mcc"], network["single_view_224"]["mcc"]
    assert f"pixels alone: held-out MCC {whole:.3f} on all views, {alone:.3f} on one 224 px view" in output
    card = (folder / "run" / "model" / "README.md").read_text()
    assert f"at that prior: {whole:.3f}" in card and f"with the same calibration: {alone:.3f}" in card


def test_what_foods_kept_follows_from_the_distances_that_are_written(runs):
    folder, _ = runs
    why = read(folder / "run" / "predictions_distances.csv")
    depths = ("knn_depth_1", "knn_depth_2", "knn_depth_3")
    kept = {}
    for row in why:
        near = row["augmentation"] == "0" or all(float(row[depth]) <= 1 for depth in depths)
        kept[row["id"]] = kept.get(row["id"], "") + str(int(near))
    assert kept == {row["id"]: row["kept"] for row in read(folder / "run" / "predictions_tta.csv")}
    assert all(row["kept"] == kept[row["id"]][int(row["augmentation"])] for row in why)
    thresholds = json.loads((folder / "run" / "predict_details.json").read_text())["distance_thresholds"]
    assert set(thresholds) == {*depths, "mahalanobis"} and all(value > 0 for value in thresholds.values())


def test_the_files_say_what_was_decided(runs):
    folder, _ = runs
    rows, masks = read(folder / "run" / "predictions.csv"), read(folder / "run" / "predictions_tta.csv")
    assert list(rows[0]) == ["id", "probability", "prediction", "label"]
    assert all(int(row["prediction"]) == int(float(row["probability"]) > 0.5) for row in rows)
    assert all(len(row["kept"]) == 3 and row["kept"][0] == "1" for row in masks)
    details = json.loads((folder / "run" / "predict_details.json").read_text())
    assert details["chosen"] in details["systems"]
    assert details["held_out"]["split"] == "val"
    assert {"used", "low", "high", "difference"} <= set(details["tta"])
    assert len(details["augmentations"]) == 3


def test_model_is_one_network_that_loads_and_answers(runs):
    folder, _ = runs
    details = json.loads((folder / "run" / "predict_details.json").read_text())
    model = RoadworkDetector.from_pretrained(folder / "run" / "model")
    figures = details["network"][details["network"]["chosen"]]
    assert model.calibration == {"temperature": figures["temperature"], "bias": figures["bias"], "prior": 0.5}
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    assert 0.0 <= model.predict(photo) <= 1.0
    assert "How it was chosen" in (folder / "run" / "model" / "README.md").read_text()


def test_the_challenge_is_asked_of_the_network_that_was_written(runs):
    folder, output = runs
    standing = json.loads((folder / "run" / "challenge.json").read_text())
    labelled = sum(row["label"] != "" for row in read(folder / "run" / "predictions.csv"))
    assert (standing["what"], standing["rounds"], standing["photos"]) == ("real half only", 1000, labelled)
    assert (standing["split"], standing["shards"]) == ("test", str((folder / "shards").resolve()))
    assert -1 <= standing["mcc"] <= 1 and [level["level"] for level in standing["levels"]] == [0, 1, 2, 3]
    assert sum(level["n"] for level in standing["levels"]) == 1000 and standing["no_answer"] == 0
    assert f"challenge (real half only): MCC {standing['mcc']:.3f}, accuracy {standing['accuracy']:.3f}" in output
    assert not (folder / "one" / "challenge.json").exists(), "a standing of the network that model/ held before"
