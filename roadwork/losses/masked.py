"""Sums over valid elements only, divided by a count that may come from a whole optimizer step."""

from __future__ import annotations

import torch
from torch import Tensor

Number = float | Tensor


def upcast(x: Tensor) -> Tensor:
    """Half precision to fp32, any shape; fp32 and fp64 stay: losses are exact under bf16 and can be checked in fp64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def hide(x: Tensor, valid: Tensor) -> Tensor:
    """x of any shape with zeros where `valid` (bool, its leading axes) is false: neither NaN nor gradient passes."""
    mask = valid.reshape(valid.shape + (1,) * (x.dim() - valid.dim()))
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def over_count(total: Tensor, count: Number) -> Tensor:
    """total [] / count, a number or []; an exact zero that keeps its gradient where the count is 0. No host sync."""
    if isinstance(count, Tensor):
        return total / count.to(total.dtype).clamp_min(1.0)
    return total / max(float(count), 1.0)


def masked_mean(values: Tensor, valid: Tensor, count: Number | None = None) -> Tensor:
    """Sum [] of `values` where `valid` (any one shape), over `count` (default: the number of valid ones here)."""
    return over_count(hide(values, valid).sum(), valid.sum() if count is None else count)
