"""Where an optimizer step reads tensors on the host: on a GPU it would wait there, so the log's reading is the only one."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures

READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero, torch.nonzero,
    torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__,
}  # fmt: skip
ON_THE_HOST = {
    "loop.py optimizer_step",  # weights of the batch before it goes to the device
    "augment.py forward", "augment.py _last", "augment.py _one_by_one",  # positions, epochs, the view mask
    "slots.py of",  # the view mask
    # checks that are left out where the values are on a GPU:
    "augment.py <genexpr>", "detector.py <genexpr>", "detector.py _check_boxes", "focal.py check_labels",
    "metadata.py _encode",
    "liveness.py anywhere",  # the vote, over gloo
}  # fmt: skip
"""Readings of tensors that are on the host in a run on a GPU, too."""


class Reads(TorchFunctionMode):
    """Counts readings by file and function, and of which kind they are."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        if function in READS:
            code = sys._getframe(1).f_code
            place = f"{Path(code.co_filename).name} {code.co_name}"
            self.places[place] += 1
            self.kinds[f"{place} {function.__name__}"] += 1
        return function(*given, **(named or {}))


def test_a_step_waits_for_the_device_once_to_log_and_to_show_the_experts_load(trainer: Make) -> None:
    made = trainer()
    shown = []
    made.journal.experts = lambda step, load, kept: shown.append((step, load.shape, kept))
    batches = iter(made.data.train_loader(made.engine, made.config, 0))
    for step in range(2):  # the load is shown after the first
        with Reads() as reads:
            made.optimizer_step(step, batches)
        # The engine without ZeRO asks besides whether the norm is finite, before it steps.
        assert set(reads.places) - ON_THE_HOST == {"loop.py _record", "loop.py _apply"}
        assert reads.kinds["loop.py _record cpu"] == reads.places["loop.py _apply"] == 1
    ((step, shape, kept),) = shown
    assert (step, shape) == (1, (1, made.config.model.num_experts)) and kept >= 1
