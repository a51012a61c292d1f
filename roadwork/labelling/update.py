"""New masks for shards that are built already: tars, index and manifest change together, or not at all.

All new files are written beside the old ones first. Then a journal names the renames; from that instant the update is
decided, and any later call (or `finish_update`) completes it if the process died among the renames.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from roadwork.data.decode import encode_masks
from roadwork.data.index import MANIFEST, ShardIndex, read_manifest, write_index
from roadwork.data.mask_files import PhotoMasks, read_masks
from roadwork.data.scan import ShardRows, scan_shard
from roadwork.data.shards import Sample, atomic_file, read_samples, write_shard
from roadwork.data.views import compose_sheet, make_mask_views, scaled_boxes
from roadwork.errors import UserError

log = logging.getLogger(__name__)

JOURNAL = ".masks-update.json"
STAGING = ".masks-update"
_DERIVED = ("schema_version", "view_size", "mask_size", "shards", "indexes")


@dataclass
class Updated:
    """What an update did.

    Attributes:
        samples: photos in the shards. changed: got other masks than they had. kept: have masks that were to be left alone.
        without: have no masks now. shards: files written again.
    """

    samples: int = 0
    changed: int = 0
    kept: int = 0
    without: int = 0
    shards: int = 0


Keep = Literal["none", "real", "all"]


def update_masks(folder: str | os.PathLike[str], masks: str | os.PathLike[str], keep: Keep = "none") -> Updated:
    """Put the masks of a folder into built shards.

    Photos without files in `masks` keep what they have, and so do photos of two splits that share an id (which of them
    the file shows is not known). Shards that hold these masks already are left alone: the same update again writes
    nothing. GPS weights of a later reweighting are kept.

    Args:
        folder: of shards.
        masks: folder that the labelling stage wrote.
        keep: which masks in the shards stay: none; real ones, unless the folder's are real as well; or all.

    Raises:
        UserError: no such folder, damaged shards or masks, or a full disk; the shards are then as before.
    """
    root = Path(folder)
    finish_update(root)
    if not Path(masks).is_dir():
        raise UserError(f"--masks {masks}: no such folder; give one that launch/pseudo_masks.py wrote")
    manifest = read_manifest(root)
    staging = root / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    done = Updated()
    try:
        made = _Folder(Path(masks), shared_ids(root, manifest))
        rows = [_stage_shard(root / line["name"], staging, made, keep, done) for line in manifest["shards"]]
        _keep_weights(root, manifest, rows)
        _count_masks(manifest, rows)
        extra = {key: value for key, value in manifest.items() if key not in _DERIVED}
        if not done.changed:
            return done
        write_index(staging, rows, {**extra, "masks_updated_from": str(masks)})
        _commit(root, staging)
    except OSError as error:
        raise UserError(
            f"{root}: the masks could not be written ({error.strerror}); the shards are as before"
        ) from None
    except ValueError as error:
        raise UserError(f"{root}: {error}") from None
    finally:
        if not (root / JOURNAL).exists():
            shutil.rmtree(staging, ignore_errors=True)
    return done


def finish_update(folder: str | os.PathLike[str]) -> bool:
    """Complete an update that died among its renames; True where there was one."""
    root = Path(folder)
    journal = root / JOURNAL
    if not journal.exists():
        return False
    plan = json.loads(journal.read_text())
    # The manifest comes last: until then a reader sees sizes that do not match and says so, never wrong pixels.
    for name in plan["files"]:
        if (root / STAGING / name).exists():
            os.replace(root / STAGING / name, root / name)
    for name in plan["old_indexes"]:
        (root / name).unlink(missing_ok=True)
    journal.unlink()
    shutil.rmtree(root / STAGING, ignore_errors=True)
    return True


@dataclass(frozen=True)
class _Folder:
    """Masks by id, but for the ids that several photos have."""

    path: Path
    shared: set[str]

    def masks(self, photo_id: str) -> PhotoMasks | None:
        return None if photo_id in self.shared else read_masks(self.path, photo_id)


def shared_ids(root: Path, manifest: dict[str, Any]) -> set[str]:
    """Ids that more than one photo of the shards has: two published splits may number theirs alike."""
    times = Counter(str(name) for split in manifest["indexes"] for name in ShardIndex.open(root, split).id)
    shared = {name for name, count in times.items() if count > 1}
    if shared:
        log.warning("%s: %d ids belong to several photos, which keep the masks they have", root, len(shared))
    return shared


def _stage_shard(path: Path, staging: Path, masks: _Folder, keep: Keep, done: Updated) -> ShardRows:
    """Write the shard with new masks into the staging folder, if any of its photos has some."""
    before = done.changed
    write_shard(staging / path.name, _with_masks(path, masks, keep, done))
    if done.changed == before:
        (staging / path.name).unlink()
        return scan_shard(path)
    done.shards += 1
    return scan_shard(staging / path.name)


def _with_masks(path: Path, masks: _Folder, keep: Keep, done: Updated) -> Iterator[Sample]:
    for sample in read_samples(path):
        done.samples += 1
        new = sample
        found = masks.masks(str(sample.meta.get("id") or sample.key))
        if found is not None and _stays(sample, found, keep):
            done.kept += 1
        elif found is not None:
            new = _masked(sample, found)
            done.changed += (new.masks, new.meta) != (sample.masks, sample.meta)
        done.without += new.masks is None
        yield new


def _stays(sample: Sample, found: PhotoMasks, keep: Keep) -> bool:
    if sample.masks is None or keep == "none":
        return False
    # Shards of before this was noted got their masks from the source.
    return keep == "all" or (bool(sample.meta.get("masks_real", True)) and not found.real)


def _masked(sample: Sample, found: PhotoMasks) -> Sample:
    boxes = scaled_boxes(sample.boxes, (sample.meta["width"], sample.meta["height"]), found.bits.shape)
    views = make_mask_views(found.bits, boxes, sample.view_size)
    facts = {
        "masks_valid": list(found.valid),
        "masks_confidence": list(found.confidence),
        "masks_origin": found.origin,
        "masks_real": found.real,
    }
    return replace(sample, masks=encode_masks(compose_sheet(views)), meta={**sample.meta, **facts})


def _keep_weights(root: Path, manifest: dict[str, Any], rows: list[ShardRows]) -> None:
    """The tars hold the weights of the build; the index may hold those of a later reweighting."""
    for split in manifest["indexes"]:
        index = ShardIndex.open(root, split)
        weights = iter(np.asarray(index.gps_weight).tolist())
        for shard in rows:
            if shard.info.split == split:
                for row in shard.rows:
                    row["gps_weight"] = next(weights)


def _count_masks(manifest: dict[str, Any], rows: list[ShardRows]) -> None:
    """Bring the manifest's `with_masks` up to date."""
    for split, facts in manifest.get("splits", {}).items():
        mine = [row for shard in rows if shard.info.split == split for row in shard.rows]
        if "with_masks" in facts:
            facts["with_masks"] = sum(row["masks_at"] != (0, 0) for row in mine)


def _commit(root: Path, staging: Path) -> None:
    new = sorted(path.name for path in staging.iterdir() if path.name != MANIFEST)
    old = sorted(path.name for path in root.glob("*.index-*.npz") if path.name not in new)
    with atomic_file(root / JOURNAL) as journal:
        journal.write(json.dumps({"files": [*new, MANIFEST], "old_indexes": old}).encode())
    finish_update(root)
