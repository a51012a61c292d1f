"""A new target region for shards that exist: only the index and the manifest change.

The JSON inside the tars keeps the weight of the build: tars are never rewritten. What a reader uses is the index;
the manifest then says `reweighted: true`, and an index rebuilt from the tars alone has the build's weights again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from roadwork.data import geo
from roadwork.data.index import ShardIndex, read_manifest, update_index
from roadwork.data.plan import Target, describe_file, describe_weights, settle
from roadwork.errors import UserError


def reweight(
    folder: str | Path,
    target_gps: str,
    clusters: int = 5,
    brackets: geo.Brackets | None = None,
    class_balance: str | None = None,
    weight_cap: float | None = None,
) -> dict[str, Any]:
    """Weigh every photo anew by the places in a CSV; returns the new manifest. None: as the shards were built.

    Index and manifest change in one rename. UserError for shards without a train split, shards or a CSV that cannot be
    read, and options that cannot be.
    """
    manifest = read_manifest(folder)
    points = geo.read_target(target_gps)
    centres = geo.clusters(points, clusters)
    if brackets is None:
        kept = manifest.get("brackets")
        brackets = geo.Brackets(tuple(kept["max_km"]), tuple(kept["weights"])) if kept else geo.DEFAULT
    balance = class_balance or manifest.get("class_balance", "none")
    cap = manifest.get("weight_cap", 0.0) if weight_cap is None else weight_cap
    columns = {}
    extra: dict[str, Any] = {"reweighted": True}
    indexes = {split: ShardIndex.open(folder, split) for split in manifest["indexes"]}
    places = {split: np.stack([index.latitude, index.longitude], axis=1) for split, index in indexes.items()}
    learned = np.concatenate([np.zeros((0, 2)), *(places[split] for split in ("train", "val") if split in places)])
    said = describe_file(str(target_gps), points, places.get("test", np.zeros((0, 2))), learned)
    target = Target(points, centres, said)
    for split, index in indexes.items():
        latlon = places[split]
        weights = geo.weights_to_centres(latlon, centres, brackets)
        if split == "train":
            weights = settle(weights, index.label, balance, cap)
            extra |= describe_weights(latlon, weights, index.label, target, brackets, balance, cap)
        columns[split] = {"gps_weight": weights}
    if "train" not in columns:
        raise UserError(
            f"{folder} has no split train, so there is nothing to weigh; it has {', '.join(manifest['indexes'])}"
        )
    return update_index(folder, columns, extra)
