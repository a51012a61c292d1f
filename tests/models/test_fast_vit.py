"""The faster ViT is timm's: outputs, gradients, names; adapters and compilation see no difference."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from timm.layers import LayerNorm
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from roadwork.models.backbone import Backbone
from roadwork.models.fast_vit import FastBlock, PatchProjection, RotaryTable, use_fast_vit
from roadwork.models.weights import Recipe

DINOV3: dict[str, Any] = {
    "img_size": 48, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0, "init_values": 0.5,
    "dynamic_img_size": True, "global_pool": "token", "num_reg_tokens": 4, "use_abs_pos_emb": False, "use_fc_norm": False,
    "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True, "norm_layer": partial(LayerNorm, eps=1e-5),
}  # fmt: skip
SWIGLU = {"swiglu_mlp": True, "swiglu_align_to": 8}
FORMS: dict[str, dict[str, Any]] = {
    "swiglu": {"qkv_bias": False, **SWIGLU},
    "swiglu_biased": {"qkv_bias": True, **SWIGLU},
    "swiglu_packed": {"qkv_bias": False, "swiglu_mlp": True},
    "gelu": {"qkv_bias": True},
    "interleaved": {"qkv_bias": True, "rope_rotate_half": False},
    "no_scale_no_registers": {"init_values": None, "num_reg_tokens": 0},
    "normed_hidden": {"scale_mlp": True, "scale_attn_inner": True, **SWIGLU},
    "eva02_rope": {"rope_type": "cat", "rope_rotate_half": False},  # not DINOv3's: timm's own attention answers
}


def pair(form: str = "swiglu", **changes: Any) -> tuple[Eva, Eva]:
    """timm's net, and the same made fast; every parameter random, biases and scales too."""
    torch.manual_seed(0)
    plain = Eva(**{**DINOV3, **FORMS[form], **changes})
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fast = copy.deepcopy(plain)
    use_fast_vit(fast)
    return plain, fast


def answers(net: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = net.forward_features(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    net.zero_grad()
    (out * weight).sum().backward()
    return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_outputs_and_gradients_are_timms(form: str, dtype: torch.dtype, close: float) -> None:
    plain, fast = (net.to(dtype) for net in pair(form))
    assert all(type(block) is FastBlock for block in fast.blocks) and type(fast.patch_embed.proj) is PatchProjection
    assert (type(fast.rope) is RotaryTable) == (form != "eva02_rope")
    assert {k: v.shape for k, v in fast.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    x = torch.randn(2, 3, 48, 32, dtype=dtype)  # not square: rows and columns must not be exchanged
    (expected, wanted), (found, gradients) = answers(plain, x), answers(fast, x)
    torch.testing.assert_close(found, expected, rtol=close, atol=close)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=close, atol=close * float(wanted[name].abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(fast.eval()(x), plain.eval()(x), rtol=close, atol=close)


def test_bf16_is_no_further_from_the_truth_than_timm() -> None:
    plain, fast = pair()
    x = torch.randn(4, 3, 48, 48).bfloat16()
    plain, fast = plain.bfloat16(), fast.bfloat16()
    truth = copy.deepcopy(plain).double().forward_features(x.double())
    errors = [(net.forward_features(x).double() - truth).square().mean().sqrt() for net in (plain, fast)]
    assert errors[1] < 1.1 * errors[0]


def test_a_view_of_another_size_gets_a_table_of_its_own() -> None:
    plain, fast = pair()
    with torch.inference_mode():
        fast(torch.randn(1, 3, 48, 48))
    for size in (48, 64):
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(answers(fast, x)[0], answers(plain, x)[0], rtol=1e-5, atol=1e-5)
    assert fast.rope.get_embed((4, 4)) is fast.rope.get_embed((4, 4))
    assert all(table.dtype == torch.float32 for table in fast.bfloat16().rope.tables.values())


@pytest.mark.parametrize("target", ["attn.qkv", "attn.proj", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2", "patch_embed.proj"])
@pytest.mark.parametrize("form", ["swiglu", "swiglu_biased"])
def test_an_adapter_is_not_passed_by(form: str, target: str) -> None:
    net = pair(form)[1]
    x = torch.randn(2, 3, 48, 48)
    before = net(x)
    names = [name for name, _ in net.named_modules() if name.endswith(target)]
    inject_adapter_in_model(LoraConfig(r=2, target_modules=names, init_lora_weights=False), net)
    assert (net(x) - before).abs().max() > 1e-3
    net(x).sum().backward()
    adapters = [p for name, p in net.named_parameters() if "lora_" in name]
    assert adapters and all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)


@pytest.mark.parametrize("form", ["swiglu", "swiglu_packed", "gelu"])
def test_one_compiled_graph_for_any_number_of_views_has_timms_gradients(form: str) -> None:
    torch._dynamo.reset()
    plain, fast = pair(form)
    fast.blocks[0].compile(fullgraph=True, backend="aot_eager")
    ropes = plain.rope.get_embed((3, 3)), fast.rope.get_embed((3, 3))
    for number, views in enumerate((4, 6, 3)):
        x = torch.randn(views, 14, 32)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found = fast.blocks[0](x, rope=ropes[1])
        expected = plain.blocks[0](x, rope=ropes[0])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = [
            torch.autograd.grad(out.sin().sum(), list(net.blocks[0].parameters()))
            for net, out in ((plain, expected), (fast, found))
        ]
        for wanted, gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_an_exported_graph_answers_for_any_number_of_views() -> None:
    plain, fast = (net.eval() for net in pair())
    x = torch.randn(2, 3, 48, 48)
    graph = torch.export.export(fast, (x,), dynamic_shapes=({0: torch.export.Dim("views")},)).module()
    assert not fast.rope.tables, "a graph's own tensor was kept"
    for views in (2, 3):
        x = torch.randn(views, 3, 48, 48)
        torch.testing.assert_close(graph(x), plain(x), rtol=1e-5, atol=1e-5)


def test_the_backbone_is_made_of_fast_blocks_and_loads_timms_weights() -> None:
    name = "vit_tiny_patch16_dinov3_qkvb"
    backbone = Backbone(Recipe(name, mean=(0.0,) * 3, std=(1.0,) * 3), 64, checkpointing=True)
    assert {type(block) for block in backbone.units()} == {FastBlock} and type(backbone.net.rope) is RotaryTable
    plain = timm.create_model(name, num_classes=0, global_pool="token", img_size=64, dynamic_img_size=True)
    backbone.net.load_state_dict(plain.state_dict())
    views = torch.rand(2, 3, 64, 64)
    vector, _ = backbone(views)
    torch.testing.assert_close(vector, plain.forward_features(views)[:, 0], rtol=1e-5, atol=1e-5)
    vector.sum().backward()
    assert all(p.grad is not None for p in backbone.units()[0].parameters())


def test_blocks_of_another_make_stay_timms() -> None:
    plain, fast = pair(qk_norm=True)
    assert {type(block) for block in fast.blocks} == {EvaBlock} and type(fast.rope) is not RotaryTable
    x = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
