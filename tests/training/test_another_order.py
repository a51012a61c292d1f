"""A checkpoint continues only over the photos, weights and order that it was trained with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from roadwork.config import Config
from roadwork.data.index import ShardIndex, update_index
from roadwork.data.reweight import reweight
from roadwork.errors import UserError
from roadwork.training.counters import Counters
from roadwork.training.parts import Data, build_data
from tests.data.sheets import build


def counters(data: Data, seed: int = 0) -> Counters:
    return Counters(
        global_batch=data.global_batch, seed=seed, samples=len(data.train), order=data.kind, photos=data.photos
    )


@pytest.fixture
def config(tmp_path: Path) -> Config:
    made = Config()
    made.data.shards = str(build(tmp_path / "shards"))
    made.training.max_steps = 4
    return made


def test_the_same_shards_and_options_continue(config: Config, tmp_path: Path) -> None:
    before = counters(build_data(config))
    before.check_same_run(counters(build_data(config)), tmp_path)
    config.data.shards = str(build(tmp_path / "copy"))
    before.check_same_run(counters(build_data(config)), tmp_path)
    replace(before, order="", photos="").check_same_run(counters(build_data(config)), tmp_path)  # of an earlier version


def test_shards_reweighted_between_two_launches_are_refused(config: Config, tmp_path: Path) -> None:
    before = counters(build_data(config))
    (tmp_path / "target.csv").write_text("latitude,longitude\n40.1,-70.1\n")
    reweight(config.data.shards, str(tmp_path / "target.csv"))
    with pytest.raises(UserError, match="step-7 was trained on other photos or weights") as caught:
        before.check_same_run(counters(build_data(config)), tmp_path / "step-7")
    assert "reweighted" in str(caught.value) and "--run.dir" in str(caught.value) and "\n" not in str(caught.value)


def test_another_order_is_refused(config: Config, tmp_path: Path) -> None:
    before = counters(build_data(config))
    config.data.order = "windowed"
    config.data.window = 16
    windowed = counters(build_data(config))
    with pytest.raises(UserError, match="with order global, this launch has windowed by 16"):
        before.check_same_run(windowed, tmp_path)
    config.data.window = 8
    with pytest.raises(UserError, match="with order windowed by 16, this launch has windowed by 8"):
        windowed.check_same_run(counters(build_data(config)), tmp_path)
    config.data.order, config.data.gps_weighted = "global", False
    with pytest.raises(UserError, match="data.gps_weighted changed"):
        before.check_same_run(counters(build_data(config)), tmp_path)
    with pytest.raises(UserError, match="with seed 0, this launch has 1"):
        before.check_same_run(replace(before, seed=1), tmp_path)


def test_best_weights_are_chosen_by_one_figure_to_the_end(config: Config, tmp_path: Path) -> None:
    before = replace(counters(build_data(config)), select_on="mcc")
    before.check_same_run(replace(before, step=3), tmp_path)
    with pytest.raises(UserError, match="chosen by training.select_on mcc, this launch has challenge"):
        before.check_same_run(replace(before, select_on="challenge"), tmp_path)


def test_the_state_of_another_optimizer_is_refused(config: Config, tmp_path: Path) -> None:
    before = replace(counters(build_data(config)), optimizer="adamw")
    before.check_same_run(replace(before, step=3), tmp_path)
    with pytest.raises(UserError, match="optimizer.name adamw, this launch has sophia"):
        before.check_same_run(replace(before, optimizer="sophia"), tmp_path)


def test_a_validation_split_without_a_label_is_refused(config: Config) -> None:
    val = ShardIndex.open(config.data.shards, "val")
    update_index(config.data.shards, {"val": {"label": np.full(len(val), -1)}})
    with pytest.raises(UserError, match="has no label in split val"):
        build_data(config)
