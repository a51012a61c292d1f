"""bf16 products by way of fp32, on CPUs that have no bf16 instructions.

There torch computes bf16 matrix products and convolutions with scalar code, far slower than fp32. Here the
operands are widened to fp32, in which every bf16 number
is exact, and the result is rounded to bf16 once: what the hardware's own instructions compute, up to the order of the sum.
Weights, activations and gradients stay bf16, so engine, memory and rounding are those of every other machine.
"""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
from torch.library import Library, get_kernel

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "convolution", "convolution_backward")
ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"


def lacks_bf16_instructions() -> bool:
    """Whether torch computes bf16 products with scalar code here: x86 below AVX-512, on which oneDNN's kernels begin."""
    return platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


@cache
def widen_products() -> bool:
    """Replace torch's CPU kernels of the products for bf16 operands in this process; other dtypes keep theirs.

    Called once per process, before the model is built. Returns whether it had to. Compiled blocks call other kernels and
    are not changed.
    """
    if not lacks_bf16_instructions():
        return False
    _LIBRARY.append(Library("aten", "IMPL"))
    for name in PRODUCTS:
        _widen(name, outputs=3)
    _widen(ATTENTION, outputs=1)  # the second output, the log-sum-exp, is fp32 in any case
    _widen(f"{ATTENTION}_backward", outputs=3)
    return True


_LIBRARY: list[Library] = []
"""Kernels live as long as the library object."""


def _widen(name: str, outputs: int) -> None:
    """Widen the bf16 tensors among the arguments, and round the first `outputs` results back."""
    kernel = get_kernel(f"aten::{name}", "CPU")

    def product(keys: Any, *arguments: Any, **options: Any) -> Any:
        if not any(_is_bf16(a) for a in arguments):
            return kernel.call_boxed(keys, *arguments, **options)
        wide = [a.float() if _is_bf16(a) else a for a in arguments]
        named = {k: v.float() if _is_bf16(v) else v for k, v in options.items()}  # an attention mask
        result = kernel.call_boxed(keys, *wide, **named)
        if isinstance(result, torch.Tensor):
            return result.bfloat16()
        return tuple(r if r is None or i >= outputs else r.bfloat16() for i, r in enumerate(result))

    _LIBRARY[0].impl(name, product, "CPU", with_keyset=True)


def _is_bf16(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
