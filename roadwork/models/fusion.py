"""From view tokens to one vector per photo: multi-scale pyramid and gated attention fusion."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from roadwork.models.norm import RMSNorm


class Pyramid(nn.Module):
    """Multi-scale projections of the view tokens: H, H/2 and H/4 wide (512, 256, 128), concatenated, back to H.

    The narrow branches must summarise, the wide one need not; the sum with the input keeps the way free for gradients.
    """

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        widths = [hidden_dim, hidden_dim // 2, hidden_dim // 4]
        self.norm = RMSNorm(hidden_dim)
        self.scales = nn.ModuleList(nn.Sequential(nn.Linear(hidden_dim, w), nn.GELU()) for w in widths)
        self.merge = nn.Linear(sum(widths), hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, K, H] -> [B, K, H]."""
        y = self.norm(x)
        merged: Tensor = self.merge(torch.cat([scale(y) for scale in self.scales], dim=-1))
        return x + merged


class GatedFusion(nn.Module):
    """Gated attention pooling over views.

    Each head h attends from a learned seed (a_hi = softmax_i(s_h . k_i), as the pooling by multi-head attention of the
    Set Transformer, Lee et al. 2019) and each view has an importance gate g_i in (0, 1) (as the gate of attention-based
    multiple instance learning, Ilse et al. 2018). out_h = sum_i a_hi g_i v_hi / (sum_i a_hi g_i + eps): with all gates
    near 0 the eps keeps the quotient finite.
    """

    def __init__(self, hidden_dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        inner = max(hidden_dim // 4, 1)
        self.norm = RMSNorm(hidden_dim)
        self.importance_net = nn.Sequential(nn.Linear(hidden_dim, inner), nn.GELU(), nn.Linear(inner, 1))
        self.seed = nn.Parameter(torch.empty(num_heads, hidden_dim // num_heads))
        self.k_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.v_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.out_norm = RMSNorm(hidden_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pool the valid views.

        Args:
            x: [B, K, H]. mask: bool [B, K], at least one True per photo.

        Returns:
            [B, H], and the weights over views fp32 [B, K] (mean over heads; they sum to 1, padding has 0).
        """
        batch, length, width = x.shape
        y = self.norm(x)
        gate = torch.sigmoid(self.importance_net(y).squeeze(-1).float())
        keys = self.k_proj(y).view(batch, length, self.num_heads, -1)
        with torch.autocast(x.device.type, enabled=False):  # a plain engine's autocast would make bf16 of the product
            logits = torch.einsum("bkhd,hd->bhk", keys.float(), self.seed.float()) * keys.shape[-1] ** -0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
        weights = logits.softmax(-1) * gate[:, None]
        weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        values = self.v_proj(y).view(batch, length, self.num_heads, -1)
        pooled = torch.einsum("bhk,bkhd->bhd", weights.to(values.dtype), values).reshape(batch, width)
        plain = torch.einsum("bk,bkd->bd", weights.mean(1).to(y.dtype), y)
        return self.out_norm(plain + self.out_proj(pooled)), weights.mean(1)
