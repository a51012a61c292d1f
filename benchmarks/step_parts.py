"""Parts of a training step on their own: the forward pass, and augmentation. For `benchmarks.train_step`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from roadwork.data.batch import Batch
from roadwork.training.loop import Trainer

PHOTOS, VIEWS = 4, 12
"""Augmented at a time: 48 views."""


def median_seconds(work: Callable[[int], object], times: int, device: torch.device) -> float:
    """Median of `work(turn)` after one turn that does not count; the device is waited for."""
    spent = []
    for turn in range(times + 1):
        began = time.perf_counter()
        work(turn)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def forward_rate(trainer: Trainer, batch: Batch, times: int) -> float:
    """Operations per second of the backbone (by the step's formula) in forward passes of the whole model, no gradients.

    Of one process's micro-batch, with pruning and every head; times the number of processes, which run side by side.
    """
    device, model = trainer.engine.device, trainer.model
    here = batch.to(device)
    pixels = here.views.float() / 255
    there = batch.view_mask.cpu()
    counts = there.sum(1)

    def forward(_: int) -> object:
        return model(pixels, there, here.metadata, here.boxes)

    model.eval()
    with torch.no_grad():
        kept = int(model(pixels, there, here.metadata, here.boxes).view_mask.sum())
        seconds = median_seconds(forward, times, device)
    model.train()
    return trainer.utilisation.operations.forward(int(counts.sum()), kept) / seconds * trainer.engine.world_size


def augment_ms(augment: nn.Module, size: int, times: int, device: torch.device) -> float:
    """Milliseconds of the configured augmentation on 4 photos of 12 views of `size` px, parameters drawn anew each time."""
    views = torch.rand(PHOTOS, VIEWS, 3, size, size, device=device)
    keys = torch.arange(PHOTOS)
    return 1e3 * median_seconds(lambda turn: augment(views, keys + turn * PHOTOS, 0, 0), times, device)
