"""The backward passes of one optimizer step: gradients are summed in fp32 on each process and reduced once.

DeepSpeed's ZeRO-2 reduces the gradients of every micro-batch, so that no process has to hold more than its own part of
their sum. Held until the last micro-batch instead, as ZeRO-1 does, they take 4 bytes per trained parameter on every process,
and travel once per optimizer step whatever the accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roadwork.engine import Engine


class Gradients:
    """Accumulates, reduces and, with ZeRO, makes the optimizer step at the end.

    Args:
        engine: the running engine, whose model and optimizer are prepared.
        micro_steps: micro-batches of an optimizer step.
        hold: reduce once per optimizer step, where the engine would do so at each micro-batch.
    """

    def __init__(self, engine: Engine, micro_steps: int, hold: bool) -> None:
        self.engine, self._parts = engine, engine.world_size * micro_steps
        self._ds: Any = engine.accelerator.deepspeed_engine_wrapped.engine if engine.sharded else None
        zero: Any = self._ds.optimizer if self._ds else None
        self.held = bool(hold and micro_steps > 1 and zero and zero.partition_gradients and not zero.cpu_offload)
        """Whether gradients wait for the last micro-batch."""
        if self.held and zero.dtype != torch.float32:
            zero.use_grad_accum_attribute = True  # sum in `grad_accum`, in fp32: `grad` has the parameter's dtype
            for parameter in (p for group in zero.bit16_groups for p in group):  # at once, not after the backward pass
                parameter.register_post_accumulate_grad_hook(zero._fill_param_grad_accum_attribute)

    def backward(self, loss: Tensor, last: bool) -> None:
        """One micro-batch's backward pass; after the last one the reduction and, with ZeRO, the step. Collective.

        Args:
            loss: [], a share of the whole step's, which is their sum over processes and micro-batches.
            last: of the optimizer step.
        """
        loss = loss * self._parts  # the engine takes a mean
        if not self.held:
            self.engine.accelerator.backward(loss)
            return
        # As DeepSpeed's `coalesce_grad_reduction` does, which is of no use here: left by an error on one rank, it begins a
        # reduction that the other ranks do not take part in, and the rank hangs instead of ending with its error.
        ds, zero = self._ds, self._ds.optimizer
        ds.set_gradient_accumulation_boundary(last)
        ds.inside_no_sync_ctxt = zero._coalesce_grad_reduction = True
        ds.backward(loss)
        ds.inside_no_sync_ctxt = zero._coalesce_grad_reduction = False
        if last:
            ds._flush_coalesced_reduction_zero12(zero)
            ds.step()
