"""Layer, pyramid, fusion, metadata and heads against other libraries, or written down again, with the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer

from benchmarks.references import qwen3_moe, qwen3_next_attention
from roadwork.config import ModelConfig
from roadwork.models import RoadworkDetector
from roadwork.models.fusion import GatedFusion, Pyramid
from roadwork.models.layer import Layer
from roadwork.models.metadata import METADATA_DIM, MetadataEncoder, gps_features
from roadwork.models.segmentation import SegmentationDecoder

HIDDEN, HEADS, KV, DIM, EXPERT, BATCH, VIEWS = 32, 4, 2, 8, 24, 3, 7
MASK = torch.arange(VIEWS)[None] < torch.tensor([7, 4, 1])[:, None]
FIELDS = ["gps", "weather", "daytime", "scene", "text"]


def drawn(module: nn.Module, std: float = 0.3) -> Any:
    """The module with weights wide enough that a wrong one shows."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, VIEWS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def check_against_formula(
    module: nn.Module, x: Tensor, own: Callable[[Tensor], Tensor], formula: Callable[[Tensor], Tensor], tight: float
) -> None:
    """Value and gradients of the input and of every parameter."""
    found = []
    for compute in (own, formula):
        given = x.clone().requires_grad_()
        y = compute(given)
        seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
        named = dict(module.named_parameters())
        grads = torch.autograd.grad((y * seed).sum(), [given, *named.values()])
        found.append({"value": y.detach(), **dict(zip(["input", *named], grads, strict=True))})
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, atol=tight, rtol=tight, msg=lambda m, n=name: f"{n}: {m}")


def test_layer_equals_qwen3_nexts_decoder_layer() -> None:
    """Norm before, residual around; its attention, and Qwen3-MoE's experts (Qwen3-Next's have a shared one besides)."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KV, head_dim=DIM, num_hidden_layers=1,
        layer_types=["full_attention"], num_experts=0, intermediate_size=EXPERT, rms_norm_eps=1e-6,
    )  # fmt: skip
    reference: Any = drawn(Qwen3NextDecoderLayer(config, 0))
    own = Layer(ModelConfig(hidden_dim=HIDDEN, num_heads=HEADS, num_kv_heads=KV, expert_dim=EXPERT, num_experts=4,
                            top_k=2, dropout=0.0))  # fmt: skip
    reference.self_attn, own.attention = qwen3_next_attention(HIDDEN, HEADS, KV)
    reference.mlp, own.moe = qwen3_moe(HIDDEN, EXPERT, 4, 2)
    with torch.no_grad():
        own.attention_norm.weight.copy_(1 + reference.input_layernorm.weight)
        own.moe_norm.weight.copy_(1 + reference.post_attention_layernorm.weight)
    theirs, ours = tokens(torch.float32).requires_grad_(), tokens(torch.float32).requires_grad_()
    still = torch.ones(BATCH, VIEWS, DIM), torch.zeros(BATCH, VIEWS, DIM)  # no rotation
    hidden = torch.zeros(BATCH, 1, VIEWS, VIEWS).masked_fill(~MASK[:, None, None, :], torch.finfo(torch.float32).min)
    expected = reference(theirs, still, hidden)
    actual, _ = own(ours, MASK)
    torch.testing.assert_close(actual[MASK], expected[MASK], atol=2e-5, rtol=1e-5)
    seed = torch.randn_like(expected) * MASK[..., None]
    (expected * seed).sum().backward()
    (actual * seed).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    attention, experts = reference.self_attn, reference.mlp.experts
    query = attention.q_proj.weight.grad.view(HEADS, 2 * DIM, HIDDEN)[:, :DIM].reshape(-1, HIDDEN)
    pairs = {
        "attention norm": (own.attention_norm.weight, reference.input_layernorm.weight.grad),
        "experts norm": (own.moe_norm.weight, reference.post_attention_layernorm.weight.grad),
        "qkv": (own.attention.qkv_proj.weight,
                torch.cat([query, attention.k_proj.weight.grad, attention.v_proj.weight.grad])),
        "k norm": (own.attention.k_norm.weight, attention.k_norm.weight.grad),
        "out": (own.attention.out_proj.weight, attention.o_proj.weight.grad),
        "experts": (own.moe.gate_up_proj, experts.gate_up_proj.grad),
    }  # fmt: skip
    for name, (parameter, gradient) in pairs.items():
        torch.testing.assert_close(parameter.grad, gradient, atol=2e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_pyramid_is_three_widths_and_a_residual() -> None:
    pyramid = drawn(Pyramid(HIDDEN)).double()

    def formula(x: Tensor) -> Tensor:
        y = rms(x, pyramid.norm.weight)
        parts = [F.gelu(y @ s[0].weight.T + s[0].bias) for s in pyramid.scales]
        assert [p.shape[-1] for p in parts] == [HIDDEN, HIDDEN // 2, HIDDEN // 4]
        return x + torch.cat(parts, -1) @ pyramid.merge.weight.T + pyramid.merge.bias

    check_against_formula(pyramid, tokens(), pyramid, formula, 1e-10)


def test_fusion_with_even_gates_is_torchs_attention_from_the_seed() -> None:
    """nn.MultiheadAttention whose query is the seed (its projection the identity); all gates alike cancel out."""
    fusion = drawn(GatedFusion(HIDDEN, HEADS, eps=0.0))
    with torch.no_grad():
        for parameter in fusion.importance_net[-1].parameters():
            parameter.zero_()
    reference = nn.MultiheadAttention(HIDDEN, HEADS, bias=False, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([torch.eye(HIDDEN), fusion.k_proj.weight, fusion.v_proj.weight]))
        reference.out_proj.weight.copy_(fusion.out_proj.weight)
    ours, theirs = tokens(torch.float32).requires_grad_(), tokens(torch.float32).requires_grad_()
    y = fusion.norm(theirs)
    seed = fusion.seed.detach().clone().requires_grad_()
    query = seed.reshape(1, 1, HIDDEN).expand(BATCH, 1, HIDDEN)
    pooled, expected_weights = reference(query, y, y, key_padding_mask=~MASK)
    plain = (expected_weights[:, 0, :, None] * y).sum(1)
    expected = fusion.out_norm(plain + pooled[:, 0])
    actual, weights = fusion(ours, MASK)
    torch.testing.assert_close(weights, expected_weights[:, 0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(expected)
    (actual * upstream).sum().backward()
    (expected * upstream).sum().backward()
    assert fusion.seed.grad is not None and ours.grad is not None
    torch.testing.assert_close(ours.grad[MASK], theirs.grad[MASK], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fusion.seed.grad, seed.grad, atol=1e-5, rtol=1e-4)


def test_fusion_with_gates_is_its_formula() -> None:
    """out_h = sum_i a_hi g_i v_hi / (sum_i a_hi g_i + eps), head by head; the softmax is in fp32."""
    fusion = drawn(GatedFusion(HIDDEN, HEADS)).double()
    width = HIDDEN // HEADS

    def formula(x: Tensor) -> Tensor:
        y = rms(x, fusion.norm.weight)
        first, _, last = fusion.importance_net
        inner = F.gelu(y @ first.weight.T + first.bias)
        gate = 1 / (1 + torch.exp(-(inner @ last.weight.T + last.bias)[..., 0]))
        heads, shares = [], []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            logits = (y @ fusion.k_proj.weight[part].T) @ fusion.seed[head] / math.sqrt(width)
            share = torch.exp(logits) * MASK
            weight = share / share.sum(1, keepdim=True) * gate
            weight = weight / (weight.sum(1, keepdim=True) + fusion.eps)
            shares.append(weight)
            heads.append((weight[..., None] * (y @ fusion.v_proj.weight[part].T)).sum(1))
        plain = (torch.stack(shares).mean(0)[..., None] * y).sum(1)
        return rms(plain + torch.cat(heads, -1) @ fusion.out_proj.weight.T, fusion.out_norm.weight)

    check_against_formula(fusion, tokens(), lambda x: fusion(x, MASK)[0], formula, 3e-5)


def test_fusion_with_all_gates_shut_is_finite() -> None:
    """sigmoid(-300) is 0 in fp32: without eps the weights would be 0 / 0."""
    fusion = drawn(GatedFusion(HIDDEN, HEADS))
    with torch.no_grad():
        fusion.importance_net[-1].bias.fill_(-300.0)
    x = tokens(torch.float32).requires_grad_()
    fused, weights = fusion(x, MASK)
    assert torch.equal(weights, torch.zeros_like(weights)) and bool(torch.isfinite(fused).all())
    fused.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all())


def group_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    grouped = x.reshape(len(x), norm.num_groups, -1)
    mean, spread = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
    even = ((grouped - mean) / (spread + norm.eps).sqrt()).reshape(x.shape)
    return even * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_segmentation_decoder_is_its_formula() -> None:
    decoder = drawn(SegmentationDecoder(12, 16)).double()

    def enlarge(x: Tensor) -> Tensor:
        """Four times, bilinear with pixel centres: one matrix for each axis."""
        place = ((torch.arange(16) + 0.5) / 4 - 0.5).clamp(0, 3)
        rows = (1 - (place[:, None] - torch.arange(4)[None]).abs()).clamp_min(0).double()
        return rows @ x @ rows.T

    def formula(x: Tensor) -> Tensor:
        first, norm, _, second, other, _, third = decoder.mix
        y = torch.einsum("nchw,oc->nohw", x, first.weight[:, :, 0, 0])
        y = F.gelu(group_norm(y, norm))
        patches = F.unfold(y, 3, padding=1)
        y = F.gelu(group_norm((second.weight.flatten(1) @ patches).unflatten(2, (4, 4)), other))
        y = torch.einsum("nchw,oc->nohw", y, third.weight[:, :, 0, 0]) + third.bias[:, None, None]
        y = enlarge(y)
        depthwise = decoder.sharpen[0]
        near = F.unfold(y, 3, padding=1).unflatten(1, (y.shape[1], 9))
        sharp = (near * depthwise.weight.flatten(1)[None, :, :, None]).sum(2).unflatten(2, (16, 16))
        y = y + F.gelu(sharp + depthwise.bias[:, None, None])
        return torch.einsum("nchw,oc->nohw", y, decoder.out.weight[:, :, 0, 0]) + decoder.out.bias[:, None, None]

    patches = torch.randn(2, 12, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    check_against_formula(decoder, patches, decoder, formula, 1e-9)


def test_gps_features_are_sines_of_the_place_on_the_unit_sphere() -> None:
    degrees = np.array([[52.5, 13.4], [-33.9, 151.2], [90.0, 0.0], [0.0, -180.0]])
    lat, lon = np.radians(degrees).T
    sphere = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    assert np.allclose((sphere**2).sum(1), 1)
    angles = np.concatenate([[axis * np.pi * 2.0**power for power in range(16)] for axis in sphere.T])
    expected = np.concatenate([sphere, np.sin(angles).T, np.cos(angles).T], 1)
    found = gps_features(torch.from_numpy(degrees))
    assert found.shape == (4, 3 + 6 * 16) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=0)


def test_metadata_encoder_is_lookups_and_products_with_nulls_where_a_value_is_missing() -> None:
    encoder = drawn(MetadataEncoder(FIELDS, 0.0)).double()
    text = torch.randn(3, 384, generator=torch.Generator().manual_seed(1))
    text[1] = 0.0
    metadata = {
        "gps": torch.tensor([[52.5, 13.4], [float("nan"), 0.0], [-33.9, 151.2]]), "weather": torch.tensor([7, -1, 0]),
        "daytime": torch.tensor([-1, 5, 0]), "scene": torch.tensor([6, 0, -1]), "text": text,
    }  # fmt: skip

    def formula(x: Tensor) -> Tensor:
        gps, words = encoder.encoders["gps"], encoder.encoders["text"]
        places = gps_features(metadata["gps"].nan_to_num()).double() @ gps.weight.T + gps.bias
        written = x @ words.weight.T + words.bias
        known = {"gps": places, "text": written}
        known |= {name: encoder.encoders[name].weight[metadata[name]] for name in ("weather", "daytime", "scene")}
        missing = {"gps": [1], "weather": [1], "daytime": [0], "scene": [2], "text": [1]}
        rows = [torch.cat([encoder.null[f] if i in missing[f] else known[f][i] for f in FIELDS]) for i in range(3)]
        return torch.stack(rows)

    assert METADATA_DIM == 128 + 3 * 64 + 384
    check_against_formula(encoder, text.double(), lambda x: encoder({**metadata, "text": x}, 3), formula, 1e-6)


@pytest.mark.parametrize("field", FIELDS)
def test_every_null_learns_from_photos_that_lack_the_field(field: str) -> None:
    encoder = drawn(MetadataEncoder(FIELDS, 0.0)).train()
    known = {
        "gps": torch.rand(2, 2), "weather": torch.tensor([1, 2]), "daytime": torch.tensor([1, 2]),
        "scene": torch.tensor([1, 2]), "text": torch.rand(2, 384),
    }  # fmt: skip
    encoder({name: value for name, value in known.items() if name != field}, 2).square().sum().backward()
    for name, null in encoder.null.items():
        assert null.grad is not None and bool((null.grad != 0).all()) == (name == field), name


@pytest.mark.parametrize("absent", [*FIELDS, "all"])
def test_an_absent_field_gives_its_parameters_a_zero_not_none(absent: str) -> None:
    """Every process reduces the same tensors, whatever its photos lack."""
    encoder = drawn(MetadataEncoder(FIELDS, 0.0)).train()
    known = {
        "gps": torch.rand(2, 2), "weather": torch.tensor([1, 2]), "daytime": torch.tensor([1, 2]),
        "scene": torch.tensor([1, 2]), "text": torch.rand(2, 384),
    }  # fmt: skip
    given = None if absent == "all" else {name: value for name, value in known.items() if name != absent}
    encoder(given, 2).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        field = name.split(".")[1]
        assert parameter.grad is not None, name
        if name.startswith("encoders"):
            assert bool((parameter.grad == 0).all()) == (absent in (field, "all")), name


def test_nulls_of_all_fields_learn_through_the_detector(build: Callable[..., RoadworkDetector]) -> None:
    model = build(metadata_fields=FIELDS, metadata_dropout=0.0).train()
    model(torch.rand(2, 2, 3, 64, 64)).logits[:, 1].sum().backward()
    for name, null in model.metadata_encoder.null.items():
        assert null.grad is not None and null.grad.abs().sum() > 0, name


def test_weather_head_is_a_product_with_the_fused_features(build: Callable[..., RoadworkDetector]) -> None:
    model = build().eval()
    outputs = model(torch.rand(2, 2, 3, 64, 64))
    expected = outputs.features.double() @ model.weather_head.weight.double().T + model.weather_head.bias.double()
    assert expected.shape == (2, 8)
    torch.testing.assert_close(outputs.weather_logits.double(), expected, atol=1e-6, rtol=1e-5)
    seed = torch.randn_like(outputs.weather_logits)
    (outputs.weather_logits * seed).sum().backward()
    torch.testing.assert_close(model.weather_head.weight.grad, seed.T @ outputs.features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.weather_head.bias.grad, seed.sum(0))
