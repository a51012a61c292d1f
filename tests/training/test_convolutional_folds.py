"""Folds with adapters on a convolutional backbone: the same fold from the cache and from encoding anew, and merged."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from peft import PeftModel

from roadwork.data.index import ShardIndex
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import call_with, merged_overrides, replaced, shared_units, state_digest
from roadwork.training import folds
from roadwork.training.fold_cache import FixedCopies, LivePrefix, PrefixCache
from roadwork.training.fold_trainer import train_fold
from tests.inference.small_run import make
from tests.models.test_adapters import TINY

CPU = torch.device("cpu")
CONVOLUTIONS = ["blocks.4.0.conv_pw", "blocks.4.0.conv_pwl"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = make(tmp_path_factory.mktemp("convolutional"))
    config.folds.target_modules = [*config.folds.target_modules, *CONVOLUTIONS]
    return config


@pytest.fixture(scope="module")
def pristine():
    torch.manual_seed(0)
    model = RoadworkDetector(dataclasses.replace(TINY, backbone="test_efficientnet"), 32)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(30)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sources(config, pristine, tmp_path_factory):
    """The photos, and their prefixes from the cache (before the last stage) and encoded anew."""
    index = ShardIndex.open(config.data.shards, "train")
    data, encoding = folds.fold_data(index, config), FixedCopies(config, CPU)
    unit = shared_units(pristine, config.folds.target_modules)
    assert unit == len(pristine.backbone.units()) - 1
    cache = PrefixCache(tmp_path_factory.mktemp("prefix"), data.rows, 2, CPU, unit)
    cache.fill(pristine, index, encoding, config, 0, 1)
    return data, cache, LivePrefix(index, data.rows, encoding, config)


@torch.no_grad()
def logits(model, source, positions, copies):
    batches = source.batches(model, positions, copies, 3)
    return torch.cat([model.decide(one.encoded, one.metadata).logits for one in batches])


@torch.no_grad()
def per_call(model, overrides):
    """Logits of random views under weights that are exchanged for the call, as prediction does it."""
    views = torch.rand(4, 3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    encoded = call_with(model, overrides, "encode", views, None, None, False)
    return call_with(model, overrides, "decide", encoded, None, False).logits


def test_the_cache_gives_what_encoding_anew_gives(config, pristine, sources):
    data, cache, live = sources
    chosen = np.array([7, 0, 3, 20, 11]), np.array([0, 1, 1, 0, 1])
    assert torch.allclose(logits(pristine, cache, *chosen), logits(pristine, live, *chosen), atol=1e-5)
    before = state_digest(pristine)
    ours, theirs = (train_fold(pristine, source, data, 0, config, CPU) for source in (cache, live))
    assert np.allclose(ours.log_odds, theirs.log_odds, atol=1e-4)
    assert state_digest(pristine) == before
    moved = [name for name, value in ours.model.named_parameters() if "lora_B" in name and value.any()]
    assert all(any(target in name for name in moved) for target in CONVOLUTIONS)


def test_merged_equals_adapted_equals_vanilla_peft(config, pristine, sources, tmp_path):
    data, cache, live = sources
    strong = dataclasses.replace(config.folds, learning_rate=1e-2)
    result = train_fold(pristine, cache, data, 0, dataclasses.replace(config, folds=strong), CPU)
    result.model.eval().save_pretrained(str(tmp_path))
    photos = result.held, np.zeros_like(result.held)
    wanted = logits(result.model.get_base_model(), live, *photos)
    vanilla = PeftModel.from_pretrained(copy.deepcopy(pristine), str(tmp_path)).eval().get_base_model()
    assert (logits(vanilla, live, *photos) - wanted).abs().max() <= 1e-6
    plain, before = logits(pristine, live, *photos), state_digest(pristine)
    overrides = merged_overrides(pristine, tmp_path)
    assert {f"backbone.net.{name}.weight" for name in CONVOLUTIONS} <= set(overrides)
    with replaced(pristine, overrides) as merged:
        found = logits(merged, live, *photos)
    assert (wanted - plain).abs().max() > 1e-2
    assert (found - wanted).abs().max() <= 1e-6
    assert state_digest(pristine) == before
    assert (per_call(pristine, overrides) - per_call(result.model.get_base_model(), {})).abs().max() <= 1e-6
    assert (per_call(pristine, {}) - per_call(pristine, overrides)).abs().max() > 1e-2
