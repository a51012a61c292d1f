"""Well-known implementations of the detector's blocks, from `transformers`, with the weights of ours."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3NextConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention

from roadwork.models.attention import GatedAttention
from roadwork.models.moe import MoE

WEIGHT_STD = 0.3
"""Of the drawn weights: wide enough that a wrong one shows."""


def qwen3_next_attention(
    hidden_dim: int, num_heads: int, num_kv_heads: int, backend: str = "eager", std: float = WEIGHT_STD
) -> tuple[Qwen3NextAttention, GatedAttention]:
    """Qwen3-Next's gated attention with drawn weights, and ours with the same.

    Qwen3-Next interleaves query and gate per head and keeps its norm weights minus one.
    """
    head_dim = hidden_dim // num_heads
    config = Qwen3NextConfig(
        hidden_size=hidden_dim, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, head_dim=head_dim,
        attention_dropout=0.0, num_hidden_layers=1, layer_types=["full_attention"],
    )  # fmt: skip
    config._attn_implementation = backend
    reference, own = Qwen3NextAttention(config, 0), GatedAttention(hidden_dim, num_heads, num_kv_heads)
    _draw(reference, std)
    query, gate = reference.q_proj.weight.view(num_heads, 2 * head_dim, hidden_dim).chunk(2, dim=1)
    with torch.no_grad():
        projections = [query.reshape(-1, hidden_dim), reference.k_proj.weight, reference.v_proj.weight]
        own.qkv_proj.weight.copy_(torch.cat(projections))
        own.gate_proj.weight.copy_(gate.reshape(-1, hidden_dim))
        own.out_proj.weight.copy_(reference.o_proj.weight)
        own.q_norm.weight.copy_(1 + reference.q_norm.weight)
        own.k_norm.weight.copy_(1 + reference.k_norm.weight)
    return reference, own


def qwen3_moe(
    hidden_dim: int, expert_dim: int, num_experts: int, top_k: int, backend: str = "eager", std: float = WEIGHT_STD
) -> tuple[Qwen3MoeSparseMoeBlock, MoE]:
    """Qwen3-MoE's mixture of experts with drawn weights, and ours with the same."""
    config = Qwen3MoeConfig(
        hidden_size=hidden_dim, moe_intermediate_size=expert_dim, num_experts=num_experts, num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = backend
    reference, own = Qwen3MoeSparseMoeBlock(config), MoE(hidden_dim, expert_dim, num_experts, top_k)
    _draw(reference, std)
    with torch.no_grad():
        own.router.weight.copy_(reference.gate.weight)
        own.gate_up_proj.copy_(reference.experts.gate_up_proj)
        own.down_proj.copy_(reference.experts.down_proj)
    return reference, own


def _draw(module: nn.Module, std: float) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
