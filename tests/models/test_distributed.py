"""The balance statistics span all processes."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork.models.moe import MoE, balance_loss
from tests.launching import free_port, spawn


def _tokens() -> tuple[MoE, Tensor, Tensor]:
    torch.manual_seed(5)
    moe = MoE(16, 8, 4, 2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    mask = torch.arange(6)[None] < torch.tensor([6, 1, 3, 5])[:, None]
    return moe, torch.randn(4, 6, 16), mask


def _balance_on_rank(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    moe, x, mask = _tokens()
    rows = slice(0, 1) if rank == 0 else slice(1, 4)  # unequal shares: a mean of means would be wrong
    balance, load = balance_loss(moe(x[rows], mask[rows])[1][None], 4, everywhere=True)
    (balance / 2).backward()  # each process adds its share of one term
    grad = moe.router.weight.grad
    assert grad is not None
    dist.all_reduce(grad)
    torch.save((balance.detach(), load, grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_balance_of_two_processes_is_that_of_the_joined_batch(tmp_path: Path) -> None:
    moe, x, mask = _tokens()
    expected, load = balance_loss(moe(x, mask)[1][None], 4, everywhere=True)
    expected.backward()
    spawn(_balance_on_rank, free_port(), str(tmp_path))
    for rank in range(2):
        balance, found_load, grad = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(balance, expected.detach())
        torch.testing.assert_close(found_load, load)
        torch.testing.assert_close(grad, moe.router.weight.grad)
