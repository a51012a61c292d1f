"""Mixture of SwiGLU experts with a load balance over all processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from roadwork.errors import UserError
from roadwork.monitoring.own_time import waiting_for_ranks

ROW_MULTIPLE = 8
"""torch's grouped products want rows of whole 16 bytes: 8 numbers in bf16."""
GROUPABLE = {torch.float32, torch.bfloat16, torch.float16}
"""And they exist for these types alone."""


class MoE(nn.Module):
    """Top-k mixture of experts, as in Qwen3-MoE.

    Routing: softmax over ALL experts in fp32, the top k, divided by their sum. Expert: down(silu(gate x) * up x).
    Weights lie as in transformers: `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].

    With a dozen tokens per photo there is nothing to gain from dispatching on a GPU: all experts run as one batched
    product and the weights of those not chosen are zero, so the host never waits. On a CPU each expert runs on its own
    tokens, where its widths are multiples of 8 and there are tokens of a type that torch groups.
    """

    def __init__(self, hidden_dim: int, expert_dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise UserError(f"model.top_k is {top_k}; give 1 to model.num_experts ({num_experts})")
        self.num_experts, self.top_k = num_experts, top_k
        self._groupable = hidden_dim % ROW_MULTIPLE == 0 and expert_dim % ROW_MULTIPLE == 0
        self.router = nn.Linear(hidden_dim, num_experts, bias=False)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * expert_dim, hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_dim, expert_dim))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix experts per token.

        Args:
            x: [B, K, H].
            mask: bool [B, K]; tokens that are not there do not enter the statistics.

        Returns:
            y [B, K, H], and fp32 statistics [2E + 1]: how often each expert was chosen, the sum of its probabilities
            (differentiable), and the number of tokens.
        """
        tokens = x.flatten(0, -2)
        with torch.autocast(x.device.type, enabled=False):  # a plain engine's autocast would make bf16 of the product
            probabilities = F.linear(tokens.float(), self.router.weight.float()).softmax(-1)
        top, chosen = probabilities.topk(self.top_k, dim=-1)
        top = top / top.sum(-1, keepdim=True)
        valid = tokens.new_ones(tokens.shape[0], dtype=torch.float32) if mask is None else mask.flatten().float()
        counts = (F.one_hot(chosen, self.num_experts).sum(1) * valid[:, None]).sum(0)
        stats = torch.cat([counts, (probabilities * valid[:, None]).sum(0), valid.sum()[None]])
        if self._groups(tokens):
            y = self._dispatched(tokens, top, chosen)
        else:
            y = self._dense(tokens, top, chosen)
        return y.view_as(x), stats

    def _groups(self, tokens: Tensor) -> bool:
        if tokens.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return self._groupable and tokens.dtype in GROUPABLE and tokens.shape[0] > 0

    def _dense(self, tokens: Tensor, top: Tensor, chosen: Tensor) -> Tensor:
        """Every expert on every token; those not chosen weigh 0."""
        weights = top.new_zeros(tokens.shape[0], self.num_experts).scatter(1, chosen, top)
        gate, up = torch.matmul(tokens, self.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
        out = torch.matmul(F.silu(gate) * up, self.down_proj.transpose(1, 2))
        return torch.einsum("etd,te->td", out.float(), weights).to(tokens.dtype)

    def _dispatched(self, tokens: Tensor, top: Tensor, chosen: Tensor) -> Tensor:
        """Each expert on its own tokens: rows sorted by expert, and back to their places afterwards."""
        order = chosen.flatten().argsort(stable=True)
        ends = torch.bincount(chosen.flatten(), minlength=self.num_experts).cumsum(0).int()
        rows = tokens[order // self.top_k]
        gate, up = F.grouped_mm(rows, self.gate_up_proj.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        out = F.grouped_mm(F.silu(gate) * up, self.down_proj.transpose(1, 2), offs=ends)
        picked = out[order.argsort()].view(*chosen.shape, -1)
        return (picked.float() * top[..., None]).sum(1).to(tokens.dtype)


def balance_loss(stats: Tensor, num_experts: int, everywhere: bool) -> tuple[Tensor, Tensor]:
    """Switch load balance (Fedus et al. 2022, equations 4 to 6) over the valid tokens of all processes.

    balance = mean over layers of E * sum_e f_e P_e: f_e = times expert e was chosen / tokens, P_e = mean probability.
    Perfectly balanced top-k routing gives k.

    The value is the same on every process. f is constant and P a sum over processes, so no collective is needed in the
    backward pass: each process holds the gradient of its own tokens times the number of processes, and the MEAN over
    processes (what DDP and DeepSpeed take) is the gradient of the global value.

    Args:
        stats: [L, 2E + 1] from `MoE`, stacked over layers.
        everywhere: add up over processes (training); every process must come here in the same micro-step.

    Returns:
        balance: fp32 0-d. load: fp32 [L, E] detached, share of the choices that each expert got.
    """
    total, world = stats.detach(), 1
    if everywhere and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        total, world = total.clone(), dist.get_world_size()
        with waiting_for_ranks():
            dist.all_reduce(total)
    tokens = total[:, -1:].clamp_min(1.0)
    chosen = total[:, :num_experts] / tokens
    value = num_experts * (chosen * total[:, num_experts:-1] / tokens).sum(-1).mean()
    own = num_experts * (chosen * stats[:, num_experts:-1] / tokens).sum(-1).mean() * world
    load = total[:, :num_experts] / total[:, :num_experts].sum(-1, keepdim=True).clamp_min(1.0)
    return value + (own - own.detach()), load
