"""`--dry_run` of pre-training: what the run would take, found out without training and without a process group."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roadwork.config import Config, accumulation
from roadwork.data.augment import Augment
from roadwork.data.batch import Batch
from roadwork.data.loader import EvalLoader
from roadwork.engine import launched_rank, launched_world_size, set_up_device, zero_settings
from roadwork.errors import UserError
from roadwork.losses import Targets, TotalLoss
from roadwork.monitoring.throughput import memory_gib
from roadwork.training.curvature import hessian_diagonal
from roadwork.training.optimizers import STATES
from roadwork.training.parts import Data, Made, build_data, build_model

GIB = 2**30
MOST_ON_CPU = 200_000_000
"""Parameters; a micro-batch of a larger model takes a CPU longer than anybody waits for a dry run."""
SLOW_S = 60.0
"""A first pass that takes longer than this is not repeated."""
_DEEPSPEEDS_BUCKET = 500_000_000
"""Elements of a gradient bucket where the DeepSpeed file does not say."""


def describe(config: Config) -> None:
    """Say what a run would do and take: parameters, memory per process, steps, time, shards, disk.

    Raises:
        UserError: what the run itself would refuse before its process group starts, or too small a disk.
    """
    processes = launched_world_size()
    micro_steps = accumulation(config, processes)
    on_cpu = set_up_device(config)
    data = build_data(config)
    made = build_model(config, data.view_size)
    settings = zero_settings(config, on_cpu)
    if launched_rank():
        return
    model = made.model
    trained = sum(t.numel() for t in made.trainable.values())
    frozen = sum(p.numel() for p in model.parameters()) - trained
    held = held_bytes(config, settings, trained, frozen, processes, on_cpu)
    _say(
        f"backbone {model.config.backbone}, weights: {model.weights_origin}",
        f"parameters: {trained:,} trained, {frozen:,} frozen",
        f"processes: {processes}; photos per step: {config.training.global_batch} = {processes} x {micro_steps} "
        f"micro-batches x {config.training.micro_batch}",
        f"steps: {data.steps} over {len(data.train)} training photos; validation on {len(data.val)} every "
        f"{data.validate_every}",
        f"engine: {_engine(settings)} on {'the CPU' if on_cpu else 'GPUs'}",
        f"memory per process: {sum(held.values()) / GIB:.2f} GiB ("
        + ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items())
        + "), activations not counted",
        *_time(config, data, made, settings, on_cpu),
    )
    _check_disk(config, trained, frozen)


def held_bytes(
    config: Config, settings: dict[str, Any] | None, trained: int, frozen: int, processes: int, on_cpu: bool
) -> dict[str, float]:
    """Bytes that one process holds through training, by purpose; activations and loader aside.

    ZeRO-2 keeps bf16 (or fp32) weights whole and fp32 gradients, masters, optimizer state and average in shards; gradients
    that wait for the last micro-batch, and stage 1's, are whole besides. A bucket, where gradients do not wait, is
    allocated in full on a GPU; on a CPU the pages that no gradient reaches are never there. Without ZeRO all is whole and
    fp32, and data parallelism copies gradients into buckets of its own.

    Args:
        settings: of `roadwork.engine.zero_settings`.
        trained, frozen: parameters.
        processes: of the run.
    """
    state = 4.0 * STATES[config.optimizer.name] * trained
    average = 4.0 * trained if config.training.ema_decay else 0.0
    # best/ and the models are written from these fp32 tensors; on a GPU they lie in the host's memory.
    constants = 4.0 * frozen if on_cpu else 0.0
    if settings is None:
        return {
            "weights": 4.0 * (trained + frozen) + constants,
            "gradients": 4.0 * trained,
            "buckets": 4.0 * trained if processes > 1 else 0.0,
            "optimizer": state,
            "average": average,
        }
    zero, width = settings["zero_optimization"], 2 if settings.get("bf16", {}).get("enabled") else 4
    holds = config.engine.hold_gradients and zero["stage"] == 2 and "offload_optimizer" not in zero
    buckets = 0.0 if holds else _bucket_bytes(zero, width, trained, on_cpu)
    # Summed where the whole lies over gloo, and where there is nobody to sum with.
    part = 0.0 if holds and (on_cpu or processes == 1) else 4.0 * trained / processes
    return {
        "weights": float(width * (trained + frozen)) + constants,
        "gradients": part + (4.0 * trained if holds or zero["stage"] == 1 else 0.0),
        "buckets": buckets,
        "masters": 4.0 * trained / processes,
        "optimizer": state / processes,
        "average": average / processes,
    }


def _bucket_bytes(zero: dict[str, Any], width: int, trained: int, on_cpu: bool) -> float:
    """What DeepSpeed collects gradients in before it reduces them."""
    whole, elements = zero["stage"] == 1, int(zero.get("reduce_bucket_size", _DEEPSPEEDS_BUCKET))
    filled = min(elements, trained)
    buckets = (2 if zero.get("overlap_comm") else 1) * (4 if whole else width) * (filled if on_cpu else elements)
    sent = 4.0 * filled if width == 2 and not whole else 0.0  # the bucket in fp32, as it is summed over processes
    return buckets + sent


def _engine(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "no ZeRO, bf16 autocast over fp32 weights"
    precision = "bf16" if settings.get("bf16", {}).get("enabled") else "fp32"
    return f"DeepSpeed ZeRO stage {settings['zero_optimization']['stage']} in {precision}"


@dataclass
class Pace:
    """Seconds of one micro-batch on the device, after a warm-up."""

    training_s: float
    """Augmentation, forward and backward."""
    forward_s: float
    """Forward as in validation."""
    curvature_s: float
    """One curvature estimate; 0 without Sophia."""
    views: int
    """Views of each of its photos."""
    peak_gib: float
    """Largest memory of a GPU during it; 0 on a CPU."""

    def run_s(self, config: Config, data: Data, processes: int) -> float:
        """Seconds of the whole run, validations included."""
        training = data.steps * accumulation(config, processes) * self.training_s
        curvature = math.ceil(data.steps / config.optimizer.hessian_every) * self.curvature_s
        validations = (data.steps - 1) // data.validate_every + 1
        batches = math.ceil(len(data.val) / processes) / config.training.micro_batch
        return training + curvature + validations * batches * self.forward_s


def _time(config: Config, data: Data, made: Made, settings: dict[str, Any] | None, on_cpu: bool) -> list[str]:
    """The lines about time, and about a GPU's memory."""
    parameters = sum(p.numel() for p in made.model.parameters())
    if on_cpu and parameters > MOST_ON_CPU:
        return [
            f"expected time: not measured, {parameters:,} parameters on a CPU take too long (more than {MOST_ON_CPU:,}); "
            "ask on a machine with a GPU"
        ]
    device = torch.device("cpu" if on_cpu else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    name = "CPU" if on_cpu else torch.cuda.get_device_name(device)
    try:
        pace = measure(config, data, made, settings, device)
    except torch.OutOfMemoryError:
        return [
            f"expected time: not measured, a micro-batch of {config.training.micro_batch} photos with "
            f"{int(data.train.num_views.max())} views does not fit into the {name}; lower training.micro_batch, or set "
            "model.activation_checkpointing"
        ]
    expected = timedelta(seconds=round(pace.run_s(config, data, launched_world_size())))
    return [
        f"expected time: {expected} (h:mm:ss), estimated from a micro-batch measured on this machine ({name}, one process "
        f"alone): {config.training.micro_batch} photos with {pace.views} views, {pace.training_s:.3g} s forward and "
        f"backward, {pace.forward_s:.3g} s in validation; loading, communication and optimizer steps come on top",
        *(
            []
            if on_cpu
            else [f"peak memory of that micro-batch: {pace.peak_gib:.2f} GiB, weights and gradients included"]
        ),
    ]


def measure(config: Config, data: Data, made: Made, settings: dict[str, Any] | None, device: torch.device) -> Pace:
    """Time a micro-batch of the training photos that have the most views, as the engine would compute it.

    The model is changed (moved, perhaps cast to bf16); its weights are not trained.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    micro = config.training.micro_batch
    widest = np.argsort(-np.asarray(data.train.num_views), kind="stable")
    loader = EvalLoader(
        data.train, batch=micro, workers=0, indices=np.resize(widest[:micro], micro), bad_sample_budget=1.0
    )
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        work = _Work(config, data, made, settings, device, next(iter(loader)))
        return Pace(
            training_s=_seconds(work.train, device),
            forward_s=_seconds(work.validate, device),
            curvature_s=_seconds(work.curvature, device) if config.optimizer.name != "adamw" else 0.0,
            views=work.batch.views.shape[1],
            peak_gib=memory_gib(device) if device.type == "cuda" else 0.0,
        )
    finally:
        loader.close()


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median of three runs after one that warms up; that one itself where it is slow."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    first = once()
    return first if first > SLOW_S else statistics.median(once() for _ in range(3))


class _Work:
    """One micro-batch and what training and validation do with it."""

    def __init__(
        self,
        config: Config,
        data: Data,
        made: Made,
        settings: dict[str, Any] | None,
        device: torch.device,
        batch: Batch,
    ) -> None:
        self.config, self.device, self.host, self.batch = config, device, batch, batch.to(device)
        self.model = made.model.to(device)
        if settings is not None and settings.get("bf16", {}).get("enabled"):
            self.model.to(torch.bfloat16)
        if config.model.compile:
            self.model.compile_blocks()
        self.autocast = settings is None
        self.parameters: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        self.augment, self.loss = Augment(config.augment), TotalLoss(config.loss)
        self.counts = data.counts(accumulation(config, launched_world_size()) * launched_world_size()).of(0)

    def _loss(self) -> Tensor:
        host, batch = self.host, self.batch
        pixels = batch.views.float() / 255
        views, masks = self.augment(pixels, host.position, host.epoch, self.config.seed, batch.masks, batch.view_mask)
        targets = Targets(batch.label, batch.weather, masks, batch.masks_valid, batch.weight, self.counts)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            outputs = self.model(views, host.view_mask, batch.metadata, batch.boxes)
        loss: Tensor = self.loss(outputs, targets)[0]
        return loss

    def train(self) -> None:
        """Augmentation, forward, backward."""
        self._loss().backward()

    def curvature(self) -> None:
        """Sophia-G: one more backward pass, of sampled labels; Sophia-H: the Hessian's diagonal."""
        if self.config.optimizer.name == "sophia_h":
            hessian_diagonal(self.parameters, self._loss)
        else:
            torch.autograd.grad(self._loss(), self.parameters, allow_unused=True)

    @torch.no_grad()
    def validate(self) -> None:
        """Forward without masks and gradients."""
        self.model.eval()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            self.model(self.batch.views, self.host.view_mask, self.batch.metadata, self.batch.boxes, segmentation=False)
        self.model.train()


def _check_disk(config: Config, trained: int, frozen: int) -> None:
    """Say what checkpoints and models take. Raises UserError where the disk has less."""
    folder = Path(config.run.dir)
    parent = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    copies = (
        1 + STATES[config.optimizer.name] + bool(config.training.ema_decay)
    )  # the masters and what is of their shape
    needed = (config.checkpoint.keep_last + 1) * 4 * copies * trained + 8 * (trained + frozen)
    _say(f"disk: {needed / GIB:.2f} GiB for checkpoints and models, {free / GIB:.1f} GiB free at {parent}")
    if needed > free:
        raise UserError(
            f"{parent} has {free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB are needed; give another --run.dir"
        )


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
