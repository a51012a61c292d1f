"""What one real process of a run sends, holds and waits for; started by `benchmarks.scaling_real` under the launcher.

Trains like launch/pretrain.py and writes STEM-RANK.json: bytes given to each collective in the last optimizer step,
bytes of weights, masters, moments and average on this rank, seconds for opening the shards and for the first batch, and
what was fetched through `slow://FOLDER`. argv[1] is STEM, the rest are options of pre-training.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch
import torch.distributed as dist

import roadwork.training.pretrain as stage
from roadwork.command_line import parse
from roadwork.data.batch import Batch
from roadwork.training import parts
from roadwork.training.loop import Trainer

SENT: Counter[str] = Counter()
SECONDS: dict[str, float] = {}
FETCHED: list[tuple[str, int]] = []
COLLECTIVES = ("all_reduce", "reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather", "broadcast")


def counted(name: str) -> Any:
    """torch.distributed's collective, which counts the bytes of its largest tensor first."""
    inner = getattr(dist, name)

    def call(*words: Any, **named: Any) -> Any:
        tensors = [t for t in (*words, *named.values()) if isinstance(t, torch.Tensor)]
        SENT[name] += max((t.numel() * t.element_size() for t in tensors), default=0)
        return inner(*words, **named)

    return call


class SlowFiles(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Files of this machine at SLOW_BYTES_PER_S bytes per second for all processes that share SLOW_LOCK, noted."""

    protocol = "slow"

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.BytesIO:
        data = Path(path).read_bytes()
        FETCHED.append((Path(path).name, len(data)))
        with open(os.environ["SLOW_LOCK"], "w") as wire:
            fcntl.flock(wire, fcntl.LOCK_EX)
            time.sleep(len(data) / float(os.environ["SLOW_BYTES_PER_S"]))
        return io.BytesIO(data)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Of a file: name, bytes, kind."""
        return {"name": path, "size": os.stat(path).st_size, "type": "file"}


class Watched(Trainer):
    """Notes what the last optimizer step sent, what this rank holds after it, and how long the first batch took."""

    def optimizer_step(self, step: int, batches: Iterator[Batch]) -> tuple[dict[str, Any], bool]:
        """As Trainer's, between two looks at the counters."""
        SENT.clear()
        done = super().optimizer_step(step, map(self._noted, batches))
        self.seen = dict(SENT)
        return done

    def _noted(self, batch: Batch) -> Batch:
        SECONDS.setdefault("first_wait_s", batch.wait_s)
        return batch

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
        found |= {"fetched": FETCHED, **SECONDS}
        with open(f"{sys.argv[1]}-{self.engine.rank}.json", "w") as file:
            json.dump(found, file)


def opened(*words: Any) -> Any:
    """The stage's own `build_data`, timed by the clock that all processes of a machine share."""
    SECONDS["opening_began"] = time.monotonic()
    data = parts.build_data(*words)
    SECONDS["opening_ended"] = time.monotonic()
    return data


def size_of(tensors: Any) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    """Count, train, write."""
    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    fsspec.register_implementation("slow", SlowFiles)
    vars(stage).update(Trainer=Watched, build_data=opened)  # what the stage calls by these names
    stage.pretrain(parse("pretrain", sys.argv[2:]).config)


if __name__ == "__main__":
    main()
