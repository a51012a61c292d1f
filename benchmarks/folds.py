"""What the shared prefix saves: `python -m benchmarks.folds --run DIR --shards DIR`.

The same folds are trained from cached encoder outputs and by encoding every batch anew, on one process; then again with
adapters on the backbone's last unit as well (`backbone_*`), where the cache ends before that unit. What is saved does
not depend on the number of photos: `--photos` takes the first ones of the training split.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from roadwork.config import Config
from roadwork.data.index import ShardIndex
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import merged_overrides, replaced, shared_units
from roadwork.training import folds
from roadwork.training.fold_cache import FixedCopies, LivePrefix, PrefixCache, PrefixSource
from roadwork.training.fold_trainer import FoldData, FoldResult, train_fold


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
    device = torch.device(options.device)
    model = RoadworkDetector.from_pretrained(Path(options.run) / "best", device).float().requires_grad_(False)
    figures: dict[str, Any] = {"device": str(device), **measure(config, model, device, options.photos)}
    config.folds.target_modules += last_unit(model)
    figures |= {f"backbone_{name}": value for name, value in measure(config, model, device, options.photos).items()}
    if not options.json:
        for name, value in figures.items():
            print(f"{name:32} {value}")
    print(json.dumps(figures))


def last_unit(model: RoadworkDetector) -> list[str]:
    """Names of what DoRA can adapt in the backbone's last unit: linear layers and convolutions without groups."""
    unit = model.backbone.units()[-1]
    layers = {id(part) for part in unit.modules() if isinstance(part, nn.Linear) or getattr(part, "groups", 0) == 1}
    return [name for name, part in model.named_modules() if id(part) in layers]


def measure(config: Config, model: RoadworkDetector, device: torch.device, photos: int = 0) -> dict[str, float | int]:
    """Seconds with the cache (its filling included) and without; bytes; largest differences."""
    index, fixed = ShardIndex.open(config.data.shards, "train"), FixedCopies(config, device)
    data = first(folds.fold_data(index, config), photos or len(index))
    unit = shared_units(model, [*config.folds.target_modules, *config.folds.modules_to_save])
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        cache = PrefixCache(Path(scratch) / "prefix", data.rows, config.folds.copies, device, unit)
        cache.fill(model, index, fixed, config, 0, 1)
        filled = time.perf_counter() - started
        shared, mine = _train(model, cache, data, config, device)
        live = LivePrefix(index, data.rows, fixed, config, with_gradients=unit is not None)
        anew, theirs = _train(model, live, data, config, device)
        error = _merge_error(model, mine[0], cache, Path(scratch) / "adapter")
        size = cache.bytes
    return {
        "photos": len(data.rows),
        "units_shared": model.backbone.depth if unit is None else unit,
        "units": model.backbone.depth,
        "shared_s": round(filled + shared, 2),
        "fill_s": round(filled, 2),
        "recomputing_s": round(anew, 2),
        "speedup": round(anew / (filled + shared), 2),
        "cached_bytes": size,
        "largest_difference": max(float(abs(a.log_odds - b.log_odds).max()) for a, b in zip(mine, theirs, strict=True)),
        "merged_error": error,
    }


def first(data: FoldData, photos: int) -> FoldData:
    """The first photos of all folds."""
    parts = {name: getattr(data, name)[:photos] for name in ("rows", "ids", "labels", "weights", "fold")}
    return replace(data, **parts)


def _train(
    model: RoadworkDetector, source: PrefixSource, data: FoldData, config: Config, device: torch.device
) -> tuple[float, list[FoldResult]]:
    started = time.perf_counter()
    results = [train_fold(model, source, data, fold, config, device) for fold in range(data.number)]
    return time.perf_counter() - started, results


@torch.no_grad()
def _merge_error(model: RoadworkDetector, result: FoldResult, source: PrefixSource, folder: Path) -> float:
    """Largest difference in logits between the adapted and the merged network over the fold's held-out photos."""
    result.model.save_pretrained(str(folder))
    adapted, merged = cast(RoadworkDetector, result.model.eval().get_base_model()), copy.deepcopy(model)
    with replaced(merged, merged_overrides(model, folder)):
        a, b = (_logits(one, source, result.held) for one in (adapted, merged))
    return float((a - b).abs().max())


def _logits(model: RoadworkDetector, source: PrefixSource, photos: np.ndarray) -> torch.Tensor:
    batches = source.batches(model, photos, np.zeros_like(photos), 32)
    return torch.cat([model.decide(one.encoded, one.metadata, segmentation=False).logits for one in batches])


if __name__ == "__main__":
    main()
