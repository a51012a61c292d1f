"""Blocks against well-known implementations with copied weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from benchmarks.references import qwen3_moe, qwen3_next_attention
from roadwork.models.moe import balance_loss
from roadwork.models.norm import RMSNorm

HIDDEN, HEADS, KV, DIM = 32, 4, 2, 8


@pytest.mark.parametrize("masked", [False, True])
def test_gated_attention_equals_qwen3_next(masked: bool) -> None:
    torch.manual_seed(0)
    reference, own = qwen3_next_attention(HIDDEN, HEADS, KV)
    x = torch.randn(3, 7, HIDDEN)
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None] if masked else torch.ones(3, 7, dtype=torch.bool)
    cos, sin = torch.ones(3, 7, DIM), torch.zeros(3, 7, DIM)  # no rotation
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    bias = torch.zeros(3, 1, 7, 7).masked_fill(~mask[:, None, None, :], torch.finfo(torch.float32).min)
    expected = reference(theirs, (cos, sin), bias)[0]
    actual = own(ours, mask if masked else None)
    torch.testing.assert_close(actual[mask], expected[mask], atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(x) * mask[..., None]
    (expected * seed).sum().backward()
    (actual * seed).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.out_proj.weight.grad, reference.o_proj.weight.grad, atol=1e-4, rtol=1e-5)
    gate = reference.q_proj.weight.grad.view(HEADS, 2 * DIM, HIDDEN)[:, DIM:].reshape(-1, HIDDEN)
    torch.testing.assert_close(own.gate_proj.weight.grad, gate, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(own.q_norm.weight.grad, reference.q_norm.weight.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float32), (20, torch.float32), (24, torch.float64)])
def test_moe_equals_qwen3_moe(width: int, dtype: torch.dtype) -> None:
    """24: experts on their own tokens. 20 is no multiple of 8, and torch groups no float64: every expert on every token,
    as on a GPU."""
    torch.manual_seed(0)
    reference, own = (module.to(dtype) for module in qwen3_moe(HIDDEN, width, 4, 2))
    x = torch.randn(3, 7, HIDDEN, dtype=dtype)
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, (actual, _) = reference(theirs), own(ours)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(x)
    (expected * seed).sum().backward()
    (actual * seed).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.router.weight.grad, reference.gate.weight.grad, atol=1e-4, rtol=1e-5)
    for name in ("gate_up_proj", "down_proj"):
        expected_grad = getattr(reference.experts, name).grad
        torch.testing.assert_close(getattr(own, name).grad, expected_grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("width", [24, 20])
def test_no_tokens_are_mixed_to_none(width: int) -> None:
    y, stats = qwen3_moe(HIDDEN, width, 4, 2)[1](torch.zeros(0, 3, HIDDEN))
    assert y.shape == (0, 3, HIDDEN) and torch.equal(stats, torch.zeros(9))


@pytest.mark.parametrize("by", ["parameters", "autocast"])
def test_the_router_is_exact_in_bf16(by: str) -> None:
    """4 and 4 + 2^-9 are one number in bf16: three experts would be alike, and the same two of them win for every token."""
    dtype = torch.bfloat16 if by == "parameters" else torch.float32
    own = qwen3_moe(HIDDEN, 24, 4, 2)[1].to(dtype)
    x = torch.zeros(1, 3, HIDDEN, dtype=dtype)
    x[..., 0] = 1
    with torch.no_grad():
        own.router.weight.zero_()
        own.router.weight[:, 0] = torch.tensor([4.0, 4.0, 4.0, -8.0])
        for token, winners in enumerate(([0, 1], [0, 2], [1, 2])):
            x[0, token, token + 1] = 1
            own.router.weight[winners, token + 1] = 2**-9
    with torch.autocast("cpu", torch.bfloat16, enabled=by == "autocast"):
        assert own(x)[1][:4].tolist() == [2.0, 2.0, 2.0, 0.0]


def test_balance_equals_transformers_with_padding() -> None:
    torch.manual_seed(0)
    reference, own = qwen3_moe(HIDDEN, 24, 4, 2)
    x = torch.randn(3, 7, HIDDEN)
    mask = torch.arange(7)[None] < torch.tensor([7, 4, 1])[:, None]
    logits = reference.gate(x)[0]
    expected = load_balancing_loss_func((logits,), 4, 2, mask)
    _, stats = own(x, mask)
    actual, load = balance_loss(stats[None], 4, everywhere=True)
    torch.testing.assert_close(actual, expected)
    expected.backward()
    actual.backward()
    torch.testing.assert_close(own.router.weight.grad, reference.gate.weight.grad)
    torch.testing.assert_close(load.sum(-1), torch.ones(1))


def test_balance_of_several_layers_is_the_mean_of_each_ones() -> None:
    """Switch's form. transformers averages shares and probabilities over the layers first, which lets one layer's favourite
    make up for another's."""
    torch.manual_seed(0)
    layers = [qwen3_moe(HIDDEN, 24, 4, 2) for _ in range(3)]
    x = torch.randn(3, 7, HIDDEN)
    logits = [reference.gate(x)[0] for reference, _ in layers]
    each = [load_balancing_loss_func((one,), 4, 2) for one in logits]
    actual = balance_loss(torch.stack([own(x)[1] for _, own in layers]), 4, everywhere=False)[0].detach()
    torch.testing.assert_close(actual, torch.stack(each).mean().detach())
    assert (actual - load_balancing_loss_func(tuple(logits), 4, 2).detach()).abs() > 1e-3


def test_even_routing_gives_top_k() -> None:
    stats = torch.tensor([[6.0, 6.0, 6.0, 6.0, 3.0, 3.0, 3.0, 3.0, 12.0]])
    assert balance_loss(stats, 4, everywhere=False)[0] == pytest.approx(2.0)


def test_rms_norm_equals_torch_and_keeps_bf16_precision() -> None:
    torch.manual_seed(0)
    own, reference = RMSNorm(16), nn.RMSNorm(16, eps=1e-6)
    nn.init.normal_(own.weight)
    reference.load_state_dict(own.state_dict())
    x = torch.randn(5, 16, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(own(x), reference(y))
    own(x).square().sum().backward()
    reference(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    low = own.bfloat16()(x.detach().bfloat16())
    assert low.dtype == torch.bfloat16
    exact = reference.bfloat16().double()(x.detach().bfloat16().double())
    torch.testing.assert_close(low.double(), exact, atol=0, rtol=2**-8)  # one rounding, at the end
