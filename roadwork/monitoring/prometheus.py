"""Counters, gauges and histograms of a service in the text format that Prometheus reads (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Cumulative buckets, sum and count; callers hold the lock of their registry."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        """Count one observation."""
        self.counts[sum(value > bound for bound in self.bounds)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """The samples of the exposition."""
        total, found = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {self.sum!r}", f"{name}_count {total}"]


class ServiceMetrics:
    """What an operator watches: answers by status, how long they took, how full batches are, how many wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: Counter[int] = Counter()
        self._seconds = Histogram((0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0))
        self._batches = Histogram((1, 2, 4, 8, 16, 32, 64))
        self.pending = 0
        """Requests in the house; changed by the event loop alone."""

    def answered(self, status: int, seconds: float) -> None:
        """One request has its answer."""
        with self._lock:
            self._answers[status] += 1
            self._seconds.add(seconds)

    def computed(self, photos: int) -> None:
        """One forward pass over that many photos."""
        with self._lock:
            self._batches.add(photos)

    def exposition(self) -> str:
        """The page that Prometheus scrapes."""
        with self._lock:
            answers = [f'roadwork_requests_total{{status="{s}"}} {n}' for s, n in sorted(self._answers.items())]
            parts = [
                ("roadwork_requests_total", "counter", "Answers to /predict by HTTP status.", answers),
                ("roadwork_request_seconds", "histogram", "From the request's head to its answer.",
                 self._seconds.lines("roadwork_request_seconds")),
                ("roadwork_batch_photos", "histogram", "Photos per forward pass.",
                 self._batches.lines("roadwork_batch_photos")),
                ("roadwork_pending_requests", "gauge", "Requests that wait for their answer.",
                 [f"roadwork_pending_requests {self.pending}"]),
            ]  # fmt: skip
        text = [
            line for name, kind, help_text, samples in parts
            for line in (f"# HELP {name} {help_text}", f"# TYPE {name} {kind}", *samples)
        ]  # fmt: skip
        return "\n".join(text) + "\n"
