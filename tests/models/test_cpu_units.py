"""Parts of a convolutional net with folded norms: what the parts themselves compute, also after they changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from roadwork.models.backbone import Backbone
from roadwork.models.cpu_units import ActivatedConvolution, CpuUnits, folded
from roadwork.models.fixed_norm import FixedStatistics
from roadwork.models.weights import Recipe

FAMILIES = ["test_efficientnet", "mobilenetv3_small_050", "resnet10t", "regnetx_002", "test_convnext"]


def net(name: str, trainable: str = "frozen") -> Backbone:
    """A random net whose batch norms have statistics and scales that matter."""
    torch.manual_seed(0)
    backbone = Backbone(Recipe(name), 64, trainable)
    for module in backbone.modules():
        if isinstance(module, FixedStatistics):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return backbone.train()


def plainly(backbone: Backbone, views: Tensor) -> tuple[Tensor, Tensor | None]:
    """The vectors and the map with timm's modules as they are."""
    backbone.compiled = True  # compiled parts are left alone
    try:
        return backbone(views)
    finally:
        backbone.compiled = False


@pytest.mark.parametrize("name", FAMILIES)
def test_frozen_parts_give_what_their_modules_give(name: str) -> None:
    backbone, views = net(name), torch.rand(3, 3, 64, 64)
    for found, expected in zip(backbone(views), plainly(backbone, views), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_a_folded_norm_rounds_no_more_than_one_of_its_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean error against fp32 with the same weights; a scale or a shift that is left out would be many times that."""
    monkeypatch.setattr("roadwork.models.cpu_units.lacks_bf16_instructions", lambda: False)
    backbone, views = net(name).bfloat16(), torch.rand(3, 3, 64, 64)
    exact = plainly(copy.deepcopy(backbone).float(), views)[0]
    errors = [
        float((found.float() - exact).abs().mean()) for found in (backbone(views)[0], plainly(backbone, views)[0])
    ]
    assert backbone(views)[0].dtype == torch.bfloat16
    assert errors[0] <= 1.5 * errors[1] and errors[0] < 0.05 * float(exact.abs().mean())


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050", "resnet10t", "regnetx_002"])
def test_every_batch_norm_is_folded(name: str) -> None:
    copied = [folded(backbone._stem()) for backbone in [net(name)]] + [folded([unit]) for unit in net(name).units()]
    norms = [m for part in copied for m in part.modules() if isinstance(m, FixedStatistics)]
    assert norms and all(norm.folded for norm in norms)


def test_a_frozen_weight_that_changes_is_seen() -> None:
    backbone, views = net("test_efficientnet"), torch.rand(2, 3, 64, 64)
    before = backbone(views)[0]
    other = copy.deepcopy(backbone).state_dict()
    backbone.load_state_dict({name: value * 0.9 for name, value in other.items()})
    after = backbone(views)[0]
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plainly(backbone, views)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trainable", ["last-1", "full"])
def test_trained_parts_get_the_gradients_of_their_modules(trainable: str) -> None:
    backbone, views = net("test_efficientnet", trainable), torch.rand(2, 3, 64, 64)
    found, expected = [], []
    for gradients, run in ((found, backbone), (expected, lambda v: plainly(backbone, v))):
        backbone.zero_grad()
        sum(out.square().mean() for out in run(views)).backward()
        gradients += [p.grad.clone() for p in backbone.parameters() if p.grad is not None]
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["test_efficientnet", "efficientnet_lite0", "regnetx_002"])
def test_a_convolution_that_activates_gives_what_the_two_give_apart(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, x = net(name), torch.rand(2, 3, 64, 64).to(dtype).contiguous(memory_format=torch.channels_last)
    parts = [backbone._stem(), *([unit] for unit in backbone.units())]
    fused = [folded(part, dtype) for part in parts]
    monkeypatch.setattr("roadwork.models.cpu_units.POST_OPS", {})
    apart = [folded(part, dtype) for part in parts]
    swapped = [
        sum(isinstance(m, ActivatedConvolution) for part in parts for m in part.modules()) for parts in (fused, apart)
    ]
    assert swapped[1] == 0 < swapped[0] or name == "test_efficientnet"  # that one has SiLU
    monkeypatch.undo()
    with torch.no_grad():
        for one, other in zip(fused, apart, strict=True):
            y = other(x)
            rounding = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
            torch.testing.assert_close(one(x), y, rtol=rounding, atol=rounding * float(y.abs().max()))
            x = y


def test_a_gradient_passes_through_a_convolution_that_activates() -> None:
    """Frozen parts behind adapted ones."""
    backbone = net("efficientnet_lite0")
    part, x = folded(backbone._stem()), torch.rand(1, 3, 64, 64, requires_grad=True)
    part(x).sum().backward()
    assert x.grad is not None and float(x.grad.abs().max()) > 0


def test_under_autocast_the_net_computes_in_its_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadwork.models.cpu_units.lacks_bf16_instructions", lambda: False)
    backbone, views = net("efficientnet_lite0", "last-1"), torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        begun = backbone.begin(views)
        state = backbone.run(begun, 0, backbone.depth)
        assert begun.x.dtype == state.x.dtype == torch.bfloat16, "autocast does not know the fused operation"
        sum(out.float().sum() for out in backbone.finish(state) if out is not None).backward()
    found = [p.grad.dtype for p in backbone.parameters() if p.grad is not None]
    assert found and set(found) == {torch.float32}


def test_copies_are_no_part_of_the_model() -> None:
    backbone = net("test_efficientnet")
    names = set(backbone.state_dict())
    backbone(torch.rand(1, 3, 64, 64))
    assert set(backbone.state_dict()) == names
    assert not any(isinstance(module, CpuUnits) for module in backbone.modules())


def test_bf16_weights_on_an_old_cpu_compute_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, views = net("test_efficientnet", "last-1").bfloat16(), torch.rand(2, 3, 64, 64)
    for old in (True, False):
        monkeypatch.setattr("roadwork.models.cpu_units.lacks_bf16_instructions", lambda old=old: old)
        state = backbone.run(backbone.begin(views), 0, backbone.depth)
        assert state.x.dtype == (torch.float32 if old else torch.bfloat16)
        vectors, patches = backbone.finish(state)
        assert vectors.dtype == backbone.vectors(state).dtype == torch.bfloat16
        assert patches is None or patches.dtype == torch.bfloat16
