"""One layer over the view tokens."""

from __future__ import annotations

from torch import Tensor, nn

from roadwork.config import ModelConfig
from roadwork.models.attention import GatedAttention
from roadwork.models.moe import MoE
from roadwork.models.norm import RMSNorm


class Layer(nn.Module):
    """x + attention(norm(x)), then x + MoE(norm(x)): the pre-norm decoder layer of Qwen3, without causality."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.attention_norm = RMSNorm(hidden)
        self.attention = GatedAttention(hidden, config.num_heads, config.num_kv_heads)
        self.moe_norm = RMSNorm(hidden)
        self.moe = MoE(hidden, config.expert_dim, config.num_experts, config.top_k)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, K, H] and bool [B, K] -> [B, K, H] and the expert statistics [2E + 1]."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        mixed, stats = self.moe(self.moe_norm(x), mask)
        return x + self.dropout(mixed), stats
