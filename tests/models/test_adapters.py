"""DoRA adapters: vanilla peft reads them, merged equals adapted, and the model they were on is as it was."""

import copy
import dataclasses
import json

import pytest
import torch
from peft import PeftModel

from roadwork.config import FoldsConfig, ModelConfig
from roadwork.errors import UserError
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import (
    attach,
    average,
    call_with,
    merged_overrides,
    replaced,
    shared_units,
    state_digest,
)

TINY = ModelConfig(
    backbone="test_vit",
    weights="random",
    hidden_dim=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    expert_dim=32,
    segmentation_size=8,
    prune_after=1,
)


@pytest.fixture(scope="module")
def detector() -> RoadworkDetector:
    torch.manual_seed(0)
    return RoadworkDetector(TINY, 32).eval()


@pytest.fixture(scope="module")
def encoded(detector):
    torch.manual_seed(1)
    with torch.no_grad():
        return detector.encode(torch.rand(6, 3, 3, 32, 32), segmentation=False)


def saved_adapter(detector, folder, config=None, seed=0, scale=0.3):
    """An adapter with weights far from the start, and the adapted model."""
    torch.manual_seed(seed)
    model = attach(copy.deepcopy(detector), config or FoldsConfig(r=4)).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(scale * value.abs().mean().clamp_min(0.1) * torch.randn_like(value))
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 32 / 4), (True, 32 / 2)])
@torch.no_grad()
def test_merged_equals_adapted_equals_vanilla_peft(detector, encoded, tmp_path, rslora, scaling):
    """Under alpha / r and, as rank-stabilised adapters have it, under alpha / sqrt(r)."""
    adapted = saved_adapter(detector, tmp_path, FoldsConfig(r=4, lora_alpha=32, rslora=rslora))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is rslora
    assert adapted.get_base_model().layers[0].attention.qkv_proj.scaling == {"default": scaling}
    before = state_digest(detector)
    overrides = merged_overrides(detector, tmp_path)
    plain = detector.decide(encoded).logits
    wanted = adapted.get_base_model().decide(encoded).logits
    merged = call_with(detector, overrides, "decide", encoded).logits
    vanilla = PeftModel.from_pretrained(copy.deepcopy(detector), str(tmp_path)).eval()
    assert (wanted - plain).abs().max() > 1e-2
    assert (merged - wanted).abs().max() <= 1e-6
    assert torch.equal(vanilla.get_base_model().decide(encoded).logits, wanted)
    assert state_digest(detector) == before
    assert torch.equal(detector.decide(encoded).logits, plain)
    assert all(value.requires_grad for value in detector.parameters())


def test_only_what_the_adapter_changes_is_kept(detector, tmp_path):
    saved_adapter(detector, tmp_path)
    names = set(merged_overrides(detector, tmp_path))
    assert {
        "layers.0.attention.qkv_proj.weight",
        "layers.0.attention.out_proj.weight",
        "fusion.importance_net.0.weight",
    } <= names
    assert all(name.startswith(("layers.0.attention.", "fusion.importance_net.0.", "classifier.")) for name in names)


def test_dora_in_fp32_with_the_seeds_targets(detector, tmp_path):
    model = saved_adapter(detector, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["use_dora"] is True
    assert settings["lora_dropout"] == 0.0
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert all(value.dtype == torch.float32 for value in trained.values())
    assert sum("lora_magnitude_vector" in name for name in trained) == 3


@torch.no_grad()
def test_soup_is_the_mean_of_the_merged_weights(detector, tmp_path):
    members = []
    for seed in range(3):
        saved_adapter(detector, tmp_path / str(seed), seed=seed)
        members.append(merged_overrides(detector, tmp_path / str(seed)))
    name = "layers.0.attention.qkv_proj.weight"
    base = dict(detector.named_parameters())
    soup = average(members, base)
    assert torch.allclose(soup[name], sum(member[name] for member in members) / 3, atol=1e-7)
    assert torch.allclose(average([{}, {name: members[0][name]}], base)[name], (base[name] + members[0][name]) / 2)


@torch.no_grad()
def test_replaced_puts_the_weights_back_even_after_an_error(detector, encoded, tmp_path):
    saved_adapter(detector, tmp_path)
    overrides, before = merged_overrides(detector, tmp_path), state_digest(detector)
    with pytest.raises(RuntimeError), replaced(detector, overrides):
        inside = detector.decide(encoded).logits
        raise RuntimeError
    assert torch.equal(inside, call_with(detector, overrides, "decide", encoded).logits)
    assert state_digest(detector) == before


@pytest.mark.parametrize("kind", ["vit", "convolutional"])
def test_a_module_runs_after_as_many_units_as_its_name_tells(kind):
    """Hooks say when each module with weights first runs; `unit_of` must say the same of its name."""
    backbone = {"vit": "test_vit", "convolutional": "test_efficientnet"}[kind]
    model = RoadworkDetector(dataclasses.replace(TINY, backbone=backbone), 64)
    seen, done = {}, 0

    def note(name):
        def hook(_module, _inputs):
            seen.setdefault(name, done)

        return hook

    def passed(_module, _inputs, _output):
        nonlocal done
        done += 1

    for name, part in model.named_modules():
        part.register_forward_pre_hook(note(name))
    for unit in model.backbone.units():
        unit.register_forward_hook(passed)
    with torch.no_grad():
        encoded = model.encode(torch.rand(1, 3, 3, 64, 64))
        encoder = dict(seen)
        model.decide(encoded)
    weighty = [name for name, part in model.named_modules() if next(part.parameters(recurse=False), None) is not None]
    ran = [name for name in weighty if name in seen]
    assert len(ran) > 20
    assert {name: model.unit_of(name) for name in ran} == {name: encoder.get(name) for name in ran}


def test_an_empty_module_of_the_backbone_counts_for_nothing():
    model = RoadworkDetector(dataclasses.replace(TINY, backbone="test_efficientnet"), 64)
    assert any(name.endswith("backbone.net.classifier") for name, _ in model.named_modules())
    defaults = FoldsConfig()
    assert shared_units(model, [*defaults.target_modules, *defaults.modules_to_save]) is None


def test_units_before_the_first_adapted_module_are_shared(detector):
    depth = detector.backbone.depth
    assert shared_units(detector, ["layers.0.attention.qkv_proj", "classifier"]) is None
    assert shared_units(detector, ["layers.0.attention.qkv_proj", "projection"]) == depth
    assert shared_units(detector, [f"blocks.{depth - 1}.attn.qkv", "projection"]) == depth - 1
    assert shared_units(detector, ["attn.qkv"]) == 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["layers.9.attention.qkv_proj"], "no module of the model ends with"), (["classifier"], "peft refuses")],
)
def test_impossible_targets_are_one_clear_line(detector, targets, message):
    with pytest.raises(UserError, match=message) as caught:
        attach(copy.deepcopy(detector), FoldsConfig(target_modules=targets, modules_to_save=[]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "target"),
    [("test_vit", "layers.0.attention.qkv_proj"), ("test_efficientnet", "backbone.net.blocks.4.0.conv_pwl")],
)
def test_weights_that_dora_would_divide_by_zero_are_refused(backbone, target):
    """Pruned or dead channels; linear layers and convolutions. A head that is trained whole may have them."""
    model = RoadworkDetector(dataclasses.replace(TINY, backbone=backbone), 64)
    with torch.no_grad():
        model.get_submodule(target).weight[1:3] = 0
        model.classifier[-1].weight[0] = 0
    before = state_digest(model)
    with pytest.raises(UserError, match=f"2 of the .* outputs of {target} have weights that are all zero"):
        attach(model, FoldsConfig(target_modules=[target]))
    assert state_digest(model) == before
    attach(model, FoldsConfig(target_modules=["layers.0.attention.out_proj"]))


def test_an_adapter_of_another_model_is_refused(detector, tmp_path):
    saved_adapter(detector, tmp_path)
    other = RoadworkDetector(ModelConfig(**{**vars(TINY), "hidden_dim": 64}), 32)
    before = state_digest(other)
    with pytest.raises(UserError, match="does not fit the model"):
        merged_overrides(other, tmp_path)
    assert state_digest(other) == before
