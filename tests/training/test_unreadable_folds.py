"""A photo that cannot be read comes back black: no fold learns from it or is judged by it, and it keeps its one row."""

import csv
import dataclasses
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from roadwork.data.index import ShardIndex
from roadwork.errors import UserError
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import state_digest
from roadwork.training import folds
from roadwork.training.fold_cache import FixedCopies, LivePrefix, PrefixCache
from roadwork.training.fold_trainer import train_fold
from tests.inference.small_run import alone, make

CPU = torch.device("cpu")
DAMAGED = 3


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The small run with the pixels of one labelled photo overwritten."""
    config = make(tmp_path_factory.mktemp("unreadable"))
    config.folds.epochs = 1
    path = Path(config.data.shards) / "train-000000.tar"
    with tarfile.open(path) as tar:
        offset = tar.getmember(f"{DAMAGED:08d}.views.jpg").offset_data
    raw = bytearray(path.read_bytes())
    raw[offset : offset + 2] = b"\0\0"
    path.write_bytes(raw)
    return config


def source_of(kind, model, index, data, config, folder):
    encoding = FixedCopies(config, CPU)
    if kind == "anew":
        return LivePrefix(index, data.rows, encoding, config)
    cache = PrefixCache(folder, data.rows, 2, CPU, {"outputs": None, "activations": 5}[kind])
    cache.fill(model, index, encoding, config, 0, 1)
    return cache


def made(config, kind, folder):
    """Model, photos, and where their prefixes come from."""
    model = RoadworkDetector.from_pretrained(Path(config.run.dir) / "best").requires_grad_(False)
    index = ShardIndex.open(config.data.shards, "train")
    data = folds.fold_data(index, config)
    return model, data, source_of(kind, model, index, data, config, folder)


@pytest.mark.parametrize("kind", ["outputs", "activations", "anew"])
def test_its_label_moves_nothing(config, tmp_path, kind):
    model, data, source = made(config, kind, tmp_path)
    (position,) = np.flatnonzero(data.ids == f"photo.{DAMAGED}")
    flipped = dataclasses.replace(data, labels=data.labels.copy())
    flipped.labels[position] = 1 - data.labels[position]
    own = int(data.fold[position])
    for fold in (own, (own + 1) % data.number):
        a, b = (train_fold(model, source, labelled, fold, config, CPU) for labelled in (data, flipped))
        assert state_digest(a.model) == state_digest(b.model)
        assert a.history == b.history
        assert np.array_equal(a.held[~a.readable], [position] if fold == own else [])
        assert (a.log_odds[~a.readable] == 0).all()


class Blind:
    """A source in which no photo of some folds is readable."""

    def __init__(self, source, hidden):
        self.source, self.hidden = source, hidden

    def batches(self, *arguments):
        for prefix in self.source.batches(*arguments):
            yield dataclasses.replace(prefix, readable=torch.as_tensor(~self.hidden[prefix.positions]))


def test_a_batch_without_a_readable_photo_makes_no_step(config, tmp_path):
    """Not even weight decay; and a fold that could judge nothing stops."""
    model, data, source = made(config, "outputs", tmp_path)
    result = train_fold(model, Blind(source, data.fold != 0), data, 0, config, CPU)
    trained = result.model.get_base_model()
    assert not trained.layers[0].attention.qkv_proj.lora_B["default"].weight.any()
    head = dict(trained.classifier.modules_to_save["default"].named_parameters())
    assert all(torch.equal(head[name], value) for name, value in model.classifier.named_parameters())
    with pytest.raises(UserError, match="none of the .* photos that fold 0 holds out can be read"):
        train_fold(model, Blind(source, data.fold == 0), data, 0, config, CPU)


def test_its_row_says_nothing_and_it_is_named(config):
    folder = folds.fine_tune_folds(config, alone(), folds.prepare(config))
    index = ShardIndex.open(config.data.shards, "train")
    rows = list(csv.DictReader((folder / "oof.csv").open()))
    assert [row["id"] for row in rows] == index.id[index.label >= 0].tolist()
    assert [row["id"] for row in rows if float(row["probability"]) == 0.5] == [f"photo.{DAMAGED}"]
    named = [json.loads((folder / f"fold-{fold}" / "fold.json").read_text())["unreadable"] for fold in range(3)]
    assert sum(named, []) == [f"photo.{DAMAGED}"]
