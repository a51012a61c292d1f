"""What one real process of a run sends and holds; started by `python -m benchmarks.scaling --measure` under the launcher.

Trains like launch/pretrain.py and writes STEM-RANK.json: bytes given to each collective in the last optimizer step, and
bytes of weights, masters, moments and average on this rank. argv[1] is STEM, the rest are options of pre-training.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import roadwork.training.pretrain as stage
from roadwork.command_line import parse
from roadwork.data.batch import Batch
from roadwork.training.loop import Trainer

SENT: Counter[str] = Counter()
COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather", "broadcast")


def counted(name: str) -> Any:
    """torch.distributed's collective, which counts the bytes of its largest tensor first."""
    inner = getattr(dist, name)

    def call(*words: Any, **named: Any) -> Any:
        tensors = [t for t in (*words, *named.values()) if isinstance(t, torch.Tensor)]
        SENT[name] += max((t.numel() * t.element_size() for t in tensors), default=0)
        return inner(*words, **named)

    return call


class Watched(Trainer):
    """Notes what the last optimizer step sent, and what this rank holds after it."""

    def optimizer_step(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, Any], bool]:
        """As Trainer's, between two looks at the counters."""
        SENT.clear()
        done = super().optimizer_step(step, batches)
        self.seen = dict(SENT)
        return done

    def _finish(self) -> None:
        held = {
            "weights_bf16": size_of(self.masters.parameters.values()),
            "masters": size_of(self.masters.flats()),
            "moments": size_of(t for s in self.masters.states() for n, t in s.items() if n != "step"),
            "average": size_of(self.average.flats if self.average else []),
        }
        super()._finish()
        parameters = sum(p.numel() for p in self.masters.parameters.values())
        found = {"parameters": parameters, "micro_steps": self.micro_steps, "sent": self.seen, "held": held}
        with open(f"{sys.argv[1]}-{self.engine.rank}.json", "w") as file:
            json.dump(found, file)


def size_of(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    """Count, train, write."""
    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    vars(stage)["Trainer"] = Watched  # what the stage makes by this name
    stage.pretrain(parse("pretrain", sys.argv[2:]).config)


if __name__ == "__main__":
    main()
