"""Which rank is slow: a whole step takes every rank as long as the slowest, so each tells the time that it needs itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch


class OwnTime:
    """Seconds between `begin` and `end` in which this process waited for no other.

    On a GPU they are those of its queue, between events that are read when the step is over. Where gradients are not held
    (`engine.hold_gradients`), backward passes reduce them and wait for other ranks meanwhile.
    """

    running: ClassVar[OwnTime | None] = None

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None

    def begin(self) -> None:
        """A micro-batch is asked for."""
        self._began, OwnTime.running = self._now(), self

    def end(self) -> None:
        """Its backward pass has ended; the reduction comes."""
        self._spans.append((self._began, self._now()))
        OwnTime.running = None

    def take(self) -> float:
        """The sum since the last call."""
        spans, self._spans = self._spans, []
        if not self._on_gpu:
            return float(sum(end - began for began, end in spans))
        for _, end in spans[-1:]:
            end.synchronize()  # long over: the step has read whether its gradients are finite
        return float(sum(began.elapsed_time(end) for began, end in spans)) / 1e3

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def waiting_for_ranks() -> Iterator[None]:
    """Around a collective within a forward pass: that time is not the rank's own."""
    clock = OwnTime.running
    if clock is not None:
        clock.end()
    yield
    if clock is not None:
        clock.begin()
