"""What lies before the first adapted layer, computed once per photo and fixed augmented copy and shared by all folds.

Every process encodes its share of fixed chunks of photos and renames each into place; then all processes map all
chunks. A chunk that is already there (an earlier launch, whatever its number of processes) is not computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from roadwork.config import Config
from roadwork.data.augment import Augment
from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.models.detector import RoadworkDetector
from roadwork.models.outputs import Encoded, Partial
from roadwork.monitoring.progress import Progress

CHUNK = 64
"""Photos per chunk, at least; at most about a thousand chunks are made."""
METADATA = "metadata."
READABLE = "readable"
ARRAYS = 2
"""Number of the chunks' arrangement; chunks of another are made anew."""
SLOTS = ("tokens", "x", "view_mask", "kept", "boxes")
"""Arrays with one row per view that goes on; a photo's valid rows come first."""


@dataclass
class Prefix:
    """A batch as the adapted part of the model takes it.

    readable: bool [B] on the device; false for photos that could not be decoded, which are black.
    """

    encoded: Encoded
    metadata: dict[str, torch.Tensor]
    positions: np.ndarray
    readable: torch.Tensor


class PrefixSource(Protocol):
    """Where folds get their batches from: the cache, or the encoder itself."""

    def batches(
        self, model: RoadworkDetector, positions: np.ndarray, copies: np.ndarray, batch: int
    ) -> Iterator[Prefix]:
        """Batches of photos (positions [N] in the fold stage's list of rows) in the order given; copy k of each, by
        copies [N]."""
        ...


def photo_key(photo_id: str) -> int:
    """Augmentation key of a photo: 62 bits of BLAKE2b of its id, so that it depends on nothing else."""
    return int.from_bytes(hashlib.blake2b(photo_id.encode(), digest_size=8).digest(), "little") >> 2


class FixedCopies:
    """Views of a batch with the fixed augmentation of each copy (copy 0 is the photo itself)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        scale = config.augment.probability_scale * config.folds.augment_scale
        self.augment = Augment(dataclasses.replace(config.augment, probability_scale=scale))
        self.enabled = config.augment.enabled
        self.seed = config.seed
        self.device = device

    def views(self, batch: Batch, copies: np.ndarray) -> torch.Tensor:
        """float32 [B,V,3,S,S] in [0,1] of a batch on the device; copies [B]."""
        views = batch.views.float().div_(255.0)
        rows = np.flatnonzero(copies > 0)
        if len(rows) == 0 or not self.enabled:
            return views
        which = torch.as_tensor(rows, device=views.device)
        key = torch.tensor([photo_key(batch.ids[row]) for row in rows], dtype=torch.int64)
        epoch = torch.as_tensor(copies[rows], dtype=torch.int64)
        changed, _ = self.augment(views[which], key, epoch, self.seed, view_mask=batch.view_mask[which])
        views[which] = changed
        return views


class LivePrefix:
    """Encodes every batch anew, with gradients: for adapters in the encoder's first unit, or a cache that grew too large."""

    def __init__(
        self, index: ShardIndex, rows: np.ndarray, fixed: FixedCopies, config: Config, with_gradients: bool = True
    ) -> None:
        self.index, self.rows, self.fixed, self.config = index, rows, fixed, config
        self.with_gradients = with_gradients

    def batches(
        self, model: RoadworkDetector, positions: np.ndarray, copies: np.ndarray, batch: int
    ) -> Iterator[Prefix]:
        """See PrefixSource: positions and copies [N]."""
        loader = _loader(self.index, self.rows[positions], model, self.config, batch)
        first = 0
        for loaded in loader:
            part = slice(first, first + len(loaded.ids))
            first = part.stop
            moved = loaded.to(self.fixed.device)
            views = self.fixed.views(moved, copies[part])
            with _frozen(model), torch.set_grad_enabled(self.with_gradients and torch.is_grad_enabled()):
                encoded = model.encode(views, moved.view_mask, moved.boxes, segmentation=False)
            yield Prefix(encoded, moved.metadata, positions[part], moved.weight > 0)


@contextmanager
def _frozen(model: RoadworkDetector) -> Iterator[None]:
    """Evaluation mode inside the block: the encoder is frozen but for its adapters: no dropout, no batch statistics."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


class PrefixCache:
    """What all folds share, memory-mapped: chunk folders with one array [photos, copies, ...] per tensor.

    Args:
        rows: rows of the index, the photos.
        copies: fixed augmented copies of each photo.
        unit: units of the backbone that come before the first adapted module; None: the whole encoder does.
    """

    def __init__(
        self, folder: Path, rows: np.ndarray, copies: int, device: torch.device, unit: int | None = None
    ) -> None:
        self.folder, self.rows, self.copies, self.device, self.unit = folder, rows, copies, device, unit
        self.chunk = max(CHUNK, -(-len(rows) // 1024))
        self.number = -(-len(rows) // self.chunk)
        self._maps: dict[int, dict[str, np.ndarray]] = {}

    def path(self, chunk: int) -> Path:
        """Folder of a chunk."""
        return self.folder / f"chunk-{chunk:05d}"

    @property
    def bytes(self) -> int:
        """Bytes of the arrays on the disk."""
        return sum(file.stat().st_size for file in self.folder.glob("chunk-*/*.npy"))

    def positions(self, chunk: int) -> np.ndarray:
        """Positions (in the list of rows) that a chunk holds."""
        return np.arange(chunk * self.chunk, min((chunk + 1) * self.chunk, len(self.rows)))

    def fill(
        self,
        model: RoadworkDetector,
        index: ShardIndex,
        fixed: FixedCopies,
        config: Config,
        rank: int,
        world_size: int,
    ) -> None:
        """Encode this process's missing chunks."""
        todo = [chunk for chunk in range(rank, self.number, world_size) if not self.path(chunk).is_dir()]
        if not todo:
            return
        wanted = np.concatenate([self.positions(chunk) for chunk in todo])
        loader = _loader(index, self.rows[wanted], model, config, config.predict.batch)
        waiting: list[dict[str, np.ndarray]] = []
        console = rank == 0 and config.monitoring.console
        with Progress("dora_folds: encode", len(wanted), enabled=console) as progress:
            for loaded in loader:
                waiting.extend(self._encode(model, fixed, loaded))
                progress.advance(len(loaded))
                while todo and len(waiting) >= len(self.positions(todo[0])):
                    size = len(self.positions(todo[0]))
                    self._write(todo.pop(0), waiting[:size])
                    del waiting[:size]

    @torch.inference_mode()
    def _encode(self, model: RoadworkDetector, fixed: FixedCopies, loaded: Batch) -> list[dict[str, np.ndarray]]:
        """Per photo: name -> array [copies, ...]."""
        moved = loaded.to(self.device)
        number = len(loaded)
        model.eval()
        same = {METADATA + name: value for name, value in moved.metadata.items()} | {READABLE: moved.weight > 0}
        each = []
        for copy in range(self.copies):
            tensors = self._shared(model, fixed.views(moved, np.full(number, copy)), moved) | same
            each.append({name: value.cpu().numpy() for name, value in tensors.items()})
        return [{name: np.stack([one[name][row] for one in each]) for name in each[0]} for row in range(number)]

    def _shared(self, model: RoadworkDetector, views: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        if self.unit is not None:
            return model.advance(model.begin(views, batch.view_mask, batch.boxes), self.unit).padded()
        encoded = model.encode(views, batch.view_mask, batch.boxes, segmentation=False)
        return {name: value for name, value in vars(encoded).items() if value is not None}

    def gib(self, model: RoadworkDetector, index: ShardIndex, fixed: FixedCopies, config: Config) -> float:
        """What the whole cache will take, by its first photo."""
        (photo,) = self._encode(model, fixed, next(iter(_loader(index, self.rows[:1], model, config, 1, workers=0))))
        return sum(value.nbytes for value in photo.values()) * len(self.rows) / 2**30

    def _write(self, chunk: int, photos: list[dict[str, np.ndarray]]) -> None:
        temporary = self.folder / f".{self.path(chunk).name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name in photos[0]:
            np.save(temporary / f"{name}.npy", _pad([photo[name] for photo in photos]))
        temporary.rename(self.path(chunk))

    def _map(self, chunk: int) -> dict[str, np.ndarray]:
        if chunk not in self._maps:
            files = sorted(self.path(chunk).glob("*.npy"))
            self._maps[chunk] = {file.stem: _mapped(file) for file in files}
        return self._maps[chunk]

    def batches(
        self, model: RoadworkDetector, positions: np.ndarray, copies: np.ndarray, batch: int
    ) -> Iterator[Prefix]:
        """See PrefixSource."""
        for first in range(0, len(positions), batch):
            part = slice(first, first + batch)
            yield self._batch(model, positions[part], copies[part])

    def _photo(self, position: int, copy: int) -> dict[str, np.ndarray]:
        """One copy of one photo without its chunk's padding: a batch is then padded as the encoder pads it."""
        arrays = {name: array[position % self.chunk, copy] for name, array in self._map(position // self.chunk).items()}
        slots = int(arrays["view_mask"].sum())
        return {name: value[:slots] if name in SLOTS else value for name, value in arrays.items()}

    def _batch(self, model: RoadworkDetector, positions: np.ndarray, copies: np.ndarray) -> Prefix:
        picked = [self._photo(position, copy) for position, copy in zip(positions, copies, strict=True)]
        tensors = {name: torch.from_numpy(_pad([one[name] for one in picked])).to(self.device) for name in picked[0]}
        readable = tensors.pop(READABLE)
        metadata = {name.removeprefix(METADATA): t for name, t in tensors.items() if name.startswith(METADATA)}
        fields = {name: value for name, value in tensors.items() if not name.startswith(METADATA)}
        if self.unit is None:
            return Prefix(Encoded(**fields), metadata, positions, readable)
        with _frozen(model):
            partial = Partial.restored(fields, self.unit, lambda x: model.backbone.state_of(x, model.view_size))
            return Prefix(model.complete(partial, segmentation=False), metadata, positions, readable)


def _loader(
    index: ShardIndex, rows: np.ndarray, model: RoadworkDetector, config: Config, batch: int, workers: int | None = None
) -> EvalLoader:
    return EvalLoader(
        index,
        batch=batch,
        workers=config.data.workers if workers is None else workers,
        indices=rows,
        bad_sample_budget=config.data.bad_sample_budget,
        load_masks=False,
        load_text=model.config.reads_text,
    )


def _mapped(path: Path) -> np.ndarray:
    """An array's file, mapped. numpy's own map keeps a descriptor for as long as it lives, and a process may not open as
    many files as a cache has; this one keeps none."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
        at = file.tell()
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    array = whole[at:].view(dtype).reshape(shape, order="F" if by_columns else "C")
    array.flags.writeable = False
    return array


def _pad(arrays: list[np.ndarray]) -> np.ndarray:
    """Stack, each axis padded with zeros (False) to the longest: photos differ in their number of views."""
    shape = tuple(np.max([array.shape for array in arrays], axis=0)) if arrays[0].ndim else ()
    if all(array.shape == shape for array in arrays):
        return np.stack(arrays)
    stacked = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for row, array in enumerate(arrays):
        stacked[row][tuple(slice(0, side) for side in array.shape)] = array
    return stacked


def open_cache(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Keep chunks made under `fingerprint`, remove others (one process calls this, before the others look)."""
    stamp = folder / "fingerprint.json"
    wanted = json.dumps(fingerprint, sort_keys=True)
    if not (stamp.is_file() and stamp.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(wanted)
