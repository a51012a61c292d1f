"""Checkpoints that know no world size, are complete or absent, and are written behind the training loop's back.

A checkpoint is `step-NNNNNNNN/` with whole fp32 tensors by parameter name (masters, moments, average, curvature), the
counters as JSON, and `COMPLETE`, written last, which holds the sha256 of every file. Rank 0 writes; every rank takes part
in gathering one tensor at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from roadwork.engine import Engine
from roadwork.errors import UserError
from roadwork.training.atomic import sync, write_atomic
from roadwork.training.ema import Average
from roadwork.training.masters import Masters

log = logging.getLogger(__name__)
MARKER = "COMPLETE"
SCALAR_STATE = "step"


class Checkpointer:
    """Saves, finds, loads and retires the checkpoints of one run folder.

    Args:
        engine: the running engine.
        folder: `RUN/checkpoints`.
        keep_last: complete checkpoints that are kept.
        keep_every: checkpoints of steps that this divides are kept for good; 0: none.
    """

    def __init__(self, engine: Engine, folder: Path, keep_last: int, keep_every: int = 0) -> None:
        self.engine = engine
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, masters: Masters, average: Average | None, counters: dict[str, Any]) -> None:
        """Gather now, write in the background. Collective. A write that failed earlier is logged here, on rank 0."""
        tensors = gather_training_state(masters, average)
        self.wait()
        if not self.engine.is_main:
            return
        counters = {**counters, "step": step}
        self._pending = self._writer.submit(self._write, step, tensors, counters)

    @property
    def writing(self) -> bool:
        """Whether this process still writes a checkpoint in the background."""
        return self._pending is not None and not self._pending.done()

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of a step is complete; one in flight is waited for. Collective."""
        self.wait()
        return bool(self.engine.broadcast_object((self.folder / f"step-{step:08d}" / MARKER).is_file()))

    def wait(self) -> bool:
        """Block until the checkpoint in flight is COMPLETE; False where it could not be written (a full disk)."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        try:
            pending.result()
        except (OSError, SafetensorError) as error:  # safetensors wraps the system's error in its own
            log.error("checkpoint not written: %s; the ones before are intact", error)
            return False
        return True

    def _write(self, step: int, tensors: dict[str, dict[str, Tensor]], counters: dict[str, Any]) -> None:
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{final.name}-{os.getpid()}"
        aside = self.folder / f".writing-old-{final.name}-{os.getpid()}"
        try:
            temporary.mkdir(parents=True)
            for name, part in tensors.items():
                save_file(part, temporary / f"{name}.safetensors")
            (temporary / "counters.json").write_text(json.dumps(counters, indent=1))
            marker = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
            for path in temporary.iterdir():
                sync(path)
            if final.exists():
                final.rename(aside)
            temporary.rename(final)
            write_atomic(final / MARKER, json.dumps(marker, indent=1))
            sync(self.folder)
        finally:
            _put_back(aside, final)
            for left in (temporary, aside):
                shutil.rmtree(left, ignore_errors=True)
        self._retire()

    def _retire(self) -> None:
        complete = complete_checkpoints(self.folder)
        for path in complete[: -self.keep_last]:
            if self.keep_every and int(path.name.removeprefix("step-")) % self.keep_every == 0:
                continue
            (path / MARKER).unlink(missing_ok=True)  # first, so that a kill here leaves an absent one, not a torn one
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Path | None:
        """The newest undamaged checkpoint, agreed on by all ranks; a damaged one is named and passed over."""
        found: Path | None = None
        if self.engine.is_main:
            for path in reversed(complete_checkpoints(self.folder)):
                fault = damage(path)
                if fault is None:
                    found = path
                    break
                log.error("checkpoint %s is damaged (%s): the one before is used", path.name, fault)
                with suppress(OSError):  # neither counted nor found again; the next launch removes it
                    (path / MARKER).rename(path / "DAMAGED")
        return self.engine.broadcast_object(found)

    def clean(self) -> None:
        """Remove what a killed run left half-written. Rank 0, after the run folder is locked."""
        if not self.folder.is_dir():
            return
        for aside in sorted(self.folder.glob(".writing-old-step-*")):
            _put_back(aside, self.folder / aside.name.removeprefix(".writing-old-").rpartition("-")[0])
        for path in self.folder.iterdir():
            if path.name.startswith(".writing-") or (path.name.startswith("step-") and not (path / MARKER).is_file()):
                shutil.rmtree(path, ignore_errors=True)


def _put_back(aside: Path, final: Path) -> None:
    """Let a complete checkpoint that was moved aside stand again where its successor did not become complete."""
    if (aside / MARKER).is_file() and not (final / MARKER).is_file():
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)


def gather_training_state(masters: Masters, average: Average | None) -> dict[str, dict[str, Tensor]]:
    """Whole tensors on rank 0's CPU by file and parameter name; empty elsewhere. Collective.

    fp32, shaped like the parameters; `scalars` alone holds the optimizer's count of steps, [1].
    """
    states = masters.states()
    mine = sorted({key for state in states for key in state if key != SCALAR_STATE})
    keys = sorted(set(masters.engine.gather_object(mine)))
    sources: dict[str, list[Tensor]] = {"master": masters.flats()}
    for key in keys:
        # A plain optimizer has no state yet for a parameter that never got a gradient.
        sources[key] = [
            state[key] if key in state else torch.zeros_like(flat)
            for state, flat in zip(states, masters.flats(), strict=True)
        ]
    if average is not None:
        sources["average"] = average.flats
    made: dict[str, dict[str, Tensor]] = {}
    for file, flats in sources.items():
        made[file] = {}
        for name, whole in masters.gather(flats):
            if masters.engine.is_main:
                made[file][name] = whole.detach().to("cpu", copy=True).contiguous()
    counts = [float(state[SCALAR_STATE]) for state in states if SCALAR_STATE in state]
    if counts:
        made["scalars"] = {SCALAR_STATE: torch.tensor([max(counts)])}
    return made if masters.engine.is_main else {}


def load_training_state(path: Path, masters: Masters, average: Average | None) -> dict[str, Any]:
    """Set masters, optimizer state and average from a checkpoint of any world size; returns the counters.

    Raises:
        UserError: the checkpoint is of another architecture.
    """
    counters: dict[str, Any] = json.loads((path / "counters.json").read_text())
    flats = masters.flats()
    _scatter_file(path / "master.safetensors", masters, flats)
    keys = [f.stem for f in path.glob("*.safetensors") if f.stem not in ("master", "average", "scalars")]
    if keys:
        step = _read_scalars(path)
        for flat in flats:
            state = masters.optimizer.state[flat]
            if step is not None:
                # Fused kernels want the counter on the device of the parameter, the others on the CPU.
                device = flat.device if masters.groups()[0].get("fused") else torch.device("cpu")
                state[SCALAR_STATE] = torch.full((), step, dtype=torch.float32, device=device)
            for key in keys:
                state[key] = torch.zeros_like(flat)
        for key in keys:
            _scatter_file(path / f"{key}.safetensors", masters, [masters.optimizer.state[flat][key] for flat in flats])
    if average is not None and (path / "average.safetensors").is_file():
        _scatter_file(path / "average.safetensors", masters, average.flats)
        average.updates = int(counters.get("average_updates", 0))
    masters.publish()
    return counters


def _scatter_file(path: Path, masters: Masters, flats: list[Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        differing = sorted(stored ^ set(masters.parameters))
        if differing:
            raise UserError(
                f"{path.parent} is of another model: {len(differing)} parameters differ, such as {differing[0]}; "
                "give the options that it was trained with, or another --run.dir"
            )
        for name in masters.parameters:
            whole = file.get_tensor(name)
            if whole.shape != masters.parameters[name].shape:
                raise UserError(
                    f"{path.parent} is of another model: {name} is {tuple(whole.shape)} there and "
                    f"{tuple(masters.parameters[name].shape)} here; give the options that it was trained with"
                )
            masters.scatter(name, flats, whole)


def _read_scalars(path: Path) -> float | None:
    """The step of the optimizer's state; None: it keeps none there."""
    if not (path / "scalars.safetensors").is_file():
        return None
    with safe_open(path / "scalars.safetensors", framework="pt") as file:
        return float(file.get_tensor(SCALAR_STATE)[0])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.glob("step-*") if (path / MARKER).is_file())


def reached_end(folder: Path) -> bool:
    """Whether the newest complete checkpoint of a folder is that of the run's end."""
    newest = complete_checkpoints(folder)[-1:]
    return any(json.loads((path / "counters.json").read_text())["finished"] for path in newest)


def damage(path: Path) -> str | None:
    """What is wrong with a complete checkpoint, or None."""
    try:
        marker = json.loads((path / MARKER).read_text())
        for name, digest in marker.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if _sha256(path / name) != digest:
                return f"{name} does not have its sha256"
    except (ValueError, AttributeError):
        return f"{MARKER} is not readable"
    except OSError as error:
        return f"{error.strerror}: {error.filename}"
    return None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
