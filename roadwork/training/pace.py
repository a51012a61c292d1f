"""How much of the devices' ceiling a run uses, and garbage collection that no rank waits for alone."""

from __future__ import annotations

import gc
from types import TracebackType

import torch

from roadwork.config import Config
from roadwork.engine import Engine
from roadwork.models.detector import RoadworkDetector
from roadwork.models.operations import backbone_operations
from roadwork.monitoring.ceiling import Ceiling, matmul_ceiling
from roadwork.monitoring.throughput import utilisation
from roadwork.training.counts import StepCounts

TERA = 1e12


class Utilisation:
    """Share of the ceiling of all devices together that the backbone's operations of a step used ('MFU').

    Every rank measures its ceiling once, all at the same time: ranks that share a machine's cores share its ceiling.

    Args:
        config: `monitoring.ceiling_tflops` replaces the measurement.
        counts: views of a step, known from the index.
    """

    def __init__(self, config: Config, engine: Engine, model: RoadworkDetector, counts: StepCounts) -> None:
        self.operations = backbone_operations(model.backbone, model.view_size, model.prune_unit)
        self.counts = counts
        given = config.monitoring.ceiling_tflops
        engine.barrier()
        one = Ceiling(given * TERA, 0, "given") if given else matmul_ceiling(engine.device)
        self.product = f"{one.dtype} {one.size}^3" if one.size else "as configured"
        total = torch.tensor([one.operations_per_s], dtype=torch.float64, device=engine.device)
        self.ceiling = float(engine.all_reduce(total))
        """Operations per second of all ranks together."""

    def of(self, step: int, seconds: float) -> float:
        """Of optimizer step `step`, which took `seconds`."""
        return utilisation(self.operations.training(*self.counts.views(step)), seconds, self.ceiling)


class GarbageCollection:
    """Python's collector off while steps run, and on the same steps on all ranks.

    Left alone it runs on each rank whenever that rank's allocations say so, and every other rank waits for it. What exists
    when the loop begins is set aside (`gc.freeze`), so that a collection looks only at what the steps made.

    Args:
        every: optimizer steps between collections; 0 leaves Python's own choice.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def __enter__(self) -> GarbageCollection:
        if self.every:
            gc.collect()
            gc.freeze()
            gc.disable()
        return self

    def after(self, step: int) -> None:
        """To be called after `step` optimizer steps."""
        if self.every and step % self.every == 0:
            gc.collect()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.every:
            gc.unfreeze()
            gc.enable()
