"""A backbone's weights fit its size of views, and the hub's answers are told apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from roadwork.errors import UserError
from roadwork.models import weights
from roadwork.models.weights import Recipe, create, load

NATIVE, GRID = 160, 4
"""View size that timm builds `test_vit` for, and the patches a side of a view of 64 px."""


def pretrained(name: str = "test_vit", **options: Any) -> nn.Module:
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
