"""Depthwise convolutions whose backward pass is not slow on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _CpuBackward(torch.autograd.Function):
    """conv2d whose gradients are computed in fp32, that of the weight tap by tap where the map is smaller than the kernel.

    oneDNN has no fast kernel for the weight gradient of most depthwise convolutions in bf16, and on AVX2 not in fp32
    either where most taps reach over the border.
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
        grad, wide = grads[0].float(), x.float()
        by_taps = wanted[1] and tuple(dilation) == (1, 1) and grad[0, 0].numel() < weight[0, 0].numel()
        found = torch.ops.aten.convolution_backward(
            grad,
            wide,
            weight.float(),
            ctx.bias_sizes,
            list(stride),
            list(padding),
            list(dilation),
            False,
            [0, 0],
            groups,
            [wanted[0], wanted[1] and not by_taps, wanted[2]],
        )
        if by_taps:
            found = (found[0], _weight_gradient(wide, grad, weight.shape, stride, padding), found[2])
        given = [None if g is None or not w else g.to(x.dtype) for g, w in zip(found, wanted, strict=True)]
        return (*given, None, None, None, None)


def _weight_gradient(
    x: Tensor, grad: Tensor, shape: torch.Size, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor:
    """Of a depthwise convolution, in fp32: per tap the sum of input times gradient where the tap lies inside the map.

    Args:
        x: input [N, C, H, W].
        grad: of the output, [N, C, h, w].
        shape: of the weight, [C, 1, kh, kw].
    """
    inputs, outputs = x.permute(0, 2, 3, 1), grad.permute(0, 2, 3, 1)
    found = x.new_zeros(shape[2], shape[3], shape[0])
    for i in range(shape[2]):
        rows, above = _reach(i, stride[0], padding[0], x.shape[2], grad.shape[2])
        for j in range(shape[3]):
            columns, left = _reach(j, stride[1], padding[1], x.shape[3], grad.shape[3])
            found[i, j] = (inputs[:, rows, columns] * outputs[:, above, left]).sum((0, 1, 2))
    return found.permute(2, 0, 1).unsqueeze(1)


def _reach(tap: int, stride: int, padding: int, size: int, out: int) -> tuple[slice, slice]:
    """Places of the input along one axis that a tap touches, and the outputs that they go to."""
    first = max(0, -((tap - padding) // stride))
    last = min(out, (size - 1 + padding - tap) // stride + 1)
    if last <= first:
        return slice(0, 0), slice(0, 0)
    start = first * stride + tap - padding
    return slice(start, start + (last - first - 1) * stride + 1, stride), slice(first, last)


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with groups = channels; the same parameters, names and results."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        slow = input.dtype in (torch.bfloat16, torch.float32) and input.device.type == "cpu" and torch.is_grad_enabled()
        plain = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if slow and plain and (weight.requires_grad or input.requires_grad) and not torch.compiler.is_compiling():
            out: Tensor = _CpuBackward.apply(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        else:
            out = super()._conv_forward(input, weight, bias)
        return out


def use_fast_depthwise(net: nn.Module) -> int:
    """Turn the plain depthwise convolutions of a net into `DepthwiseConv2d` in place; returns how many."""
    found = [m for m in net.modules() if type(m) is nn.Conv2d and m.groups == m.in_channels > 1]
    for module in found:
        module.__class__ = DepthwiseConv2d
    return len(found)
