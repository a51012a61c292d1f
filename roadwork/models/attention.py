"""Gated attention over the views of a photo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roadwork.errors import UserError
from roadwork.models.norm import RMSNorm


class GatedAttention(nn.Module):
    """Multi-head attention with grouped queries, q/k norm and a sigmoid gate before the output projection.

    Y = softmax(q k^T / sqrt(d)) v per head, then Y * sigmoid(x W_gate), then out_proj: Qiu et al., "Gated Attention for
    Large Language Models" (NeurIPS 2025, arXiv 2505.06708), the head-specific element-wise form; q and k are normalised
    over the head as in Qwen3. Views are a set, so there is no rotary embedding: positions are in the tokens.

    Args:
        hidden_dim: width H of the tokens.
        num_heads: query heads; divides hidden_dim.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width d of one head; hidden_dim / num_heads by default.
    """

    def __init__(self, hidden_dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None = None) -> None:
        super().__init__()
        if num_heads < 1 or hidden_dim % num_heads:
            raise UserError(f"model.num_heads is {num_heads}; give a divisor of model.hidden_dim ({hidden_dim})")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UserError(f"model.num_kv_heads is {num_kv_heads}; give a divisor of model.num_heads ({num_heads})")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or hidden_dim // num_heads
        inner = num_heads * self.head_dim
        self.qkv_proj = nn.Linear(hidden_dim, inner + 2 * num_kv_heads * self.head_dim, bias=False)
        self.gate_proj = nn.Linear(hidden_dim, inner, bias=False)
        self.out_proj = nn.Linear(inner, hidden_dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend over the valid views.

        Args:
            x: [B, K, H] tokens (normalised by the caller; the gate sees the same).
            mask: bool [B, K], True for views that are there (at least one per photo); None: all.

        Returns:
            [B, K, H]. Rows of views that are not there are finite and mean nothing.
        """
        batch, length, _ = x.shape
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = self.qkv_proj(x).split([q_dim, kv_dim, kv_dim], dim=-1)
        q = self.q_norm(q.reshape(batch, length, self.num_heads, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.reshape(batch, length, self.num_kv_heads, self.head_dim)).transpose(1, 2)
        v = v.reshape(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        groups = self.num_heads // self.num_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        bias = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y.transpose(1, 2).reshape(batch, length, q_dim)
        attended: Tensor = self.out_proj(y * torch.sigmoid(self.gate_proj(x)))
        return attended
