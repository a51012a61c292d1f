"""Parts of a convolutional net as a CPU computes them fastest: in its dtype of choice, frozen batch norms folded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights

from roadwork.cpu_bf16 import lacks_bf16_instructions
from roadwork.models.depthwise import DepthwiseConv2d
from roadwork.models.fixed_norm import FixedStatistics, FixedStatisticsAct


def compute_dtype(parameter: Tensor, device: torch.device) -> torch.dtype | None:
    """In what a net with such parameters, of any shape, is computed by `CpuUnits`; None: on this device its own modules
    compute it.

    In the dtype of its parameters, or autocast's. bf16 is computed in fp32 where the CPU has no bf16 instructions: there
    every product widens its operands, and keeping the activations wide saves the way forth and back.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else parameter.dtype
    return torch.float32 if dtype == torch.bfloat16 and lacks_bf16_instructions() else dtype


class CpuUnits:
    """Computes parts of a net; frozen parts come from a copy made once, with batch norms folded into convolutions.

    A copy is made again when a tensor of its original was replaced or written to (as autograd's version counter sees it;
    writes through `.data` go unseen, and nothing here writes frozen weights that way).
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[object, ...], tuple[tuple[tuple[int, int], ...], nn.Module]] = {}

    def __call__(self, modules: Sequence[nn.Module], x: Tensor, dtype: torch.dtype) -> Tensor:
        """The modules one after the other, in eval mode where frozen: [N, C, H, W] of `dtype` -> the same dtype."""
        if any(p.requires_grad for module in modules for p in module.parameters()):
            for module in modules:
                x = module(x) if _is_of(module, dtype) else functional_call(module, _cast(module, dtype), (x,))
            return x
        out: Tensor = self._frozen(modules, dtype)(x)
        return out

    def _frozen(self, modules: Sequence[nn.Module], dtype: torch.dtype) -> nn.Module:
        key = (dtype, *map(id, modules))
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        known = self._copies.get(key)
        if known is None or known[0] != state:
            known = self._copies[key] = (state, folded(modules, dtype))
        return known[1]

    def __deepcopy__(self, memo: dict[int, object]) -> CpuUnits:
        return CpuUnits()  # copies belong to the modules that they were made of


class ActivatedConvolution(nn.Conv2d):
    """A convolution that activates its result before it is written: one pass over memory (oneDNN's post-op).

    A clamp before rounding and one after it give the same number, hence no other activation than those of `POST_OPS`; what
    is left to differ is the order of a sum, where oneDNN takes another kernel.
    """

    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C', H', W'] of the same dtype."""
        if x.requires_grad and torch.is_grad_enabled():  # the fused operation has no derivative
            activated: Tensor = self.act(super().forward(x))
            return activated
        done: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x,
            self.weight,
            self.bias,
            self.padding,
            self.stride,
            self.dilation,
            self.groups,
            *POST_OPS[type(self.act)],
            "",
        )
        return done


POST_OPS: dict[type[nn.Module], tuple[str, list[float]]] = {nn.ReLU: ("relu", []), nn.ReLU6: ("hardtanh", [0.0, 6.0])}
"""Activation -> its name in oneDNN and its scalars."""


def _takes_post_op(convolution: nn.Conv2d) -> bool:
    plain = type(convolution) in (nn.Conv2d, DepthwiseConv2d) and convolution.padding_mode == "zeros"
    return plain and not isinstance(convolution.padding, str) and torch.backends.mkldnn.is_available()


def _is_of(module: nn.Module, dtype: torch.dtype) -> bool:
    return all(parameter.dtype == dtype for parameter in module.parameters())


def _cast(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: parameter.to(dtype) for name, parameter in module.named_parameters()}


def folded(modules: Sequence[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy of the modules in a row, in eval mode, whose fixed batch norms are part of the convolutions before them.

    The product of weight and scale is made in fp32 and rounded to `dtype` once; in return a sum is rounded once where a
    norm of its own rounds a second time.
    """
    with torch.inference_mode(False), torch.no_grad():
        net = copy.deepcopy(nn.Sequential(*modules)).float().eval().requires_grad_(False)
        for convolution, norm in list(_pairs(net)):
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
            convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
            convolution.bias, norm.folded = bias.requires_grad_(False), True
            if _takes_post_op(convolution) and isinstance(norm, FixedStatisticsAct) and type(norm.act) in POST_OPS:
                convolution.__class__, convolution.act, norm.act = ActivatedConvolution, norm.act, nn.Identity()
        for parameter in net.parameters():  # not the buffers: a norm that stays computes with statistics in fp32
            parameter.data = parameter.data.to(dtype)
    return net


def _pairs(net: nn.Module) -> Iterator[tuple[nn.Conv2d, FixedStatistics]]:
    """Convolutions whose result goes straight into a batch norm: in timm's nets the one that stands right behind.

    A pre-activation net would have it the other way round, but none is among the supported families.
    """
    before: nn.Module | None = None
    for module in net.modules():
        if isinstance(module, FixedStatistics) and isinstance(before, nn.Conv2d):
            yield before, module
        if not any(True for _ in module.children()):
            before = module
