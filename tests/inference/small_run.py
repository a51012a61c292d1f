"""A run folder with a randomly initialised detector and shards of a few dozen photos, for folds and prediction."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from roadwork.config import Config
from roadwork.engine import Engine
from roadwork.models import RoadworkDetector
from tests.data.sheets import build
from tests.models.test_adapters import TINY

COUNTS = {"train": 30, "val": 12, "test": 9, "predict": 5}


def make(folder: Path, scale: float = 30.0) -> Config:
    """Shards of 32 px views in `folder`/shards and a detector in `folder`/run/best.

    The last layer is scaled so that random answers differ from each other by more than rounding.
    """
    build(folder / "shards", COUNTS)
    torch.manual_seed(0)
    model = RoadworkDetector(TINY, 32)
    with torch.no_grad():
        model.classifier[-1].weight.mul_(scale)
    model.save_pretrained(folder / "run" / "best")
    config = Config()
    config.run.dir, config.data.shards, config.data.workers = str(folder / "run"), str(folder / "shards"), 0
    config.folds.num_folds, config.folds.epochs, config.folds.r, config.folds.batch = 3, 2, 4, 8
    config.predict.num_augmentations, config.predict.bootstrap, config.predict.batch = 3, 50, 4
    return config


def empty_split(shards: Path, split: str) -> None:
    """Leave a split of some shards in the manifest, without a photo in it."""
    manifest = json.loads((shards / "manifest.json").read_text())
    line = manifest["indexes"][split]
    with np.load(shards / line["file"]) as stored:
        table = {name: values[:0] if len(values) == line["count"] else values for name, values in stored.items()}
    np.savez(shards / f"{split}.index-none.npz", **table)
    data = (shards / f"{split}.index-none.npz").read_bytes()
    known = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["indexes"][split] = {"file": f"{split}.index-none.npz", "count": 0, **known}
    manifest["shards"] = [shard for shard in manifest["shards"] if shard["split"] != split]
    (shards / "manifest.json").write_text(json.dumps(manifest))


def alone() -> Engine:
    """An engine of one process without a process group."""
    return Engine(None, 0, 1, 0, torch.device("cpu"), False, 60.0)  # type: ignore[arg-type]
