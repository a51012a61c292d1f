"""What training needs of the model: groups, adapters, statistics over processes, and that it learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from roadwork.config import FoldsConfig, ModelConfig
from roadwork.models import RoadworkDetector, parameter_groups

Build = Callable[..., RoadworkDetector]
Photos = Callable[..., tuple[Tensor, Tensor, Tensor]]


def test_groups_hold_each_trainable_parameter_once_with_decayed_rates(build: Build) -> None:
    model = build(trainable="last-3")
    groups = parameter_groups(model, 1e-3, 0.05, layer_decay=0.5, backbone_factor=0.1)
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({(g["weight_decay"], g["lr_scale"]) for g in groups}) == len(groups)
    where = {id(p): g for g in groups for p in g["params"]}
    units = model.backbone.units()
    assert [where[id(u.attn.qkv.weight)]["lr_scale"] for u in units[3:]] == pytest.approx([0.025, 0.05, 0.1])
    assert where[id(model.backbone.net.norm.weight)]["lr_scale"] == pytest.approx(0.1)
    assert where[id(model.projection.weight)]["lr"] == pytest.approx(1e-3)
    assert where[id(units[-1].attn.qkv.weight)]["lr"] == pytest.approx(1e-4)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or "null" in name or "seed" in name
            assert (where[id(parameter)]["weight_decay"] == 0) == plain, name


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
def test_each_unit_learns_slower_than_the_next(build: Build, name: str) -> None:
    model = build(backbone=name, trainable="full")
    groups = parameter_groups(model, 1.0, 0.05, layer_decay=0.5, backbone_factor=0.1)
    where = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    depth = model.backbone.depth
    assert depth > 2
    for i, unit in enumerate(model.backbone.units()):
        assert list({where[id(p)] for p in unit.parameters()}) == [pytest.approx(0.1 * 0.5 ** (depth - 1 - i))]
    tail = [p for module in model.backbone._tail() for p in module.parameters()]
    assert list({where[id(p)] for p in tail}) == [pytest.approx(0.1)]


def test_full_training_gives_the_stem_the_smallest_rate(build: Build) -> None:
    model = build(trainable="full")
    groups = parameter_groups(model, 1.0, 0.05, layer_decay=0.5, backbone_factor=1.0)
    where = {id(p): g for g in groups for p in g["params"]}
    assert where[id(model.backbone.net.patch_embed.proj.weight)]["lr_scale"] == pytest.approx(0.5**6)
    assert where[id(model.backbone.net.cls_token)]["weight_decay"] == 0


def test_dora_attaches_to_the_default_targets_trains_and_merges(build: Build, photos: Photos, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folds = FoldsConfig()
    model = build(dropout=0.0)
    views, mask, boxes = photos([3, 2])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LoraConfig(
        use_dora=True,
        r=4,
        lora_alpha=8,
        target_modules=folds.target_modules,
        modules_to_save=folds.modules_to_save,
    )
    adapted = get_peft_model(model, config)
    magnitudes = [n for n, _ in adapted.named_parameters() if "lora_magnitude_vector" in n]
    assert len(magnitudes) == len(folds.target_modules)
    groups = parameter_groups(adapted, 1e-2, 0.02)
    names = {id(p): n for n, p in adapted.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == 0 or "magnitude" not in names[id(parameter)]
    optimizer = torch.optim.AdamW(groups)
    encoded = model.encode(views, mask, boxes)
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model.decide(encoded).logits, torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    expected = model.decide(encoded).logits
    adapted.save_pretrained(tmp_path)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged.decide(encoded).logits, expected, atol=1e-5, rtol=1e-5)
    base = build(dropout=0.0)
    for name, value in base.state_dict().items():
        assert torch.equal(value, before[name]), name
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded.base_model.model.decide(encoded).logits, expected, atol=1e-5, rtol=1e-5)


def test_forty_steps_learn_a_striped_square() -> None:
    """Somewhere in one of four views; pretrained frozen small net, all views kept, plain AdamW."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="efficientnet_lite0",
        trainable="frozen",
        keep_ratio=1.0,
        hidden_dim=128,
        num_layers=1,
        expert_dim=64,
        segmentation_size=8,
    )
    model = RoadworkDetector(config, 64).train()
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(96) % 2
    views = torch.rand(96, 4, 3, 1, 1, generator=generator).expand(-1, -1, -1, 64, 64).clone()
    views += 0.1 * torch.rand(views.shape, generator=generator)
    for i in range(1, 96, 2):
        view, y, x = (int(torch.randint(0, n, (1,), generator=generator)) for n in (4, 32, 32))
        square = views[i, view, :, y : y + 32, x : x + 32]
        square[0, ::2], square[2, ::2] = 1.0, 0.0
    views = views.clamp(0, 1)
    train, test = slice(0, 64), slice(64, 96)
    optimizer = torch.optim.AdamW(parameter_groups(model, 2e-3, 0.05, 0.75, 0.1))
    for step in range(40):
        rows = torch.arange(step * 16, step * 16 + 16) % 64
        outputs = model(views[train][rows], segmentation=False)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels[train][rows]) + 0.01 * outputs.balance
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        predicted = model.eval()(views[test], segmentation=False).logits.argmax(1)
    assert (predicted == labels[test]).float().mean() >= 0.9
