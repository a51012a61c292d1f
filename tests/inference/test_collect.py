"""Answers of all members to all augmentations: what they equal, and what refuses to be used."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logit

from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.errors import UserError
from roadwork.evaluation.photos import stitched
from roadwork.inference import evaluate, network_pass, predict
from roadwork.inference.collect import answer_batch, collect, feature_rows, training_distribution
from roadwork.inference.members import find_members, load_members
from roadwork.inference.plan import prior_of_draws
from roadwork.inference.single_view import as_sent
from roadwork.inference.transforms import Transform, transforms
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import replaced, state_digest
from roadwork.training import folds
from tests.inference.small_run import COUNTS, alone, empty_split, make


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = make(tmp_path_factory.mktemp("predict"))
    folds.fine_tune_folds(config, alone(), folds.prepare(config))
    return config


@pytest.fixture(scope="module")
def members(config):
    return load_members(config, find_members(config), torch.device("cpu"))


@pytest.fixture(scope="module")
def distribution(config, members):
    return training_distribution(members, ShardIndex.open(config.data.shards, "train"), config, alone())


def first_batch(config):
    return next(iter(EvalLoader(ShardIndex.open(config.data.shards, "test"), batch=4, workers=0)))


def test_one_identity_augmentation_is_plain_prediction_bit_for_bit(config, members):
    batch = first_batch(config)
    plain = RoadworkDetector.from_pretrained(Path(config.run.dir) / "best")
    with torch.inference_mode():
        logits = plain(batch.views.float() / 255, batch.view_mask, batch.metadata, batch.boxes).logits.double()
        pixels = plain(batch.views.float() / 255, batch.view_mask, None, batch.boxes).logits.double()
    records = answer_batch(members, batch, [Transform()], None, image_only=False)
    assert [record["log_odds"][0][0] for record in records] == (logits[:, 1] - logits[:, 0]).tolist()
    assert [record["image_only"][0] for record in records] == (pixels[:, 1] - pixels[:, 0]).tolist()


def test_batched_augmentations_are_what_one_by_one_gives(config, members, distribution):
    batch, listed = first_batch(config), transforms(4, 0)
    together = answer_batch(members, batch, listed, distribution, image_only=False)
    for place, transform in enumerate(listed):
        one = answer_batch(members, batch, [transform], distribution, image_only=False)
        for a, b in zip(together, one, strict=True):
            assert np.allclose(a["log_odds"][place], b["log_odds"][0], atol=1e-5)
            assert np.allclose(a["distances"][place], b["distances"][0], atol=1e-5)
    spread = np.ptp([record["log_odds"] for record in together], axis=1)
    assert spread.max() > 1e-3, "augmentations must matter"


def test_each_member_is_the_network_with_its_fold_merged(config, members):
    batch = first_batch(config)
    records = answer_batch(members, batch, [Transform()], None, image_only=False)
    found = np.array([record["log_odds"][0] for record in records])
    before = state_digest(members.model)
    for column, overrides in enumerate(members.overrides):
        with replaced(members.model, overrides), torch.inference_mode():
            logits = members.model(batch.views.float() / 255, batch.view_mask, batch.metadata, batch.boxes).logits
        assert np.allclose(found[:, column], (logits[:, 1] - logits[:, 0]).numpy(), atol=1e-5)
    assert members.names == ["pretrained", "fold-0", "fold-1", "fold-2", "soup"]
    assert len({tuple(column) for column in found.T.round(6).tolist()}) == 5
    assert state_digest(members.model) == before


def test_collecting_continues_where_a_killed_run_stopped(config, members, distribution, caplog):
    index, listed = ShardIndex.open(config.data.shards, "test"), transforms(3, 0)
    whole = collect(members, index, listed, distribution, config, alone())
    folder = Path(config.run.dir) / "predict" / "test-3"
    part = next(folder.glob("*.jsonl"))
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while writing the fourth photo
    again = collect(members, index, listed, distribution, config, alone())
    assert part.read_bytes().startswith(b"".join(lines[:3]))
    assert len(part.read_bytes().splitlines()) == COUNTS["test"]
    assert again.ids == whole.ids == index.id.tolist()
    assert np.allclose(again.log_odds, whole.log_odds, atol=1e-5)
    assert "discarded" not in caplog.text
    collect(members, index, listed, distribution, options(config, image_only=True), alone())
    assert "test-3: 1 part files discarded: of other weights, shards or options" in caplog.text
    fewer = collect(members, index, transforms(2, 0), distribution, config, alone())
    assert fewer.log_odds.shape == (COUNTS["test"], 2, 5)


def test_held_out_photos_are_asked_about_on_one_centred_view_as_well(config, members):
    index = ShardIndex.open(config.data.shards, "val")
    found = collect(members, index, [Transform()], None, config, alone())
    sent = [as_sent(stitched(index, row)) for row in range(len(index))]
    for column in (0, 1):
        with replaced(members.model, members.overrides[column]):
            expected = logit(members.model.predict_batch(sent))
        assert np.allclose(found.single_view[:, column], expected, atol=1e-4)
    assert np.abs(found.single_view - found.image_only).max() > 1e-3, "another picture, another answer"
    test = collect(members, ShardIndex.open(config.data.shards, "test"), [Transform()], None, config, alone())
    assert test.single_view is None, "photos to answer cost no second pass"


def test_statistics_describe_a_bounded_number_of_photos():
    assert feature_rows(5, 10, 0).tolist() == [0, 1, 2, 3, 4]
    some = feature_rows(1000, 10, 0)
    assert len(set(some)) == 10
    assert (np.diff(some) > 0).all()


def test_the_prior_is_that_of_the_draws(config):
    index = ShardIndex.open(config.data.shards, "train")
    known = index.label >= 0
    weighted = np.average(index.label[known] == 1, weights=index.gps_weight[known])
    assert prior_of_draws(index, config) == pytest.approx(weighted)
    even = dataclasses.replace(config, data=dataclasses.replace(config.data, gps_weighted=False))
    assert prior_of_draws(index, even) == pytest.approx(np.mean(index.label[known] == 1))
    assert prior_of_draws(index, even) != prior_of_draws(index, config)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_network_without_calibration_is_shifted_from_the_draws_of_its_training(config, weighted):
    best, device = Path(config.run.dir) / "best", torch.device("cpu")
    train = ShardIndex.open(config.data.shards, "train")
    train.manifest["class_prior"] = {"draws": 0.9, "photos": 0.9}  # of weights that training may not have used
    data = dataclasses.replace(config.data, gps_weighted=weighted)
    made, notes = dataclasses.replace(options(config, prior=0.3), data=data), []
    network = network_pass.load(best, made, train, train, notes, device)
    shift = logit(0.3) - logit(prior_of_draws(train, made))
    assert network.calibration == {"temperature": 1.0, "bias": pytest.approx(shift)}
    assert notes == [
        f"best/ has no fitted calibration: its answers are shifted by {shift:+.3f} to the prior, from that "
        "of the draws of these shards' train split"
    ]
    assert network_pass.load(best, made, train, None, notes, device).calibration is None
    assert "are not shifted to the prior: the shards have no train split" in notes[-1]


def options(config, **predict_options):
    return dataclasses.replace(config, predict=dataclasses.replace(config.predict, **predict_options))


def changed(config, tmp_path, **predict_options):
    """A copy of the run that a test may damage."""
    shutil.copytree(config.run.dir, tmp_path / "run")
    run = dataclasses.replace(config.run, dir=str(tmp_path / "run"))
    return dataclasses.replace(options(config, **predict_options), run=run)


def test_bad_run_folders_are_one_clear_line(config, tmp_path):
    broken = changed(config, tmp_path)
    run = Path(broken.run.dir)
    (run / "folds" / "fold-1" / "COMPLETE").unlink()
    with pytest.raises(UserError, match="fold-0, fold-2 of 3 folds; run launch/dora_folds.py"):
        predict.prepare(broken)
    (run / "folds" / "fold-1" / "COMPLETE").touch()
    details = json.loads((run / "folds" / "fold-1" / "fold.json").read_text())
    (run / "folds" / "fold-1" / "fold.json").write_text(json.dumps(details | {"base": "another"}))
    with pytest.raises(UserError, match="trained from other weights"):
        predict.prepare(broken)
    assert predict.prepare(dataclasses.replace(broken, predict=dataclasses.replace(config.predict, ensemble="off")))
    shutil.rmtree(run / "folds")
    with pytest.raises(UserError, match="has no folds; run launch/dora_folds.py"):
        predict.prepare(dataclasses.replace(broken, predict=dataclasses.replace(config.predict, ensemble="on")))
    shutil.rmtree(run / "best")
    with pytest.raises(UserError, match="run launch/pretrain.py"):
        predict.prepare(broken)


def test_the_network_that_is_written_cuts_photos_as_best_does_and_other_shards_are_noted(config, tmp_path):
    made = changed(config, tmp_path, ensemble="off", tta="off")
    best = Path(made.run.dir) / "best"
    content = json.loads((best / "config.json").read_text())
    (best / "config.json").write_text(json.dumps(content | {"max_views": 4}))
    plan, _ = predict.predict(made, alone(), predict.prepare(made))
    assert RoadworkDetector.from_pretrained(Path(made.run.dir) / "model").max_views == 4
    (note,) = json.loads((Path(made.run.dir) / "predict_details.json").read_text())["notes"]
    assert note in plan.details["notes"] and "at most 12 views of a photo" in note


@pytest.mark.parametrize(("mode", "chosen"), [("auto", "pretrained"), ("on", "pretrained_tta")])
def test_shards_without_a_validation_split_are_predicted_with_every_augmentation(config, tmp_path, mode, chosen):
    made = changed(config, tmp_path, tta=mode, ensemble="off")
    prepared = dataclasses.replace(predict.prepare(made), val=None)
    plan, found = predict.predict(made, alone(), prepared)
    assert plan.chosen == chosen and found.log_odds.shape[1] == 3
    lines = (Path(made.run.dir) / "predictions_tta.csv").read_text().splitlines()
    assert lines[0] == "id,kept,distance,pretrained,pretrained_tta,label" and len(lines) == 1 + COUNTS["test"]


@pytest.mark.parametrize("stage", [predict, evaluate])
def test_an_empty_split_is_one_clear_line(config, tmp_path, stage):
    shutil.copytree(config.data.shards, tmp_path / "shards")
    empty_split(tmp_path / "shards", "test")
    data = dataclasses.replace(config.data, shards=str(tmp_path / "shards"))
    with pytest.raises(UserError, match="split test of .*shards is empty; give another --predict.split"):
        stage.prepare(dataclasses.replace(config, data=data))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior": 1.0}, "predict.prior is 1"),
        ({"keep_ratio": 0.0}, "predict.keep_ratio is 0"),
        ({"num_augmentations": 17}, "give 1 .* to 16"),
        ({"tta": "on", "num_augmentations": 1}, "tta is on"),
        ({"split": "nowhere"}, "no split 'nowhere'"),
    ],
)
def test_impossible_options_are_one_clear_line(config, options, message):
    with pytest.raises(UserError, match=message):
        predict.prepare(dataclasses.replace(config, predict=dataclasses.replace(config.predict, **options)))
