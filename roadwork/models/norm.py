"""Root mean square norm, in fp32 inside."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm (Zhang and Sennrich 2019) that computes in fp32 and returns the input's dtype.

    x [..., D] -> x * rsqrt(mean(x^2) + eps) * weight, eps 1e-6. bf16 squares lose small entries, hence fp32.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.dtype.itemsize >= 4:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)
