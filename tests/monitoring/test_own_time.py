"""A rank's own time leaves out what it waits for others."""

from __future__ import annotations

import time

import torch

from roadwork.monitoring.own_time import OwnTime, waiting_for_ranks


def test_collectives_within_a_forward_pass_are_left_out() -> None:
    """Bounds by what was slept: true however busy the machine is."""
    clock, began = OwnTime(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        clock.begin()
        time.sleep(0.03)
        with waiting_for_ranks():
            time.sleep(0.05)
        clock.end()
    total = time.perf_counter() - began
    assert 2 * 0.03 <= clock.take() <= total - 2 * 0.05
    assert clock.take() == 0, "the next step begins anew"


def test_a_collective_outside_a_step_is_nobodys() -> None:
    clock = OwnTime(torch.device("cpu"))
    with waiting_for_ranks():
        pass
    assert clock.take() == 0
