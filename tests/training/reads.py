"""Counts where tensors are read on the host: on a GPU each such place waits for the device."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

READS = {
    torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.nonzero, torch.nonzero,
    torch.Tensor.__bool__, torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__,
}  # fmt: skip
ON_THE_HOST = {
    "loop.py optimizer_step",  # weights of the batch before it goes to the device
    "augment.py forward", "augment.py _one_by_one",  # positions, epochs, the view mask
    "slots.py of", "slots.py full",  # the view mask
    # checks that are left out where the values are on a GPU:
    "augment_checks.py <genexpr>", "detector.py _check_range", "detector.py _check_boxes", "focal.py check_labels",
    "metadata.py _encode",
    "liveness.py anywhere",  # the vote, over gloo
    "gradients.py _check", "utils.py is_invalid_grad_norm", "loop.py _record",  # the norm, once it was read
    "inspect_run.py <genexpr>",  # positions, in a test
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

    def waits(self) -> dict[str, int]:
        """Copies to the host by place, of the places where something is not there yet; what is read there follows them."""
        return {place: self.kinds[f"{place} cpu"] for place in self.places if place not in ON_THE_HOST}
