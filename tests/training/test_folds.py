"""DoRA folds: from the same pristine weights, by group, resumable, each photo held out exactly once."""

import csv
import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.errors import UserError
from roadwork.evaluation.metrics import log_loss
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import shared_units, state_digest
from roadwork.training import folds
from roadwork.training.fold_cache import FixedCopies, LivePrefix, PrefixCache, photo_key
from roadwork.training.fold_queue import one_job_at_a_time
from roadwork.training.fold_trainer import copy_of, learning_rate_factor, parameter_groups, train_fold
from tests.inference.small_run import alone, make

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make(tmp_path_factory.mktemp("folds"))


@pytest.fixture(scope="module")
def trained(config):
    prepared = folds.prepare(config)
    before = state_digest(RoadworkDetector.from_pretrained(prepared.best))
    folder = folds.fine_tune_folds(config, alone(), prepared)
    assert state_digest(RoadworkDetector.from_pretrained(prepared.best)) == before
    return folder


@pytest.fixture
def pristine(config):
    return RoadworkDetector.from_pretrained(Path(config.run.dir) / "best").requires_grad_(False)


def test_folds_keep_groups_whole_and_classes_alike():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 5).astype(str)
    labels = (rng.random(300) < 0.8).astype(int)
    fold = folds.assign_folds(labels, groups, 5, seed=0)
    assert all(len(set(fold[groups == name])) == 1 for name in set(groups))
    assert set(fold) == set(range(5))
    assert all(0.7 < labels[fold == k].mean() < 0.9 for k in range(5))
    assert np.array_equal(fold, folds.assign_folds(labels, groups, 5, seed=0))
    assert not np.array_equal(fold, folds.assign_folds(labels, groups, 5, seed=1))


@pytest.mark.parametrize(
    ("labels", "groups", "number", "message"),
    [
        ([0, 1, 0, 1], ["a", "a", "b", "b"], 3, "has 2 groups"),
        ([1, 1, 1, 1], list("abcd"), 2, "only label 1"),
        ([0, 1], list("ab"), 1, "at least 2"),
        ([0, 1], list("ab"), 2, "has 1 and 1 photos per label; build shards with more"),
        ([0, 1, 0, 1], list("abcd"), 3, "has 2 and 2 photos per label; set it to 2 or less"),
    ],
)
def test_impossible_folds_are_one_clear_line(labels, groups, number, message):
    with pytest.raises(UserError, match=message):
        folds.assign_folds(np.array(labels), np.array(groups), number, 0)


def test_a_rare_class_may_stay_out_of_some_folds():
    with pytest.warns(UserWarning, match="least populated class"):
        fold = folds.assign_folds(np.array([0, 0, 0, 1, 1]), np.array(list("abcde")), 3, 0)
    assert set(fold) == {0, 1, 2}


def test_no_fold_is_empty():
    """scikit-learn may leave one empty where groups are few and of one label each."""
    labels, groups = np.repeat([0, 0, 0, 1, 1], [5, 5, 6, 6, 5]), np.repeat(list("abcde"), [5, 5, 6, 6, 5])
    for seed in range(40):
        try:
            assert set(folds.assign_folds(labels, groups, 5, seed)) == set(range(5))
        except UserError as error:
            assert "the 5 groups fill fewer folds; set it to 4 or less" in str(error)


def test_every_labelled_photo_is_held_out_exactly_once(config, trained):
    index = ShardIndex.open(config.data.shards, "train")
    rows = list(csv.DictReader((trained / "oof.csv").open()))
    assert [row["id"] for row in rows] == index.id[index.label >= 0].tolist()
    group = dict(zip(index.id.tolist(), index.group.tolist(), strict=True))
    by_group: dict[str, set[str]] = {}
    for row in rows:
        by_group.setdefault(group[row["id"]], set()).add(row["fold"])
        assert 0 <= float(row["probability"]) <= 1
    assert all(len(found) == 1 for found in by_group.values())


def test_vanilla_peft_gives_the_out_of_fold_answers(config, trained, pristine):
    """Adapter on the disk, plain peft, photos from the shards: the same numbers as oof.csv."""
    index = ShardIndex.open(config.data.shards, "train")
    adapted = PeftModel.from_pretrained(pristine, str(trained / "fold-1")).eval().get_base_model()
    data = folds.fold_data(index, config)
    held = np.flatnonzero(data.fold == 1)
    live = LivePrefix(index, data.rows, FixedCopies(config, CPU), config)
    answers = {}
    with torch.no_grad():
        for prefix in live.batches(adapted, held, np.zeros(len(held), int), 4):
            probability = adapted.decide(prefix.encoded, prefix.metadata).logits.softmax(-1)[:, 1]
            answers |= dict(zip(data.ids[prefix.positions].tolist(), probability.tolist(), strict=True))
    rows = [row for row in csv.DictReader((trained / "oof.csv").open()) if row["fold"] == "1"]
    assert {row["id"] for row in rows} == set(answers)
    assert all(abs(float(row["probability"]) - answers[row["id"]]) < 1e-5 for row in rows)


def cached(config, pristine, tmp_path, copies=2, unit=None):
    index = ShardIndex.open(config.data.shards, "train")
    data = folds.fold_data(index, config)
    cache = PrefixCache(tmp_path / "prefix", data.rows, copies, CPU, unit)
    cache.fill(pristine, index, FixedCopies(config, CPU), config, 0, 1)
    return index, data, cache


def test_a_fold_leaves_the_pristine_weights_and_does_not_depend_on_other_folds(config, pristine, tmp_path):
    _, data, cache = cached(config, pristine, tmp_path)
    before = state_digest(pristine)
    alone_first = train_fold(pristine, cache, data, 1, config, CPU)
    train_fold(pristine, cache, data, 0, config, CPU)
    again = train_fold(pristine, cache, data, 1, config, CPU)
    assert state_digest(pristine) == before
    assert state_digest(alone_first.model) == state_digest(again.model)
    assert state_digest(pristine) != state_digest(again.model)
    assert [name for name, _ in pristine.named_modules() if "lora" in name] == []


def with_targets(config, *more):
    targets = [*config.folds.target_modules, *more]
    return dataclasses.replace(config, folds=dataclasses.replace(config.folds, target_modules=targets))


@pytest.mark.parametrize(
    ("unit", "targets"),
    [
        (None, []),
        (6, ["projection"]),
        (5, ["blocks.5.attn.qkv", "blocks.5.mlp.fc1"]),
        (1, ["blocks.1.attn.qkv"]),
    ],
)
def test_the_cache_gives_what_encoding_anew_gives(config, pristine, tmp_path, unit, targets):
    config = with_targets(config, *targets)
    assert shared_units(pristine, config.folds.target_modules) == unit
    index, data, cache = cached(config, pristine, tmp_path, unit=unit)
    live = LivePrefix(index, data.rows, FixedCopies(config, CPU), config)
    positions = np.array([7, 0, 3, 20, 11])
    copies = np.array([0, 1, 1, 0, 1])
    for ours, theirs in zip(
        cache.batches(pristine, positions, copies, 3), live.batches(pristine, positions, copies, 3), strict=True
    ):
        with torch.no_grad():
            a = pristine.decide(ours.encoded, ours.metadata).logits
            b = pristine.decide(theirs.encoded, theirs.metadata).logits
        assert torch.allclose(a, b, atol=1e-5)
        assert np.array_equal(ours.positions, theirs.positions)
    fold, other = (train_fold(pristine, source, data, 0, config, CPU) for source in (cache, live))
    assert np.allclose(fold.log_odds, other.log_odds, atol=1e-4)


def test_copies_differ_and_copy_0_is_the_photo(config, pristine, tmp_path):
    _, data, cache = cached(config, pristine, tmp_path, copies=3)
    everything = np.arange(len(data.rows))
    tokens = [
        next(cache.batches(pristine, everything, np.full_like(everything, k), 99)).encoded.tokens for k in range(3)
    ]
    assert (tokens[0] != tokens[1]).any()
    assert (tokens[1] != tokens[2]).any()
    assert copy_of(np.array([4, 5]), 1, 3).tolist() == [2, 0]
    assert photo_key("photo.1") != photo_key("photo.2")
    assert 0 <= photo_key("photo.1") < 2**62


def test_copies_are_augmented_at_half_the_configured_strength(config):
    """Of flips that would hit every photo half remain; the photo itself, copy 0, is never touched."""
    loaded = next(iter(EvalLoader(ShardIndex.open(config.data.shards, "train"), batch=30, workers=0)))
    plain = loaded.views.float() / 255
    nothing = {name: 0.0 for name in vars(config.augment) if name.endswith("_p")}

    def changed(scale, copy):
        augment = dataclasses.replace(config.augment, **(nothing | {"flip_p": 1.0}))
        options = dataclasses.replace(config.folds, augment_scale=scale)
        encoding = FixedCopies(dataclasses.replace(config, augment=augment, folds=options), CPU)
        return int((encoding.views(loaded, np.full(30, copy)) != plain).flatten(1).any(1).sum())

    assert config.folds.augment_scale == 0.5
    assert changed(1.0, 1) == 30
    assert 45 < sum(changed(0.5, copy) for copy in range(1, 5)) < 75
    assert changed(0.0, 1) == changed(1.0, 0) == 0


def test_chunks_do_not_depend_on_who_made_them(config, pristine, tmp_path, monkeypatch):
    monkeypatch.setattr("roadwork.training.fold_cache.CHUNK", 7)
    index, data, one = cached(config, pristine, tmp_path)
    two = PrefixCache(tmp_path / "two", data.rows, 2, CPU)
    for rank in (1, 0):
        two.fill(pristine, index, FixedCopies(config, CPU), config, rank, 2)
    names = sorted(path.relative_to(one.folder) for path in one.folder.rglob("*.npy"))
    assert names == sorted(path.relative_to(two.folder) for path in two.folder.rglob("*.npy"))
    assert len({name.parts[0] for name in names}) == 4
    for name in names:
        assert np.allclose(np.load(one.folder / name), np.load(two.folder / name), atol=1e-5, equal_nan=True)
    assert one.bytes == two.bytes > 0


def test_a_cache_above_its_bound_is_refused_or_done_without(config, tmp_path):
    """Encoder outputs are small and wanted; activations inside the backbone are a gain that may be left."""
    (tmp_path / "best").symlink_to(Path(config.run.dir) / "best")

    def source(*targets):
        run = dataclasses.replace(
            with_targets(config, *targets), run=dataclasses.replace(config.run, dir=str(tmp_path))
        )
        run.folds.cache_gib = limit
        prepared = folds.prepare(run)
        model = RoadworkDetector.from_pretrained(prepared.best).requires_grad_(False)
        return folds.prefix_source(model, prepared, run, alone())

    limit = 1e-6
    with pytest.raises(UserError, match="above folds.cache_gib"):
        source()
    assert isinstance(source("blocks.5.attn.qkv"), LivePrefix)
    limit = 1.0
    assert source().unit is None
    assert source("blocks.5.attn.qkv").unit == 5
    assert isinstance(source("blocks.0.attn.qkv"), LivePrefix)


def test_the_default_learning_rate_moves_predictions(trained):
    details = json.loads((trained / "fold-0" / "fold.json").read_text())
    losses = [row["held_out_loss"] for row in details["history"]]
    assert max(losses) - min(losses) > 1e-3


def test_finished_folds_are_kept_and_foreign_ones_refused(config, trained):
    stamps = {path: path.stat().st_mtime_ns for path in trained.glob("fold-*/adapter_model.safetensors")}
    (trained / "fold-2" / "COMPLETE").unlink()
    prepared = folds.prepare(config)
    assert prepared.done == [0, 1]
    folds.fine_tune_folds(config, alone(), prepared)
    now = {path: path.stat().st_mtime_ns for path in stamps}
    changed = {path.parent.name for path in stamps if now[path] != stamps[path]}
    assert changed == {"fold-2"}
    other = dataclasses.replace(config, folds=dataclasses.replace(config.folds, learning_rate=1e-5))
    with pytest.raises(UserError, match="trained with another folds"):
        folds.prepare(other)


def test_doubled_and_missing_held_out_answers_are_refused(config, trained, tmp_path):
    data = folds.fold_data(ShardIndex.open(config.data.shards, "train"), config)
    for fold in range(3):
        target = tmp_path / f"fold-{fold}"
        target.mkdir()
        (target / "held_out.json").write_text((trained / f"fold-{fold}" / "held_out.json").read_text())
    folds.write_out_of_fold(tmp_path, data)
    answers = json.loads((tmp_path / "fold-0" / "held_out.json").read_text())
    (tmp_path / "fold-0" / "held_out.json").write_text(json.dumps(answers[1:]))
    with pytest.raises(UserError, match="held-out answers for"):
        folds.write_out_of_fold(tmp_path, data)
    (tmp_path / "fold-1" / "held_out.json").write_text(json.dumps(answers))
    (tmp_path / "fold-0" / "held_out.json").write_text(json.dumps(answers))
    with pytest.raises(UserError, match="held out by two folds"):
        folds.write_out_of_fold(tmp_path, data)


def opposed(pristine, cache, data, fold):
    """Labels that the network half agrees with where the fold holds photos out, and their opposites elsewhere."""
    everything = np.arange(len(data.rows))
    (prefix,) = cache.batches(pristine, everything, np.zeros_like(everything), len(everything))
    logits = pristine.decide(prefix.encoded, prefix.metadata).logits
    odds = (logits[:, 1] - logits[:, 0]).numpy()
    agreed = odds > np.median(odds[data.fold == fold])
    return dataclasses.replace(data, labels=np.where(data.fold == fold, agreed, ~agreed).astype(np.int64))


def test_a_fold_that_only_worsens_stops_early_and_keeps_its_first_epoch(config, pristine, tmp_path):
    """Epoch 0 is no candidate; what is kept are the adapters that gave the kept answers."""
    _, data, cache = cached(config, pristine, tmp_path)
    data = opposed(pristine, cache, data, 0)
    options = dataclasses.replace(config.folds, epochs=5, patience=1, learning_rate=1e-3)
    result = train_fold(pristine, cache, data, 0, dataclasses.replace(config, folds=options), CPU)
    losses = [row["held_out_loss"] for row in result.history]
    assert losses == sorted(losses) and [row["epoch"] for row in result.history] == [0, 1, 2]
    assert result.best_epoch == 1
    model = result.model.eval().get_base_model()
    with torch.no_grad():
        (prefix,) = cache.batches(model, result.held, np.zeros_like(result.held), len(result.held))
        logits = model.decide(prefix.encoded, prefix.metadata).logits.double()
    odds = (logits[:, 1] - logits[:, 0]).numpy()
    assert np.allclose(odds, result.log_odds, atol=1e-5)
    probability = 1 / (1 + np.exp(-odds))
    assert log_loss(data.labels[result.held], probability) == pytest.approx(losses[1], abs=1e-5)


def test_magnitudes_are_not_decayed(config, pristine, tmp_path):
    _, data, cache = cached(config, pristine, tmp_path)
    model = train_fold(pristine, cache, data, 0, config, CPU).model
    decayed, free = parameter_groups(model, 0.1)
    magnitudes = {id(value) for name, value in model.named_parameters() if "lora_magnitude" in name}
    assert magnitudes
    assert magnitudes <= {id(value) for value in free["params"]}
    assert free["weight_decay"] == 0.0
    assert all(value.ndim >= 2 for value in decayed["params"])


def test_learning_rate_rises_then_falls_to_nothing():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert max(factors) == factors[10] == 1.0
    assert factors[0] == pytest.approx(0.1)
    assert factors[-1] < 0.01


def test_without_a_pre_trained_model_the_line_says_what_to_run(config, tmp_path):
    lonely = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(tmp_path)))
    with pytest.raises(UserError, match="run launch/pretrain.py"):
        folds.prepare(lonely)


@pytest.mark.parametrize(
    ("name", "value"), [("lora_alpha", 0.0), ("lora_alpha", float("nan")), ("augment_scale", -0.5), ("r", 0)]
)
def test_impossible_options_are_one_clear_line(config, name, value):
    wrong = dataclasses.replace(config, folds=dataclasses.replace(config.folds, **{name: value}))
    with pytest.raises(UserError, match=f"folds.{name} is .*; give"):
        folds.prepare(wrong)


def test_jobs_that_share_a_run_folder_fill_its_cache_one_after_the_other(tmp_path):
    """The tasks of a job array; a lock belongs to an open file, so threads stand for jobs here."""
    seen: list[tuple[str, int]] = []

    def job(who: int) -> None:
        with one_job_at_a_time(alone(), tmp_path / "prefix", poll_s=0.01):
            seen.append(("in", who))
            time.sleep(0.1)
            seen.append(("out", who))

    with ThreadPoolExecutor(4) as jobs:
        list(jobs.map(job, range(4)))
    assert sorted(who for _, who in seen) == [0, 0, 1, 1, 2, 2, 3, 3]
    for entered, left in zip(seen[::2], seen[1::2], strict=True):
        assert (entered[0], left[0]) == ("in", "out")
        assert entered[1] == left[1]
