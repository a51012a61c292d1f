"""FOODS test-time augmentation: `python -m benchmarks.tta --run DIR --shards DIR`.

Photos per second batched (all augmentations and members over shared encodings) and one by one as the original sketch
does it (one photo, one augmentation, one member at a time), with the distances that FOODS filters by on both sides; the
same with the pre-trained member alone (`one_member_speedup`), where there is no encoding to share; and the agreement of
1, 2 and 3 shards.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from roadwork.config import Config
from roadwork.cpu_memory import keep_freed_memory
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.inference.collect import answer_batch, as_float, depths_of, plain_features
from roadwork.inference.members import Members, find_members, load_members
from roadwork.inference.ood import TrainingDistribution
from roadwork.inference.transforms import Transform, transforms
from roadwork.models.adapters import call_with


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/demo", help="run folder with best/ and folds/")
    parser.add_argument("--shards", default="runs/demo/shards")
    parser.add_argument("--split", default="test")
    parser.add_argument("--photos", type=int, default=24)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--augmentations", type=int, default=16)
    parser.add_argument("--train-photos", type=int, default=128, help="training photos that distances are taken to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    config = Config()
    config.run.dir, config.data.shards = options.run, options.shards
    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the engine of the stage does
    members = load_members(config, find_members(config), device)
    index = ShardIndex.open(options.shards, options.split)
    train = ShardIndex.open(options.shards, "train")
    distribution = fit(members, train, min(options.train_photos, len(train)), options.batch, device)
    figures = measure(members, distribution, index, options, device)
    if not options.json:
        for name, value in figures.items():
            print(f"{name:28} {value}")
    print(json.dumps(figures))


def fit(members: Members, train: ShardIndex, number: int, batch: int, device: torch.device) -> TrainingDistribution:
    """The distribution of the first training photos' features."""
    loader = EvalLoader(train, batch=batch, workers=0, indices=np.arange(number), load_masks=False)
    each = [plain_features(members, loaded.to(device), image_only=False) for loaded in loader]
    stacked = tuple(np.concatenate(depth) for depth in zip(*each, strict=True))
    return TrainingDistribution.fit(stacked, Config().predict.neighbours)


def measure(
    members: Members,
    distribution: TrainingDistribution,
    index: ShardIndex,
    options: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Photos per second and largest differences in log-odds and distances."""
    job = Job(members, distribution, index, transforms(options.augmentations, 0), options.batch, device)
    number = min(options.photos, len(index))
    few = max(1, number // 4)
    shards = {world: job.sharded(number, world) for world in (1, 2, 3)}
    batched, answers = shards[1]
    single, reference = job.one_by_one(few)
    alone = replace(job, members=only_pretrained(members))
    alone_batched, alone_single = alone.sharded(number, 1)[0] / number, alone.one_by_one(few)[0] / few
    return {
        "device": str(device),
        "members": len(members.names),
        "augmentations": len(job.listed),
        "batched_images_per_s": round(number / batched, 3),
        "one_by_one_images_per_s": round(few / single, 3),
        "speedup": round((number / batched) / (few / single), 2),
        "one_member_speedup": round(alone_single / alone_batched, 2),
        "batched_against_one_by_one": float(np.abs(answers[:few] - reference).max()),
        "shards_1_against_2": float(np.abs(answers - shards[2][1]).max()),
        "shards_1_against_3": float(np.abs(answers - shards[3][1]).max()),
    }


def only_pretrained(members: Members) -> Members:
    """The pre-trained network as the only member."""
    return replace(members, names=members.names[:1], overrides=members.overrides[:1], own_encoder=[False])


@dataclass(frozen=True)
class Job:
    """What is to be answered, and with what. Answers float64 [N, A, M + depths + 1]: log-odds, then distances."""

    members: Members
    distribution: TrainingDistribution
    index: ShardIndex
    listed: list[Transform]
    batch: int
    device: torch.device

    def sharded(self, number: int, world: int) -> tuple[float, np.ndarray]:
        """Seconds and answers in the index's order; the shards of `world` processes one after the other."""
        found: dict[str, Any] = {}
        started = time.perf_counter()
        for rank in range(world):
            loader = EvalLoader(
                self.index, batch=self.batch, rank=rank, world_size=world, workers=0, indices=np.arange(number),
                load_masks=False,
            )  # fmt: skip
            for loaded in loader:
                batch = loaded.to(self.device)
                for record in answer_batch(self.members, batch, self.listed, self.distribution, image_only=False):
                    found[record["id"]] = np.hstack([record["log_odds"], record["distances"]])
        spent = time.perf_counter() - started
        return spent, np.array([found[str(name)] for name in self.index.id[:number]])

    @torch.inference_mode()
    def one_by_one(self, number: int) -> tuple[float, np.ndarray]:
        """The sketch's loop: every photo, augmentation and member is a forward pass of its own."""
        model = self.members.model
        rows: list[list[list[float]]] = []
        started = time.perf_counter()
        for loaded in EvalLoader(self.index, batch=1, workers=0, indices=np.arange(number), load_masks=False):
            batch = loaded.to(self.device)
            rows.append([])
            for transform in self.listed:
                answer: list[float] = []
                distances: list[float] = []
                for overrides in self.members.overrides:
                    views = transform(as_float(batch), batch.view_mask)
                    encoded = model.encode(views, batch.view_mask, batch.boxes, segmentation=False)
                    output = call_with(model, overrides, "decide", encoded, batch.metadata, False)
                    answer.append(float((output.logits[0, 1] - output.logits[0, 0]).double()))
                    if not distances:  # the pre-trained member's, which is the first
                        distances = self.distribution.distances(depths_of(output))[0].tolist()
                rows[-1].append([*answer, *distances])
        return time.perf_counter() - started, np.array(rows)


if __name__ == "__main__":
    main()
