"""The evaluation stage in one process: whose answers it scores, under which prior, and what it refuses."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from scipy.special import logit
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roadwork.config import Config
from roadwork.data.index import ShardIndex, write_index
from roadwork.data.scan import scan_shard
from roadwork.data.shards import shard_name, write_shard
from roadwork.errors import UserError
from roadwork.evaluation.report import read_probabilities
from roadwork.inference.calibration import shift_to_prior
from roadwork.inference.evaluate import evaluate, prepare
from roadwork.inference.network_pass import load
from roadwork.inference.predict import own_standing, predict
from roadwork.inference.predict import prepare as prepare_prediction
from tests.data.sheets import sample
from tests.inference.small_run import alone, make

MADE_FOR, ASKED = 0.9, 0.5
SHIFT = -math.log(9)


@pytest.fixture(scope="module")
def predicted(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run whose predictions and model/ were made for prior MADE_FOR."""
    config = make(tmp_path_factory.mktemp("evaluate"), scale=3.0)
    config.predict.prior, config.predict.tta, config.predict.num_augmentations = MADE_FOR, "off", 1
    predict(config, alone(), prepare_prediction(config))
    return config


@pytest.fixture
def config(predicted: Config, tmp_path: Path) -> Config:
    """The same in a folder of its own, to be evaluated under prior ASKED."""
    shutil.copytree(predicted.run.dir, tmp_path / "run")
    config = Config()
    config.run.dir, config.data.shards, config.data.workers = str(tmp_path / "run"), predicted.data.shards, 0
    config.predict.bootstrap, config.predict.batch, config.predict.prior = 20, 4, ASKED
    return config


def of_one_label(folder: Path, label: int | None) -> str:
    """Shards of 12 photos to train on, of both classes, and 6 to predict that all have `label`."""
    folder.mkdir()
    scanned = []
    for split, first, count, known in (("train", 0, 12, {}), ("predict", 100, 6, {"label": label})):
        path = folder / shard_name(split, 0)
        write_shard(path, (sample(first + i, **known) for i in range(count)))
        scanned.append(scan_shard(path))
    write_index(folder, scanned, {})
    return str(folder)


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page.read_text())))


def test_answers_made_for_another_prior_are_moved_to_the_one_asked_for_and_the_report_says_so(config: Config) -> None:
    result, page = evaluate(config, alone(), prepare(config))
    run = Path(config.run.dir)
    made, scored = (read_probabilities(run / name) for name in ("predictions.csv", result["predictions"]))
    assert made.keys() == scored.keys()
    assert [logit(scored[i]) - logit(made[i]) for i in made] == pytest.approx([SHIFT] * len(made), abs=1e-6)
    chosen = next(row for row in result["systems"] if row["chosen"])
    index = ShardIndex.open(config.data.shards, "test")
    labelled = [scored[str(i)] for i, label in zip(index.id, index.label, strict=True) if label >= 0]
    assert chosen["confusion"][0][1] + chosen["confusion"][1][1] == sum(p > 0.5 for p in labelled)
    for whose in ("predictions.csv", "model/"):
        note = f"{whose} was made for prior 0.9: its answers are shifted by -2.197 to 0.5"
        assert note in result["notes"] and note in page.read_text()


def test_answers_made_for_the_prior_asked_for_are_scored_as_they_are(config: Config) -> None:
    config.predict.prior = MADE_FOR
    result, _ = evaluate(config, alone(), prepare(config))
    assert result["predictions"] == "predictions.csv" and not any("made for" in note for note in result["notes"])


def test_every_predicted_system_is_moved(config: Config) -> None:
    path = Path(config.run.dir) / "predictions_tta.csv"
    lines = path.read_text().splitlines()
    doubled = [line.replace("pretrained", "pretrained,other") if not n else line for n, line in enumerate(lines)]
    column = lines[0].split(",").index("pretrained")
    for n, line in enumerate(doubled[1:], 1):
        cells = line.split(",")
        doubled[n] = ",".join([*cells[: column + 1], *cells[column:]])
    path.write_text("\n".join(doubled) + "\n")
    systems = prepare(config).systems
    assert systems["other"] == systems["pretrained"] != {}


def test_a_saved_model_is_moved_from_the_prior_of_its_calibration(config: Config) -> None:
    folder, notes = Path(config.run.dir) / "model", []
    fitted = json.loads((folder / "calibration.json").read_text())
    assert fitted["prior"] == MADE_FOR
    index = ShardIndex.open(config.data.shards, "test")
    network = load(folder, config, index, None, notes, torch.device("cpu"))
    assert network.calibration == fitted | {"bias": pytest.approx(fitted["bias"] + SHIFT), "prior": ASKED}
    (folder / "calibration.json").write_text(json.dumps({"scale": 2.0}))
    network = load(folder, config, index, None, notes, torch.device("cpu"))
    assert network.calibration == {"scale": 2.0}
    assert notes[-1] == "nothing says which prior model/ was made for: its answers are taken as they are"


def test_a_prior_that_nobody_knows_is_told_and_moves_nothing() -> None:
    notes: list[str] = []
    assert shift_to_prior(None, 0.3, "predictions.csv", notes) == 0 and "nothing says" in notes[0]
    assert shift_to_prior(0.3, 0.3, "predictions.csv", notes) == 0 and len(notes) == 1


def test_photos_without_a_label_have_answers_and_no_scores_anywhere(config: Config, tmp_path: Path) -> None:
    config.data.shards, config.predict.split = of_one_label(tmp_path / "shards", None), "predict"
    result, page = evaluate(config, alone(), prepare(config))
    assert len(read_probabilities(Path(config.run.dir) / result["predictions"])) == 6
    assert result["systems"] == []
    notes = " ".join(result["notes"])
    assert "nothing could be scored" in notes and "the training split has labels of one class" not in notes
    text = text_of(page)
    assert "Result No result No photo of split predict could be scored." in text
    assert "MCC 0.000" not in text and "Reweighted" not in text and "No labelled predictions at hand" in text
    events = EventAccumulator(str(Path(config.run.dir) / "tensorboard" / "evaluate")).Reload()
    assert events.Tags()["scalars"] == [], "0.0 would be drawn as a score"


def test_photos_of_one_class_are_not_called_reweighted(config: Config, tmp_path: Path) -> None:
    config.data.shards, config.predict.split = of_one_label(tmp_path / "shards", 1), "predict"
    result, page = evaluate(config, alone(), prepare(config))
    assert {row["n"] for row in result["systems"]} == {6} and result["systems"][0]["mcc_at_prior"] is None
    text = text_of(page)
    assert "every labelled photo of this split has label 1" in text
    assert "Reweighted" not in text and "Reliability at the prior" not in text


def test_the_challenge_without_a_network_to_ask_is_one_line(config: Config) -> None:
    run = Path(config.run.dir)
    for folder in ("model", "best"):
        shutil.rmtree(run / folder)
    assert prepare(config).systems
    config.predict.challenge = True
    with pytest.raises(UserError, match="predict.challenge is true, and .* has no saved model to ask") as caught:
        prepare(config)
    assert "\n" not in str(caught.value) and "launch/predict.py" in str(caught.value)


def test_a_standing_of_prediction_is_shown_by_the_evaluation_of_the_same_photos_alone(config: Config) -> None:
    own_standing(config, alone(), prepare_prediction(config))
    _, page = evaluate(config, alone(), prepare(config))
    assert "over 1,000 simulated rounds" in text_of(page)
    config.predict.split = "val"
    _, page = evaluate(config, alone(), prepare(config))
    assert "Not simulated on this split" in text_of(page) and "simulated rounds" not in text_of(page)
