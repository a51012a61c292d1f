"""Loaders: the slices of the stream that one rank reads, decoded ahead by processes of its own.

Which photos a step holds is decided by `EndlessOrder` alone; ranks, micro-batches and workers only slice it. Hand these
loaders to nobody who shards again (`accelerator.prepare` would).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from roadwork.data.batch import Batch, assemble
from roadwork.data.index import ShardIndex
from roadwork.data.order import EndlessOrder
from roadwork.data.pool import HELD, DecodePool, Job
from roadwork.data.slots import TASK, SlotLayout
from roadwork.errors import UserError

Ints = npt.NDArray[np.int64]

SHARED_BYTES = 2 << 30
"""Upper bound of the memory that one loader shares with its processes (never less than one batch ahead)."""
BUDGET_BASE = 10_000
"""Draws over which the budget of unreadable photos is judged at least (or all photos, where there are fewer)."""


@dataclass(frozen=True)
class _Plan:
    """Which photos a batch holds, before their pixels are there."""

    rows: Ints
    positions: Ints
    epochs: Ints
    there: npt.NDArray[np.bool_]


class _Loader:
    """What both loaders share: decode the batches of a sequence of plans ahead of their use."""

    def __init__(
        self, index: ShardIndex, *, batch: int, workers: int, prefetch: int, load_masks: bool, load_text: bool,
        bad_sample_budget: float | None,
    ) -> None:  # fmt: skip
        if workers < 0 or prefetch < 1 or batch < 1:
            raise UserError(f"data.workers is {workers}, data.prefetch {prefetch}; at least 0 and 1 are needed")
        self.index, self.batch_size, self.workers = index, batch, workers
        self.budget = bad_sample_budget
        self.drawn = 0
        """Photos drawn so far by this loader."""
        self.unreadable: dict[str, str] = {}
        """Id -> reason of every photo that this loader could not read."""
        self._masks = load_masks and bool(index.masks_valid.any())
        self._text = load_text
        self._prefetch = prefetch
        self._pools: list[DecodePool] = []

    def _iterate(self, plans: Iterator[_Plan]) -> Iterator[Batch]:
        most = int(self.index.num_views.max(initial=1))
        layout = SlotLayout(self.batch_size, most, self.index.view_size, self.index.mask_size, self._masks, self._text)
        fits = SHARED_BYTES // layout.slot_bytes - HELD
        ahead = max(1, min(self._prefetch * self.workers, fits)) if self.workers else 1
        pin = torch.cuda.is_available() and torch.cuda.is_initialized()
        pool = DecodePool(self.index.paths, layout, workers=self.workers, ahead=ahead, pin=pin, cache=self.index.cache)
        self._pools.append(pool)
        queue: deque[tuple[_Plan, Job]] = deque()
        try:
            while pool in self._pools:
                started = time.perf_counter()
                while pool.room and (plan := next(plans, None)) is not None:
                    queue.append((plan, self._submit(pool, plan)))
                if not queue:
                    return
                plan, job = queue.popleft()
                pixels, failed, lease = pool.result(job)
                count = len(plan.rows)
                pixels = {name: tensor[:count] for name, tensor in pixels.items()}
                faults = job.faults
                if faults:
                    plan = self._without_photos(plan, faults, pixels)
                batch = assemble(self.index, plan.rows, plan.positions, plan.epochs, plan.there, pixels, failed)
                batch.lease, batch.wait_s, batch.faults = lease, time.perf_counter() - started, faults
                del pixels, job
                self._count(batch, int(plan.there.sum()))
                yield batch
                del batch, lease
        finally:
            self._drop(pool)

    def _submit(self, pool: DecodePool, plan: _Plan) -> Job:
        index, rows = self.index, plan.rows
        tasks = np.zeros(len(rows), dtype=TASK)
        tasks["row"] = np.arange(len(rows))
        tasks["shard"] = index.shard[rows]
        tasks["crc"] = index.views_crc[rows]
        tasks["num_views"] = np.where(plan.there, index.num_views[rows], 0)
        for member in ("views", "masks", "meta"):
            tasks[f"{member}_offset"] = getattr(index, f"{member}_offset")[rows]
            tasks[f"{member}_size"] = getattr(index, f"{member}_size")[rows]
        return pool.submit(tasks, max(int(tasks["num_views"].max()), 1), index.names(rows))

    def _without_photos(self, plan: _Plan, faults: list[str], pixels: dict[str, torch.Tensor]) -> _Plan:
        """The batch of a shard that cannot be read, as if it lay past the end. UserError where nobody else judges."""
        if self.budget is not None:
            raise UserError(faults[0])
        for tensor in pixels.values():
            tensor.zero_()
        return replace(plan, there=np.zeros_like(plan.there))

    def _count(self, batch: Batch, drawn: int) -> None:
        """Stop where more different photos are unreadable than the budget allows; one is always allowed."""
        self.drawn += drawn
        self.unreadable.update(batch.skipped)
        if self.budget is None:
            return
        seen = min(max(self.drawn, BUDGET_BASE), len(self.index))
        allowed = max(self.budget * seen, 1.0 if self.budget > 0 else 0.0)
        if len(self.unreadable) > allowed:
            named = "; ".join(f"{name}: {reason}" for name, reason in list(self.unreadable.items())[:5])
            raise UserError(
                f"{len(self.unreadable)} photos of {self.index.folder} cannot be read, "
                f"more than data.bad_sample_budget {self.budget:g} allows ({named}); "
                f"run `python -m shards.verify {self.index.folder}` and build again"
            )

    def close(self) -> None:
        """End the loader's processes. A later iteration starts new ones."""
        for pool in list(self._pools):
            self._drop(pool)

    def _drop(self, pool: DecodePool) -> None:
        if pool in self._pools:
            self._pools.remove(pool)
            pool.close()


class TrainLoader(_Loader):
    """Micro-batches of one rank, in order.

    Step t, micro-batch m of rank r holds positions t * G + m * (world * micro) + r * micro + [0, micro) of the stream,
    G = `global_batch`. Any number of workers gives the same batches; starting at `start_step` gives what an
    uninterrupted iteration would give from there.

    Args:
        index, order: the split and its stream; `len(order)` draws make an epoch.
        global_batch: photos per optimizer step over all ranks, a multiple of world_size * micro_batch.
        workers: decoding processes; 0 decodes in this process.
        prefetch: micro-batches ahead per worker (within SHARED_BYTES).
        end_position: iteration ends with the step that holds the last position before it; photos behind it weigh 0.
            None: endless.
        bad_sample_budget: share of photos that may be unreadable before a UserError names them; a shard that cannot be
            read is a UserError at once, whatever the share. None: the caller judges both by the batches' `skipped` and
            `faults`.
        load_text: deliver the JSON's `text` (384 numbers) as metadata["text"].
    """

    def __init__(
        self,
        index: ShardIndex,
        order: EndlessOrder,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        start_step: int = 0,
        end_position: int | None = None,
        bad_sample_budget: float | None = 0.001,
        load_masks: bool = True,
        load_text: bool = False,
    ) -> None:
        super().__init__(
            index, batch=micro_batch, workers=workers, prefetch=prefetch, load_masks=load_masks, load_text=load_text,
            bad_sample_budget=bad_sample_budget,
        )  # fmt: skip
        if not 0 <= rank < world_size or global_batch < 1 or global_batch % (world_size * micro_batch):
            raise UserError(
                f"global_batch {global_batch} is not a multiple of {world_size} processes x micro_batch {micro_batch}; "
                f"change one of them"
            )
        if len(order) != len(index):
            raise ValueError(f"the order draws from {len(order)} samples, the index has {len(index)}")
        self.order = order
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.start_step, self.end_position = start_step, end_position

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.global_batch // (self.world_size * self.micro_batch)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(self._plans())

    def _plans(self) -> Iterator[_Plan]:
        step = self.start_step
        while self.end_position is None or step * self.global_batch < self.end_position:
            for micro in range(self.accumulation):
                first = step * self.global_batch + (micro * self.world_size + self.rank) * self.micro_batch
                positions = np.arange(first, first + self.micro_batch, dtype=np.int64)
                there = np.ones(self.micro_batch, dtype=bool)
                if self.end_position is not None:
                    there = positions < self.end_position
                yield _Plan(self.order.at(positions), positions, self.order.epoch_of(positions), there)
            step += 1


class EvalLoader(_Loader):
    """Batches of `indices[rank::world_size]` in that order, each sample once; the last batch may be smaller.

    Args:
        indices: rows of the index, int [N]; default all.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        batch: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 2,
        prefetch: int = 4,
        indices: Sequence[int] | Ints | None = None,
        bad_sample_budget: float | None = 0.001,
        load_masks: bool = True,
        load_text: bool = False,
    ) -> None:
        super().__init__(
            index, batch=batch, workers=workers, prefetch=prefetch, load_masks=load_masks, load_text=load_text,
            bad_sample_budget=bad_sample_budget,
        )  # fmt: skip
        chosen = np.arange(len(index)) if indices is None else np.asarray(indices, dtype=np.int64)
        if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(index):
            raise IndexError(f"samples {chosen.min()}..{chosen.max()} leave the index of {len(index)}")
        self.indices: Ints = chosen[rank::world_size].astype(np.int64)

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(self._plans())

    def _plans(self) -> Iterator[_Plan]:
        for first in range(0, len(self.indices), self.batch_size):
            rows = self.indices[first : first + self.batch_size]
            yield _Plan(rows, rows, np.zeros(len(rows), dtype=np.int64), np.ones(len(rows), dtype=bool))
