"""The page that an operator's Prometheus scrapes: the text format, counts that add up, many threads."""

from __future__ import annotations

import math
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.monitoring.prometheus import CONTENT_TYPE, Histogram, ServiceMetrics

SAMPLE = re.compile(r"([a-zA-Z_:][\w:]*)(\{[^}]*\})? (\S+)")


def samples(page: str) -> dict[str, float]:
    """Value by name with its labels; fails on a line that the format does not allow."""
    found: dict[str, float] = {}
    described: set[str] = set()
    for line in page.splitlines():
        if line.startswith("# "):
            kind, name = line.split()[1:3]
            assert kind in ("HELP", "TYPE")
            described.add(name)
            continue
        match = SAMPLE.fullmatch(line)
        assert match is not None, line
        name = match[1] + (match[2] or "")
        assert name not in found, f"{name} twice"
        assert re.sub(r"_(bucket|sum|count)$", "", match[1]) in described | {match[1]} and described
        found[name] = float(match[3])
    return found


def test_an_idle_service_has_a_whole_page() -> None:
    page = ServiceMetrics().exposition()
    found = samples(page)
    assert page.endswith("\n") and CONTENT_TYPE.startswith("text/plain; version=0.0.4")
    assert found["roadwork_pending_requests"] == 0
    assert found["roadwork_request_seconds_count"] == found["roadwork_request_seconds_sum"] == 0
    assert not any(name.startswith("roadwork_requests_total{") for name in found)


def test_answers_are_counted_by_status_and_time() -> None:
    metrics = ServiceMetrics()
    for status, seconds in ((200, 0.004), (200, 0.3), (413, 0.001), (503, 60.0)):
        metrics.answered(status, seconds)
    metrics.computed(1)
    metrics.computed(16)
    metrics.computed(200)
    metrics.pending = 3
    found = samples(metrics.exposition())
    assert found['roadwork_requests_total{status="200"}'] == 2 and found['roadwork_requests_total{status="503"}'] == 1
    assert found["roadwork_request_seconds_count"] == 4
    assert found["roadwork_request_seconds_sum"] == pytest.approx(60.305)
    assert found['roadwork_request_seconds_bucket{le="0.005"}'] == 2
    assert found['roadwork_request_seconds_bucket{le="10.0"}'] == 3
    assert found['roadwork_request_seconds_bucket{le="+Inf"}'] == 4
    assert found['roadwork_batch_photos_bucket{le="16"}'] == 2 and found['roadwork_batch_photos_bucket{le="+Inf"}'] == 3
    assert found["roadwork_pending_requests"] == 3


def test_every_family_says_what_it_is_before_its_samples() -> None:
    lines = ServiceMetrics().exposition().splitlines()
    for at, line in enumerate(lines):
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            assert lines[at - 1].startswith(f"# HELP {name} ") and kind in ("counter", "gauge", "histogram")


@settings(max_examples=60)
@given(st.lists(st.floats(0, 100), max_size=40))
def test_buckets_are_cumulative_and_end_at_the_count(values: list[float]) -> None:
    histogram = Histogram((1, 10, 50))
    for value in values:
        histogram.add(value)
    lines = histogram.lines("x")
    counts = [int(line.split()[-1]) for line in lines if "_bucket" in line]
    assert counts == [sum(v <= bound for v in values) for bound in (1, 10, 50, math.inf)]
    assert counts == sorted(counts) and lines[-1] == f"x_count {len(values)}"
    assert float(lines[-2].split()[1]) == pytest.approx(sum(values))


def test_a_value_on_a_bound_belongs_to_its_bucket() -> None:
    histogram = Histogram((1, 2))
    for value in (1, 2, 2.0000001):
        histogram.add(value)
    assert histogram.lines("x")[:3] == ['x_bucket{le="1"} 1', 'x_bucket{le="2"} 2', 'x_bucket{le="+Inf"} 3']


def test_threads_lose_no_answer() -> None:
    metrics = ServiceMetrics()

    def work() -> None:
        for i in range(500):
            metrics.answered(200 if i % 5 else 400, 0.01)
            metrics.computed(i % 8 + 1)
            if i % 100 == 0:
                samples(metrics.exposition())  # scraped in the middle

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = samples(metrics.exposition())
    assert (
        found['roadwork_requests_total{status="200"}'] == 1600 and found['roadwork_requests_total{status="400"}'] == 400
    )
    assert found["roadwork_batch_photos_count"] == 2000
