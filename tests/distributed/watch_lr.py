"""Runs launch/find_lr.py and notes whether training state came back: argv[1] is the path's stem, the rest are its options.

Each rank writes STEM-RANK.json: whether its masters, optimizer state and 16-bit weights differ from the beginning's after the
last step (`moved`) and at the end (`left`).
"""

import json
import runpy
import sys
from pathlib import Path

import torch

import roadwork.training.lr_finder as stage
from roadwork.training.loop import Trainer

stem = sys.argv[1]


class Watched(Trainer):
    """Compares what this rank holds before the test, after each step and at the end."""

    def __init__(self, *given, **named) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*given, **named)
        self.before, self.moved = self._held(), {}

    def optimizer_step(self, step, batches):  # type: ignore[no-untyped-def]
        made = super().optimizer_step(step, batches)
        self.moved = self._changed()
        return made

    def close(self) -> None:
        seen = {"moved": self.moved, "left": self._changed(), "stage": self._stage(), "world": self.engine.world_size}
        Path(f"{stem}-{self.engine.rank}.json").write_text(json.dumps(seen))
        super().close()

    def _held(self) -> dict[str, list[torch.Tensor]]:
        states = [torch.as_tensor(v) for state in self.masters.states() for _, v in sorted(state.items())]
        held = {"masters": self.masters.flats(), "state": states, "weights": list(self.masters.parameters.values())}
        return {name: [t.detach().clone() for t in tensors] for name, tensors in held.items()}

    def _changed(self) -> dict[str, bool]:
        def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
            return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

        return {name: not same(tensors, self.before[name]) for name, tensors in self._held().items()}

    def _stage(self) -> int:
        return self.engine.accelerator.deepspeed_engine_wrapped.engine.zero_optimization_stage()


stage.Trainer = Watched  # type: ignore[misc]
sys.argv = ["launch/find_lr.py", *sys.argv[2:]]
runpy.run_path("launch/find_lr.py", run_name="__main__")
