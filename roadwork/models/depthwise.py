"""Depthwise convolutions whose bf16 backward pass is not slow on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Fp32Backward(torch.autograd.Function):
    """conv2d in bf16 whose gradients are computed in fp32.

    oneDNN has no fast bf16 kernel for the weight gradient of most depthwise convolutions: 672 channels of 8x8, 5x5
    stride 2, 64 views on one core: 369 ms in bf16, 15 ms by way of fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arguments = (stride, padding, dilation, groups)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.arguments
        wanted = list(ctx.needs_input_grad[:3])
        found = torch.ops.aten.convolution_backward(
            grads[0].float(),
            x.float(),
            weight.float(),
            ctx.bias_sizes,
            list(stride),
            list(padding),
            list(dilation),
            False,
            [0, 0],
            groups,
            wanted,
        )
        given = [None if g is None or not w else g.to(x.dtype) for g, w in zip(found, wanted, strict=True)]
        return (*given, None, None, None, None)


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with groups = channels; the same parameters, names and results."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        slow = input.dtype == torch.bfloat16 and input.device.type == "cpu" and torch.is_grad_enabled()
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if slow and plain and (weight.requires_grad or input.requires_grad) and not torch.compiler.is_compiling():
            return _Fp32Backward.apply(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return super()._conv_forward(input, weight, bias)


def use_fast_depthwise(net: nn.Module) -> int:
    """Turn the plain depthwise convolutions of a net into `DepthwiseConv2d` in place; returns how many."""
    found = [m for m in net.modules() if type(m) is nn.Conv2d and m.groups == m.in_channels > 1]
    for module in found:
        module.__class__ = DepthwiseConv2d
    return len(found)
