"""The backward passes of one optimizer step: gradients are summed in fp32 on each process and reduced once.

DeepSpeed's ZeRO-2 reduces the gradients of every micro-batch with an all-reduce, so that no process has to hold more than
its own part of their sum. Held until the last micro-batch instead, as ZeRO-1 does (Rajbhandari et al. 2020,
arXiv 1910.02054, section 5), they take 4 bytes per trained parameter on every process, and travel once per optimizer step
whatever the accumulation, by a reduce-scatter where the backend has one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork.engine import Engine

PIECE = 2**24
"""Elements whose norm is taken at once, in float64: a long sum in fp32 is not exact enough on a CPU. That takes a copy."""


class Gradients:
    """Accumulates, reduces and, with ZeRO, makes the optimizer step at the end.

    Args:
        engine: the running engine, whose model and optimizer are prepared.
        micro_steps: micro-batches of an optimizer step.
        hold: reduce once per optimizer step, where ZeRO would do so at each micro-batch.
    """

    def __init__(self, engine: Engine, micro_steps: int, hold: bool) -> None:
        self.engine, self._parts = engine, engine.world_size * micro_steps
        ds: Any = engine.accelerator.deepspeed_engine_wrapped.engine if engine.sharded else None
        holds = hold and ds is not None and ds.optimizer.partition_gradients and not ds.optimizer.cpu_offload
        self.held = HeldGradients(ds, engine.rank, engine.world_size) if holds else None

    def backward(self, loss: Tensor) -> None:
        """One micro-batch's backward pass. Where gradients are not held, the engine reduces them now, and makes the
        optimizer step after the last micro-batch.

        Args:
            loss: [], a share of the whole step's, which is their sum over processes and micro-batches.
        """
        if self.held is not None:
            self.held.add(loss)
        else:
            self.engine.accelerator.backward(loss * self._parts)  # the engine takes a mean

    def step(self) -> None:
        """After the last micro-batch: the reduction and the step, where they were left for the end. Collective."""
        if self.held is not None:
            self.held.step()


class HeldGradients:
    """Sums of this process's gradients, which ZeRO's own hooks do not see.

    One buffer holds all: for each rank its partition of every parameter group, one behind the other. What a rank is to get
    is then one piece of it, and a single collective reduces everything. Between two optimizer steps it is zero.

    Args:
        ds: DeepSpeed's engine with a stage 2 optimizer.
        rank, world_size: of this process and of the run.
    """

    def __init__(self, ds: Any, rank: int, world_size: int) -> None:
        self.ds, self.rank, self.world_size = ds, rank, world_size
        zero = ds.optimizer
        self._sizes = [weights.numel() // world_size for weights in zero.bit16_groups_flat]
        self._starts = [sum(self._sizes[:group]) for group in range(len(self._sizes))]
        device, dtype = zero.bit16_groups_flat[0].device, zero.gradient_accumulation_dtype
        self.buffer = torch.zeros(world_size * sum(self._sizes), dtype=dtype, device=device)
        for hook in zero._grad_acc_hooks:
            hook.remove()
        for group, parameters in enumerate(zero.bit16_groups):
            for parameter in parameters:
                pieces = [(self.buffer[at : at + hi - lo], lo, hi) for at, lo, hi in self._places(group, parameter)]
                whole = pieces[0][0].view_as(parameter) if len(pieces) == 1 else None
                parameter.register_post_accumulate_grad_hook(partial(_move, whole, pieces))
        self.norm = torch.zeros(())
        """[] on the host: the global norm of the gradients of the last step, before clipping."""
        # DeepSpeed's own reduces a norm for each parameter group, and lets the host read each while the device waits.
        zero.check_overflow, zero.scaled_global_norm = self._check, lambda: self.norm

    def _places(self, group: int, parameter: Tensor) -> Iterator[tuple[int, int, int]]:
        """(place in the buffer, first, end) of each stretch of the flattened parameter that one rank owns."""
        size, weights = self._sizes[group], self.ds.optimizer.bit16_groups_flat[group]
        first = (parameter.data_ptr() - weights.data_ptr()) // parameter.element_size()
        end = first + parameter.numel()
        for owner in range(first // size, -(-end // size)):
            low, high = max(first, owner * size), min(end, (owner + 1) * size)
            yield owner * sum(self._sizes) + self._starts[group] + low - owner * size, low - first, high - first

    def add(self, loss: Tensor) -> None:
        """Backward pass of a loss [] whose gradient is added to the sums."""
        self.ds.inside_no_sync_ctxt = True
        self.ds.backward(loss, scale_wrt_gas=False)
        self.ds.inside_no_sync_ctxt = False

    def reduced(self) -> list[Tensor]:
        """This rank's partition of each parameter group's sum over all processes, flat [n]; valid until `clear`.
        Collective."""
        mine = self.buffer.view(self.world_size, -1)[self.rank]
        if self.world_size > 1 and dist.get_backend() == "nccl":
            mine = torch.empty_like(mine)
            dist.reduce_scatter_tensor(mine, self.buffer)
        elif self.world_size > 1:
            dist.all_reduce(self.buffer)
        return list(mine.split(self._sizes))

    def step(self) -> None:
        """Give the sums to ZeRO and let it step: clipping by the global norm, optimizer, new weights; or, where a gradient
        is not finite, nothing of that. Collective."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        partitions = self.reduced()
        self.norm = self._global_norm(partitions)
        for group, partition in enumerate(partitions):
            self.ds.optimizer.averaged_gradients[group] = GradPartitionBufferGroup([partition], partition)
        self.ds.set_gradient_accumulation_boundary(True)
        self.ds.step()
        self.clear()

    def _global_norm(self, partitions: list[Tensor]) -> Tensor:
        """What the host must know to make the step, and all that it waits for."""
        pieces = [piece for partition in partitions for piece in partition.split(PIECE)]
        norms = torch.stack([torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in pieces])
        squared = norms.square().sum()
        if self.world_size > 1:
            dist.all_reduce(squared)
        return squared.sqrt().float().cpu()

    def _check(self, partition_gradients: bool = True) -> None:
        """DeepSpeed's question whether a gradient is not finite."""
        self.ds.optimizer.overflow = not math.isfinite(self.norm)

    def clear(self) -> None:
        """Back to zero, for the next step."""
        self.buffer.zero_()


def _move(whole: Tensor | None, pieces: list[tuple[Tensor, int, int]], parameter: Tensor) -> None:
    """Add a gradient that is complete to its place, or to its places on several ranks, and free it."""
    assert parameter.grad is not None
    if whole is not None:
        whole.add_(parameter.grad)
    else:
        flat = parameter.grad.reshape(-1)
        for place, first, end in pieces:
            place.add_(flat[first:end])
    parameter.grad = None
