"""Every member's answer to every augmentation of every photo, sharded by position over the processes."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from roadwork.config import Config
from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.engine import Engine
from roadwork.errors import UserError
from roadwork.inference.members import Members
from roadwork.inference.ood import TrainingDistribution
from roadwork.inference.parts import PartWriter, Record, merge, open_parts, part_paths, read_parts
from roadwork.inference.single_view import single_view_log_odds
from roadwork.inference.transforms import Transform
from roadwork.monitoring.progress import Progress

logger = logging.getLogger(__name__)


@dataclass
class Answers:
    """Answers for one split, photos in the index's order.

    log_odds float64 [N,A,M] (augmentations, members); image_only float64 [N,M] (the photo itself, no metadata);
    single_view float64 [N,M] (one centred 224 px view, see `single_view`), or None where that was not asked for;
    distances float64 [N,A,depths + 1] in units of the training threshold, or None with one augmentation;
    readable bool [N]: false where the photo could not be decoded (its log-odds are 0).
    """

    ids: list[str]
    labels: np.ndarray
    groups: np.ndarray
    log_odds: np.ndarray
    image_only: np.ndarray
    single_view: np.ndarray | None
    distances: np.ndarray | None
    readable: np.ndarray

    def rows(self, keep: np.ndarray) -> Answers:
        """Some of the photos (bool or integer index)."""
        chosen = np.arange(len(self.ids))[keep]
        return Answers(
            [self.ids[row] for row in chosen],
            self.labels[chosen],
            self.groups[chosen],
            self.log_odds[chosen],
            self.image_only[chosen],
            None if self.single_view is None else self.single_view[chosen],
            None if self.distances is None else self.distances[chosen],
            self.readable[chosen],
        )


def as_float(batch: Batch) -> Tensor:
    """float32 [B,V,3,S,S] in [0,1]."""
    return batch.views.float().div_(255.0)


@torch.inference_mode()
def answer_batch(
    members: Members,
    batch: Batch,
    transforms: list[Transform],
    distribution: TrainingDistribution | None,
    image_only: bool,
) -> list[Record]:
    """Records of one batch (already on the device).

    The encoder sees one augmentation at a time, which bounds the memory; the few tokens that it leaves of each are then
    decided on together.
    """
    views = as_float(batch)
    metadata = None if image_only else batch.metadata
    each = [members.encode(t(views, batch.view_mask), batch.view_mask, batch.boxes) for t in transforms]
    log_odds, output = members.decide(members.join(each), _repeated(metadata, len(transforms)))
    photos = len(batch.ids)
    values = log_odds.reshape(len(transforms), photos, -1).transpose(0, 1).cpu().numpy()
    alone = values[:, 0] if image_only else members.decide(each[0], None)[0].cpu().numpy()
    distances = None
    if distribution is not None:
        found = distribution.distances(depths_of(output))
        distances = found.reshape(len(transforms), photos, -1).transpose(1, 0, 2)
    records = []
    for row, name in enumerate(batch.ids):
        readable = float(batch.weight[row] > 0)
        record: Record = {
            "id": name,
            "readable": bool(readable),
            "log_odds": (values[row] * readable).tolist(),
            "image_only": (alone[row] * readable).tolist(),
        }
        if distances is not None:
            record["distances"] = distances[row].tolist()
        records.append(record)
    return records


def judged(index: ShardIndex) -> bool:
    """Whether a split is the one that systems are judged on, so that the single view is asked about as well."""
    return index.split == "val"


def add_single_view(
    records: list[Record], members: Members, index: ShardIndex, batch: Batch, device: torch.device
) -> None:
    """Each photo's log-odds [M] on one centred 224 px view, from its batch on the CPU."""
    values = single_view_log_odds(members, index, batch, device).cpu().numpy()
    for record, value in zip(records, values, strict=True):
        record["single_view"] = (value * record["readable"]).tolist()


def _repeated(metadata: dict[str, Tensor] | None, times: int) -> dict[str, Tensor] | None:
    """The photos' metadata once per augmentation."""
    if metadata is None or times == 1:
        return metadata
    return {name: torch.cat([value] * times) for name, value in metadata.items()}


def depths_of(output: Any) -> tuple[np.ndarray, ...]:
    """Features at three depths as float64 [B,D] each."""
    return tuple(depth.double().cpu().numpy() for depth in output.depth_features)


@torch.inference_mode()
def plain_features(members: Members, batch: Batch, image_only: bool) -> tuple[np.ndarray, ...]:
    """The pre-trained member's features at three depths, float64 [B,D] each, of un-augmented photos on its device."""
    encoded = members.model.encode(as_float(batch), batch.view_mask, batch.boxes, segmentation=False)
    return depths_of(members.model.decide(encoded, None if image_only else batch.metadata, segmentation=False))


def feature_rows(number: int, most: int, seed: int) -> np.ndarray:
    """Rows, ascending [min(number, most)], of the training photos that describe the training distribution: all, or
    `most` of them by the seed.
    """
    if number <= most:
        return np.arange(number)
    return np.sort(np.random.default_rng([seed, 0xFEA7]).permutation(number)[:most])


@torch.inference_mode()
def training_distribution(
    members: Members, index: ShardIndex, config: Config, engine: Engine
) -> TrainingDistribution | None:
    """Statistics of un-augmented training features, each process computing its share.

    Rows are gathered and put in the index's order before anything is added up, so the statistics are the same bits
    for any number of processes. Collective. UserError for fewer than two readable photos.
    """
    rows = feature_rows(len(index), config.predict.max_train_features, config.seed)
    mine: list[tuple[int, tuple[np.ndarray, ...]]] = []
    for batch in _batches(members, index, rows, config, engine, "training features"):
        depths = plain_features(members, batch.to(engine.device), config.predict.image_only)
        mine += [
            (int(batch.sample[row]), tuple(depth[row] for depth in depths))
            for row in range(len(batch.ids))
            if batch.weight[row] > 0
        ]
    everyone = sorted(engine.gather_object(mine), key=lambda pair: pair[0])
    if len(everyone) < 2:
        raise UserError(f"FOODS needs at least 2 readable training photos, found {len(everyone)}; set predict.tta off")
    stacked = [np.stack([features[depth] for _, features in everyone]) for depth in range(len(everyone[0][1]))]
    return TrainingDistribution.fit(tuple(stacked), config.predict.neighbours)


def _batches(
    members: Members, index: ShardIndex, rows: np.ndarray, config: Config, engine: Engine, what: str
) -> Iterator[Batch]:
    """This process's batches of the rows, on the CPU; `what` they are for is the name of the progress line."""
    if len(rows[engine.rank :: engine.world_size]) == 0:
        return
    loader = EvalLoader(
        index,
        batch=config.predict.batch,
        rank=engine.rank,
        world_size=engine.world_size,
        workers=config.data.workers,
        indices=rows,
        bad_sample_budget=config.data.bad_sample_budget,
        load_masks=False,
        load_text=members.model.config.reads_text,
    )
    console = engine.is_main and config.monitoring.console
    try:
        with Progress(f"predict: {what}", len(rows), enabled=console) as progress:
            for batch in loader:
                yield batch
                progress.advance(len(batch.ids) * engine.world_size)
    finally:
        loader.close()


def collect(
    members: Members,
    index: ShardIndex,
    transforms: list[Transform],
    distribution: TrainingDistribution | None,
    config: Config,
    engine: Engine,
) -> Answers:
    """Answers for a whole split on every process; continues from the part files of an interrupted run."""
    name = f"{index.split}-{len(transforms)}"
    folder = Path(config.run.dir) / "predict" / name
    ids = [str(photo) for photo in index.id]
    stamp = fingerprint(members, index, transforms, distribution, config)
    if engine.is_main:
        earlier = len(part_paths(folder, name))
        kept = open_parts(folder, stamp)
        if earlier and kept:
            logger.info("%s: part files of an earlier run are kept", name)
        elif earlier:
            logger.warning("%s: %d part files discarded: of other weights, shards or options", folder, earlier)
    engine.barrier()
    done = read_parts(folder, name)
    rows = np.array([row for row, photo in enumerate(ids) if photo not in done], dtype=np.int64)
    engine.barrier()  # nobody appends before everybody has read
    if len(rows):
        with PartWriter(folder, name, engine.rank) as writer:
            for batch in _batches(members, index, rows, config, engine, f"split {index.split}"):
                records = answer_batch(
                    members, batch.to(engine.device), transforms, distribution, config.predict.image_only
                )
                if judged(index):
                    add_single_view(records, members, index, batch, engine.device)
                writer.append(records)
    engine.barrier()
    merged = merge(read_parts(folder, name), ids, f"split {index.split}")
    return _answers(merged, index)


def _answers(records: list[Record], index: ShardIndex) -> Answers:
    labels = np.asarray(index.label).astype(np.int64)

    def given(name: str) -> np.ndarray | None:
        there = bool(records) and name in records[0]
        return np.array([record[name] for record in records], np.float64) if there else None

    return Answers(
        ids=[record["id"] for record in records],
        labels=labels,
        groups=np.asarray(index.group),
        log_odds=np.array([record["log_odds"] for record in records], np.float64),
        image_only=np.array([record["image_only"] for record in records], np.float64),
        single_view=given("single_view"),
        distances=given("distances"),
        readable=np.array([record["readable"] for record in records], bool),
    )


def fingerprint(
    members: Members,
    index: ShardIndex,
    transforms: list[Transform],
    distribution: TrainingDistribution | None,
    config: Config,
) -> str:
    """Everything that a photo's record depends on: results of other weights, shards or options are not continued."""
    content = [
        members.digests,
        members.names,
        [shard.sha256 for shard in index.shards],
        [repr(transform) for transform in transforms],
        None if distribution is None else [distribution.digest, config.predict.neighbours],
        config.predict.image_only,
        judged(index),
    ]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
