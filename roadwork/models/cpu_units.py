"""Parts of a convolutional net the way a CPU computes them fastest: in fp32, with the batch norms of frozen parts folded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights

from roadwork.cpu_bf16 import lacks_bf16_instructions
from roadwork.models.fixed_norm import FixedStatistics


def computes_in_fp32(parameter: Tensor, device: torch.device) -> bool:
    """Whether a net with such parameters is computed in fp32 on this device.

    So it is on a CPU in fp32 anyhow, and in bf16 where the CPU has no bf16 instructions: there every product widens its
    operands, and keeping the activations wide saves the way forth and back.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return parameter.dtype == torch.float32 or (parameter.dtype == torch.bfloat16 and lacks_bf16_instructions())


class CpuUnits:
    """Computes parts of a net in fp32; frozen parts come from a copy made once, with batch norms folded into convolutions.

    A copy is made again when a tensor of its original was replaced or written to (as autograd's version counter sees it;
    writes through `.data` go unseen, and nothing here writes frozen weights that way).
    """

    def __init__(self) -> None:
        self._copies: dict[tuple[int, ...], tuple[tuple[tuple[int, int], ...], nn.Module]] = {}

    def __call__(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        """The modules one after the other, in eval mode where frozen: fp32 [N, C, H, W] -> fp32."""
        if any(p.requires_grad for module in modules for p in module.parameters()):
            for module in modules:
                x = functional_call(module, {n: p.float() for n, p in module.named_parameters()}, (x,))
            return x
        out: Tensor = self._frozen(modules)(x)
        return out

    def _frozen(self, modules: Sequence[nn.Module]) -> nn.Module:
        key = tuple(map(id, modules))
        tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
        state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        known = self._copies.get(key)
        if known is None or known[0] != state:
            known = self._copies[key] = (state, folded(modules))
        return known[1]

    def __deepcopy__(self, memo: dict[int, object]) -> CpuUnits:
        return CpuUnits()  # copies belong to the modules that they were made of


def folded(modules: Sequence[nn.Module]) -> nn.Module:
    """An fp32 copy of the modules in a row, in eval mode, whose fixed batch norms are part of the convolutions before them."""
    with torch.inference_mode(False), torch.no_grad():
        net = copy.deepcopy(nn.Sequential(*modules)).float().eval().requires_grad_(False)
        for convolution, norm in list(_pairs(net)):
            statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            weight, bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
            convolution.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
            convolution.bias, norm.folded = bias.requires_grad_(False), True
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
