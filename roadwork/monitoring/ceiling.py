"""What a device can reach at most: one large matrix product, the yardstick of 'MFU'."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GPU_SIZE, CPU_SIZE = 8192, 512
"""Side of the square matrices; 8192 would take a CPU minutes."""
BUDGET_S = 0.3
"""Seconds for the timed products of one dtype; one of them is always made."""


class Ceiling(NamedTuple):
    """The fastest product that was seen."""

    operations_per_s: float
    size: int
    """It multiplied [size, size] by [size, size]."""
    dtype: str


def matmul_ceiling(device: torch.device | str) -> Ceiling:
    """Measure one device: bf16; on a CPU the faster of bf16 and fp32, since not every CPU has bf16 instructions.

    Random numbers, because a GPU multiplies zeros faster; torch's own generator is left alone.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    size = GPU_SIZE if on_gpu else CPU_SIZE
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)
    dtypes = [torch.bfloat16] if on_gpu else [torch.bfloat16, torch.float32]
    seconds = {dtype: _fastest(matrix.to(dtype)) for dtype in dtypes}
    dtype = min(seconds, key=seconds.__getitem__)
    return Ceiling(2.0 * size**3 / seconds[dtype], size, str(dtype).removeprefix("torch."))


@torch.no_grad()
def _fastest(matrix: Tensor, repeats: int = 10) -> float:
    """Seconds of the fastest product behind a warm-up."""
    best, until = _product(matrix), time.perf_counter() + BUDGET_S
    for _ in range(repeats):
        best = min(best, _product(matrix))
        if time.perf_counter() > until:
            break
    return best


def _product(matrix: Tensor) -> float:
    _wait(matrix.device)
    began = time.perf_counter()
    F.linear(matrix, matrix)
    _wait(matrix.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
