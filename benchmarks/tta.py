"""FOODS test-time augmentation: `python -m benchmarks.tta --run DIR --shards DIR`.

Photos per second batched (all augmentations and members over shared encodings) and one by one as the original sketch
does it (one photo, one augmentation, one member at a time), and the agreement of 1, 2 and 3 shards.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.inference.collect import answer_batch, as_float
from roadwork.inference.members import Members, find_members, load_members
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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    config = Config()
    config.run.dir, config.data.shards = options.run, options.shards
    device = torch.device(options.device)
    members = load_members(config, find_members(config), device)
    index = ShardIndex.open(options.shards, options.split)
    figures = measure(members, index, options, device)
    if not options.json:
        for name, value in figures.items():
            print(f"{name:28} {value}")
    print(json.dumps(figures))


def measure(members: Members, index: ShardIndex, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Photos per second and largest differences in log-odds."""
    listed = transforms(options.augmentations, 0)
    number = min(options.photos, len(index))
    shards = {world: _sharded(members, index, listed, number, options.batch, world, device) for world in (1, 2, 3)}
    batched, answers = shards[1]
    few = max(1, number // 4)
    single, reference = _one_by_one(members, index, listed, few, device)
    return {
        "device": str(device),
        "members": len(members.names),
        "augmentations": len(listed),
        "batched_images_per_s": round(number / batched, 3),
        "one_by_one_images_per_s": round(few / single, 3),
        "speedup": round((number / batched) / (few / single), 2),
        "batched_against_one_by_one": float(np.abs(answers[:few] - reference).max()),
        "shards_1_against_2": float(np.abs(answers - shards[2][1]).max()),
        "shards_1_against_3": float(np.abs(answers - shards[3][1]).max()),
    }


def _sharded(
    members: Members,
    index: ShardIndex,
    listed: list[Transform],
    number: int,
    batch: int,
    world: int,
    device: torch.device,
) -> tuple[float, np.ndarray]:
    """Seconds and log-odds [N,A,M] in the index's order; the shards of `world` processes one after the other."""
    found: dict[str, Any] = {}
    started = time.perf_counter()
    for rank in range(world):
        loader = EvalLoader(
            index, batch=batch, rank=rank, world_size=world, workers=0, indices=np.arange(number), load_masks=False
        )
        for loaded in loader:
            for record in answer_batch(members, loaded.to(device), listed, None, image_only=False):
                found[record["id"]] = record["log_odds"]
    spent = time.perf_counter() - started
    return spent, np.array([found[str(name)] for name in index.id[:number]])


@torch.inference_mode()
def _one_by_one(
    members: Members, index: ShardIndex, listed: list[Transform], number: int, device: torch.device
) -> tuple[float, np.ndarray]:
    """The sketch's loop: every photo, augmentation and member is a forward pass of its own."""
    found = np.empty((number, len(listed), len(members.names)))
    started = time.perf_counter()
    for row, loaded in enumerate(EvalLoader(index, batch=1, workers=0, indices=np.arange(number), load_masks=False)):
        batch = loaded.to(device)
        for place, transform in enumerate(listed):
            for column, overrides in enumerate(members.overrides):
                views = transform(as_float(batch), batch.view_mask)
                encoded = members.model.encode(views, batch.view_mask, batch.boxes, segmentation=False)
                logits = call_with(members.model, overrides, "decide", encoded, batch.metadata, False).logits.double()
                found[row, place, column] = float(logits[0, 1] - logits[0, 0])
    return time.perf_counter() - started, found


if __name__ == "__main__":
    main()
