"""Descriptions become vectors only when they are asked for, and then reach the model: the real encoder, real shards."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from roadwork.data.build import build
from roadwork.data.index import ShardIndex, rebuild_index
from roadwork.data.plan import BuildOptions
from roadwork.data.text import PACKAGED, embed
from roadwork.errors import UserError
from roadwork.training.loop import Trainer
from roadwork.training.parts import build_data, build_model
from tests.data.photos import dataset
from tests.training.small_trainer import options, plain_engine

FIELDS = "--model.metadata_fields=[gps,weather,daytime,scene,text]"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("described"), 36, 8)


@pytest.fixture(scope="module")
def shards(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "shards"
    build(BuildOptions(str(source), str(out), view_size=32, processes=1, text_encoder=PACKAGED, val_fraction=0.3))
    return out


def test_what_means_the_same_lies_closer_and_an_empty_text_has_no_vector() -> None:
    texts = ["orange cones block the lane", "", "traffic cones close one lane", "a cat sleeps on a sofa"]
    first, none, second, other = embed(PACKAGED, texts)
    assert none is None and embed(PACKAGED, ["", " "]) == [None, None]
    near, far = np.dot(first, second), np.dot(first, other)
    assert near > far + 0.3 and np.linalg.norm(first) == pytest.approx(1, abs=1e-3) and len(first) == 384
    assert embed(PACKAGED, texts)[0] == first


def test_an_encoder_that_cannot_be_had_is_one_line_before_anything_is_read(tmp_path: Path) -> None:
    given = BuildOptions("no such source", str(tmp_path / "out"), text_encoder=str(tmp_path))
    with pytest.raises(UserError, match=r"--text-encoder .* cannot be loaded .* give minilm") as told:
        build(given)
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()


def test_vectors_lie_in_the_json_of_described_photos_alone(shards: Path) -> None:
    found = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            lines = [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".json")]  # type: ignore[arg-type]
        found |= {line["id"]: line for line in lines}
    assert {line["label"]: line["text"] is None for line in found.values()} == {0: True, 1: False}
    expected = embed(PACKAGED, ["men at work"])[0]
    assert all(np.allclose(line["text"], expected, atol=1e-4) for line in found.values() if line["text"])


def test_the_trainer_is_given_them_and_the_text_encoder_of_the_model_learns(shards: Path, tmp_path: Path) -> None:
    config = options(tmp_path / "run", shards, FIELDS, "--model.metadata_dropout=0")
    data = build_data(config)
    engine = plain_engine(config)
    for loader in (data.train_loader(engine, config, 0), data.val_loader(engine, config)):
        batch = next(iter(loader))
        assert torch.equal(torch.isfinite(batch.metadata["text"]).all(-1), batch.label == 1)
    made = build_model(config, data.view_size)
    batch = next(batch for batch in data.train_loader(engine, config, 0) if (batch.label == 1).any())
    output = made.model(batch.views.float() / 255, batch.view_mask, batch.metadata, batch.boxes)
    output.logits.sum().backward()
    encoder = dict(made.model.metadata_encoder.encoders["text"].named_parameters())
    assert encoder and all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in encoder.values())
    made.model.zero_grad()
    trainer = Trainer(config, engine, data, made)
    assert trainer.run().step == 6
    trainer.close()


def test_shards_without_vectors_are_refused_in_one_line(source: Path, tmp_path: Path) -> None:
    build(BuildOptions(str(source), str(tmp_path / "plain"), view_size=32, processes=1, val_fraction=0.3))
    assert not json.loads((tmp_path / "plain" / "manifest.json").read_text())["options"]["text_encoder"]
    with pytest.raises(
        UserError, match=r"holds no vectors of descriptions; build the shards again with --text-encoder"
    ):
        build_data(options(tmp_path / "run", tmp_path / "plain", FIELDS))


def test_shards_whose_index_was_rebuilt_still_train_on_descriptions(shards: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(shards, tmp_path / "copy"))
    rebuild_index(copy)
    assert build_data(options(tmp_path / "run", copy, FIELDS)).train.manifest["rebuilt_from_tars"]


def test_another_encoder_builds_the_shards_anew(source: Path, shards: Path) -> None:
    before = ShardIndex.open(shards, "train").manifest["shards"]
    build(BuildOptions(str(source), str(shards), view_size=32, processes=1, val_fraction=0.3))
    assert ShardIndex.open(shards, "train").manifest["shards"] != before
