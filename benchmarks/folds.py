"""What the shared prefix saves: `python -m benchmarks.folds --run DIR --shards DIR`.

The same folds are trained from cached encoder outputs and by encoding every batch anew, on one process. What is saved
does not depend on the number of photos: `--photos` takes the first ones of the training split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import call_with, merged_overrides
from roadwork.training import folds
from roadwork.training.fold_cache import Encoding, LivePrefix, PrefixCache, PrefixSource
from roadwork.training.fold_trainer import FoldResult, train_fold


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="runs/demo", help="run folder with best/")
    parser.add_argument("--shards", default="runs/demo/shards")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--photos", type=int, default=128, help="0: all of the training split")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    options = parser.parse_args()
    config = Config()
    config.run.dir, config.data.shards = options.run, options.shards
    config.folds.num_folds, config.folds.epochs, config.folds.patience = options.folds, options.epochs, 0
    figures = measure(config, torch.device(options.device), options.photos)
    if not options.json:
        for name, value in figures.items():
            print(f"{name:24} {value}")
    print(json.dumps(figures))


def measure(config: Config, device: torch.device, photos: int = 0) -> dict[str, float | int | str]:
    """Seconds with the cache (its filling included) and without; bytes; largest differences."""
    index, encoding = ShardIndex.open(config.data.shards, "train"), Encoding(config, device)
    data = first(folds.fold_data(index, config), photos or len(index))
    model = RoadworkDetector.from_pretrained(Path(config.run.dir) / "best", device).float().requires_grad_(False)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        cache = PrefixCache(Path(scratch) / "prefix", data.rows, config.folds.copies, device)
        cache.fill(model, index, encoding, config, 0, 1)
        filled = time.perf_counter() - started
        shared, mine = _train(model, cache, data, config, device)
        live = LivePrefix(index, data.rows, encoding, config, with_gradients=False)
        anew, theirs = _train(model, live, data, config, device)
        error = _merge_error(model, mine[0], cache, Path(scratch) / "adapter")
        size = cache.bytes
    return {
        "device": str(device),
        "photos": len(data.rows),
        "shared_s": round(filled + shared, 2),
        "fill_s": round(filled, 2),
        "recomputing_s": round(anew, 2),
        "speedup": round(anew / (filled + shared), 2),
        "cached_bytes": size,
        "largest_difference": max(float(abs(a.log_odds - b.log_odds).max()) for a, b in zip(mine, theirs, strict=True)),
        "merged_error": error,
    }


def first(data: folds.FoldData, photos: int) -> folds.FoldData:
    """The first photos of all folds."""
    parts = {name: getattr(data, name)[:photos] for name in ("rows", "ids", "labels", "weights", "fold")}
    return replace(data, **parts)


def _train(
    model: RoadworkDetector, source: PrefixSource, data: folds.FoldData, config: Config, device: torch.device
) -> tuple[float, list[FoldResult]]:
    started = time.perf_counter()
    results = [train_fold(model, source, data, fold, config, device) for fold in range(data.number)]
    return time.perf_counter() - started, results


@torch.no_grad()
def _merge_error(model: RoadworkDetector, result: FoldResult, source: PrefixSource, folder: Path) -> float:
    """Largest difference in logits between the adapted and the merged network over the fold's held-out photos."""
    result.model.save_pretrained(str(folder))
    overrides = merged_overrides(model, folder)
    adapted: Any = result.model.eval().get_base_model()
    worst = 0.0
    for prefix in source.batches(model, result.held, result.held * 0, 32):
        a = adapted.decide(prefix.encoded, prefix.metadata, segmentation=False).logits
        b = call_with(model, overrides, "decide", prefix.encoded, prefix.metadata, False).logits
        worst = max(worst, float((a - b).abs().max()))
    return worst


if __name__ == "__main__":
    main()
