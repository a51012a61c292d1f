"""A backbone's weights fit its size of views, and the hub's answers are told apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from roadwork.errors import UserError
from roadwork.models import RoadworkDetector, weights
from roadwork.models.weights import Recipe, create, load

Build = Callable[..., RoadworkDetector]
NATIVE, GRID = 160, 4
"""View size that timm builds `test_vit` for, and the patches a side of a view of 64 px."""


def pretrained(name: str = "test_vit", **options: Any) -> Any:
    """A timm net at its native size, with positions that say where they are."""
    torch.manual_seed(1)
    net: Any = timm.create_model(name, num_classes=0, **options)
    if getattr(net, "pos_embed", None) is not None:
        nn.init.normal_(net.pos_embed)
    return net


def check_loaded(net: nn.Module, source: dict[str, Tensor]) -> None:
    """Every tensor is the source's, the positions resampled to the smaller grid."""
    for key, value in net.state_dict().items():
        expected = source[key]
        if key == "pos_embed":
            expected = resample_abs_pos_embed(expected, new_size=[GRID, GRID])
        assert torch.equal(value, expected), key


def test_learned_positions_follow_the_size_of_the_views(tmp_path: Path) -> None:
    source = pretrained()
    save_file(source.state_dict(), tmp_path / "native.safetensors")
    net = create(Recipe("test_vit"), 64)
    assert net.pos_embed.shape != source.pos_embed.shape
    assert load(net, Recipe("test_vit"), str(tmp_path / "native.safetensors")) == "file native.safetensors"
    check_loaded(net, source.state_dict())


def test_other_widths_are_still_another_architecture(tmp_path: Path) -> None:
    save_file(pretrained("test_vit2").state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="lack|another architecture"):
        load(create(Recipe("test_vit"), 64), Recipe("test_vit"), str(tmp_path / "other.safetensors"))


DEEPER = {"depth": 12}
SUPERSETS = [
    ("resnet18", "resnet34", {}, r"no layer1.2.conv1.weight \(80 such tensors\)"),
    ("efficientnet_lite0", "efficientnet_b0", {}, r"no blocks.0.0.se.conv_reduce.weight"),
    ("test_vit", "test_vit", DEEPER, r"no blocks.6.norm1.weight"),
    ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3_qkvb", {}, r"no blocks.0.attn.q_bias \(24 such tensors\)"),
]


@pytest.mark.parametrize(("name", "file", "options", "message"), SUPERSETS, ids=[row[1] for row in SUPERSETS])
def test_a_file_that_holds_more_is_another_architecture(
    tmp_path: Path, name: str, file: str, options: dict[str, int], message: str
) -> None:
    """The names that this net wants are there, in the right shapes, and the rest would be lost without a word."""
    torch.save(pretrained(file, **options).state_dict(), tmp_path / "more.pth")
    with pytest.raises(UserError, match=f"of another architecture: this backbone has {message}"):
        load(create(Recipe(name), NATIVE), Recipe(name), str(tmp_path / "more.pth"))


def test_classifiers_and_what_only_pretraining_uses_may_stay_behind(tmp_path: Path) -> None:
    source = pretrained()
    state = source.state_dict()
    others = {
        "head.weight": torch.zeros(3, 64), "head_dist.bias": torch.zeros(3), "mask_token": torch.zeros(1, 64),
        "blocks.0.bn.num_batches_tracked": torch.tensor(3),
    }  # fmt: skip
    for wrapped in ({**state, **others}, {f"module.{key}": value for key, value in state.items()}):
        save_file(wrapped, tmp_path / "full.safetensors")
        net = create(Recipe("test_vit"), NATIVE)
        load(net, Recipe("test_vit"), str(tmp_path / "full.safetensors"))
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_the_backbone_of_a_saved_detector_is_a_file_of_weights(build: Build, tmp_path: Path) -> None:
    saved = build(seed=3)
    saved.save_pretrained(tmp_path)
    fresh = build(weights=str(tmp_path / "model.safetensors"))
    assert all(torch.equal(v, saved.backbone.state_dict()[k]) for k, v in fresh.backbone.state_dict().items())


def meta_dinov3(net: nn.Module) -> dict[str, Tensor]:
    """timm's weights of a DINOv3 as Meta publishes them: its names, one bias for queries, keys and values, and tables."""
    state = dict(net.state_dict())
    state["storage_tokens"], state["mask_token"] = state.pop("reg_token"), torch.zeros(1, 192)
    state["rope_embed.periods"] = torch.ones(16)
    for i in range(12):
        block = f"blocks.{i}."
        q, v = state.pop(block + "attn.q_bias"), state.pop(block + "attn.v_bias")
        state[block + "attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        state[block + "attn.qkv.bias_mask"] = torch.full((3 * 192,), float("nan"))
        for number in (1, 2):
            state[f"{block}ls{number}.gamma"] = state.pop(f"{block}gamma_{number}")
    return state


def test_dinov3_as_meta_publishes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without its bias, which is zero in the published files; one that does something is not dropped silently."""
    biased, plain = Recipe("vit_tiny_patch16_dinov3_qkvb"), Recipe("vit_tiny_patch16_dinov3_qkvb")
    plain.arguments = {"qkv_bias": False}
    source = pretrained(biased.name)
    for zero in (True, False):
        for i in range(12):
            nn.init.constant_(source.get_parameter(f"blocks.{i}.attn.q_bias"), 0.0 if zero else 0.5)
        path = tmp_path / f"{zero}.pth"
        torch.save(meta_dinov3(source), path)
        net = create(biased, 64)
        load(net, biased, str(path))
        check_loaded(net, source.state_dict())
        without = create(plain, 64)
        if zero:
            load(without, plain, str(path))
            check_loaded(without, source.state_dict())
        else:
            with pytest.raises(UserError, match=r"no blocks.0.attn.qkv.bias \(12 such tensors\)"):
                load(without, plain, str(path))
    assert capsys.readouterr().out == ""


def test_in_order_only_where_the_numbers_agree(tmp_path: Path) -> None:
    """Other names say nothing: beyond a classifier's two tensors, more of them are another net's."""
    source = pretrained("test_resnet")
    values = [*source.state_dict().values(), torch.zeros(5, source.num_features), torch.zeros(5)]
    for extra, fits in (([], True), ([torch.zeros(5)], False), ([torch.zeros(1)] * 2, False)):
        torch.save({f"part{i}": value for i, value in enumerate([*values, *extra])}, tmp_path / "ordered.pth")
        net = create(Recipe("test_resnet"), 64)
        if fits:
            load(net, Recipe("test_resnet"), str(tmp_path / "ordered.pth"))
            check_loaded(net, source.state_dict())
        else:
            with pytest.raises(UserError, match=r"lack \d+ of \d+ tensors"):
                load(net, Recipe("test_resnet"), str(tmp_path / "ordered.pth"))
    save_file({f"part{i}": value for i, value in enumerate(values)}, tmp_path / "sorted.safetensors")
    with pytest.raises(UserError, match=r"lack \d+ of \d+ tensors"):  # part10 comes before part2 in there
        load(create(Recipe("test_resnet"), 64), Recipe("test_resnet"), str(tmp_path / "sorted.safetensors"))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(build: Build, tmp_path: Path, wrong: float) -> None:
    state = pretrained("test_resnet").state_dict()
    state["layer2.0.conv1.weight"][0, 0, 0, 0] = wrong
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match="torn.safetensors are damaged: layer2.0.conv1.weight holds NaN or infinity"):
        load(create(Recipe("test_resnet"), 64), Recipe("test_resnet"), str(tmp_path / "torn.safetensors"))
    model = build()
    with torch.no_grad():
        model.projection.bias[3] = wrong
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="model.safetensors are damaged: projection.bias holds NaN"):
        RoadworkDetector.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_a_net_of_the_hub_is_loaded_and_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pretrained(name)
    monkeypatch.setattr(weights, "_from_hub", lambda asked: {name: source}[asked])
    net = create(Recipe(name), 64)
    assert load(net, Recipe(name), "auto") == f"timm {name}.{timm.get_pretrained_cfg(name).tag}"
    check_loaded(net, source.state_dict())


def test_a_hub_out_of_reach_is_one_line_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object, **options: object) -> None:
        raise OSError("Network is unreachable")

    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.setattr("socket.create_connection", refuse)
    before = weights.hub.HF_HUB_OFFLINE
    with pytest.raises(UserError, match=r"no pretrained weights of test_vit \(.*\); pass --model.weights") as caught:
        load(create(Recipe("test_vit"), 64), Recipe("test_vit"), "auto")
    assert "\n" not in str(caught.value) and before == weights.hub.HF_HUB_OFFLINE
