"""launch/evaluate.py through the real launcher: a saved model on labelled shards, alone and on two processes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from roadwork.config import Config, ModelConfig, validate
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.errors import UserError
from roadwork.evaluation.errors import object_share
from roadwork.evaluation.photos import stitched
from roadwork.evaluation.report import read_probabilities
from roadwork.evaluation.standing import challenge_standing
from roadwork.inference.evaluate import prepare
from roadwork.inference.network_pass import load, shares_of
from roadwork.inference.single_view import photos_of
from roadwork.models import RoadworkDetector
from tests.evaluation.fake_run import write_predictions
from tests.launching import TINY


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny detector with random weights."""
    torch.manual_seed(0)
    shape = ModelConfig(
        backbone="test_vit", weights="random", hidden_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, expert_dim=32,
        segmentation_size=8, prune_after=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("saved") / "model"
    RoadworkDetector(shape, 64).save_pretrained(folder, calibration={"temperature": 1.3, "bias": 0.1, "prior": 0.5})
    return folder


@pytest.fixture
def run(tmp_path, model) -> Path:
    shutil.copytree(model, tmp_path / "run" / "model")
    return tmp_path / "run"


def options(run: Path, shards: Path, *more: str) -> list[str]:
    fixed = ["--predict.bootstrap=50", "--predict.batch=4", "--predict.split=test", *TINY]
    return [f"--run.dir={run}", f"--data.shards={shards}", *fixed, *more]


def test_a_saved_model_is_scored_the_same_on_one_and_two_processes(launch, run, shards, tmp_path):
    found = []
    for processes in (2, 1):
        folder = tmp_path / f"on-{processes}"
        shutil.copytree(run, folder)
        done = launch("launch/evaluate.py", *options(folder, shards, "--monitoring.console=true"), processes=processes)
        assert done.status == 0, done.output[-3000:]
        assert "* image_only: MCC" in done.output and "report:" in done.output
        assert done.output.count(f"evaluate {len(ShardIndex.open(shards, 'test'))}/") == 1  # the progress line's last
        found.append((json.loads((folder / "evaluation.json").read_text()), folder))
    (two, folder), (one, _) = found
    a, b = (read_probabilities(f / "evaluation_predictions.csv") for _, f in found)
    index = ShardIndex.open(shards, "test")
    assert a.keys() == b.keys() == {str(i) for i in index.id}
    assert max(abs(a[i] - b[i]) for i in a) < 1e-4
    assert two["systems"][0]["confusion"] == one["systems"][0]["confusion"]
    assert {row["name"] for row in two["systems"]} == {"image_only", "image_only_224", "metadata"}
    errors = [e for kind in two["errors"]["worst"].values() for e in kind]
    views = dict(zip(map(str, index.id), index.num_views.tolist(), strict=True))
    assert errors and all(len(e["attention"]) == views[e["id"]] for e in errors)
    assert all(sum(e["attention"]) == pytest.approx(1, abs=1e-2) for e in errors)
    page = (folder / "report" / "index.html").read_text()
    assert "Backbone weights: random" in page and page.count("data:image/jpeg") == len(errors)
    events = EventAccumulator(str(folder / "tensorboard" / "evaluate")).Reload()
    assert {"test/confusion", "test/reliability", "data/map_of_draws"} <= set(events.Tags()["images"])
    assert "test/mcc_image_only" in events.Tags()["scalars"]


def test_photos_are_put_together_from_what_the_loader_read(shards):
    index = ShardIndex.open(shards, "test")
    (batch,) = EvalLoader(index, batch=len(index), workers=0)
    batch.weight[-1] = 0.0  # as where it cannot be read
    *photos, unreadable = photos_of(index, batch)
    for photo, row in zip(photos, batch.sample.tolist()[:-1], strict=True):
        assert np.array_equal(photo, stitched(index, row))
    assert not unreadable.any()


def test_objects_are_measured_in_the_masks_that_the_loader_read(shards):
    index = ShardIndex.open(shards, "test")
    (batch,) = EvalLoader(index, batch=len(index), workers=0)
    read = [object_share(index, row) for row in batch.sample.tolist()]
    assert max(read) > 0
    assert np.array_equal(shares_of(batch), read, equal_nan=True)
    batch.weight[0] = 0.0  # as where it cannot be read
    assert np.isnan(shares_of(batch)[0])


class Rank:
    """One of several processes that take turns: every rank but the last leaves its answers in `box`."""

    def __init__(self, rank, world_size, box):
        self.rank, self.world_size, self.box = rank, world_size, box

    def gather_object(self, items):
        self.box += items
        return list(self.box)


def test_the_challenge_is_shared_out_without_changing_it(model, shards):
    index, config = ShardIndex.open(shards, "test"), Config()
    config.predict.bootstrap = 20
    network = RoadworkDetector.from_pretrained(model)
    alone = challenge_standing(network, config, Rank(0, 1, []), index, rounds=24)
    box = []
    with pytest.raises(ValueError):  # the first of two processes holds half of the answers only
        challenge_standing(network, config, Rank(0, 2, box), index, rounds=24)
    assert len(box) == 12
    assert challenge_standing(network, config, Rank(1, 2, box), index, rounds=24) == alone
    assert alone["rounds"] == 24 and alone["what"] == "real half only"
    json.dumps(alone, allow_nan=False)


def test_a_generated_half_is_asked_where_one_is_given(model, shards, tmp_path):
    index, config = ShardIndex.open(shards, "test"), Config()
    config.predict.bootstrap, config.predict.challenge = 20, True
    for label in (0, 1):
        (tmp_path / str(label)).mkdir()
        Image.new("RGB", (300, 240), (80 + 90 * label, 90, 90)).save(tmp_path / str(label) / "generated.png")
    config.predict.challenge_synthetic = str(tmp_path)
    network = RoadworkDetector.from_pretrained(model)
    both = challenge_standing(network, config, Rank(0, 1, []), index, rounds=24)
    assert both["what"] == "real and synthetic halves"
    (tmp_path / "1" / "generated.png").write_bytes(b"torn")
    with pytest.raises(UserError, match="generated.png cannot be read"):
        challenge_standing(network, config, Rank(0, 1, []), index, rounds=24)
    config.predict.challenge_synthetic = str(tmp_path / "nowhere")
    config.run.dir, config.data.shards, config.predict.split = str(model.parent), str(shards), "test"
    with pytest.raises(UserError, match="no synthetic pictures in .*nowhere"):
        prepare(config)
    config.predict.challenge = False
    with pytest.raises(UserError, match="add --predict.challenge true"):
        validate(config)


def test_predictions_that_cover_the_split_are_what_is_scored(launch, run, shards):
    index = ShardIndex.open(shards, "test")
    values = {str(i): float(np.clip(label, 0.1, 0.9)) for i, label in zip(index.id, index.label, strict=True)}
    write_predictions(run / "predictions.csv", values)
    done = launch("launch/evaluate.py", *options(run, shards), processes=1)
    assert done.status == 0, done.output[-3000:]
    result = json.loads((run / "evaluation.json").read_text())
    assert result["systems"][0]["name"] == "predictions" and result["systems"][0]["mcc"] == 1.0
    assert result["predictions"] == "predictions.csv" and "image_only" in {s["name"] for s in result["systems"]}


def test_shards_that_were_cut_otherwise_than_the_network_cuts_are_noted(model, shards, tmp_path):
    index, notes, device = ShardIndex.open(shards, "test"), [], torch.device("cpu")
    network = load(model, Config(), index, None, notes, device)
    assert notes == [] and index.max_views == network.max_views == 12
    network.max_views = 4
    load(network.save_pretrained(tmp_path), Config(), index, None, notes, device)
    (note,) = notes
    assert "the shards have at most 12 views of a photo" in note and "into at most 4: figures" in note


def test_nothing_to_score_is_one_line(shards, run, tmp_path):
    config = Config()
    config.run.dir, config.data.shards, config.predict.split = str(tmp_path / "none"), str(shards), "test"
    with pytest.raises(UserError, match="neither predictions.csv for split test nor a saved model.*launch/predict.py"):
        prepare(config)
    config.run.dir = str(run)
    write_predictions(run / "predictions.csv", {"stranger": 0.5})
    found = prepare(config)
    assert found.systems == {} and found.model == run / "model"
    assert "does not hold the photos of split test" in found.notes[0]
    (run / "model" / "config.json").unlink()
    with pytest.raises(UserError, match="neither"):
        prepare(config)
