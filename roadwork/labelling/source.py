"""Photos by position: from any source of the shard builder, or from shards that are already built.

The position of a photo is its row in the source. It depends on nothing but the source, so any number of processes can
share the work without talking.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from roadwork.data.decode import Unreadable
from roadwork.data.images import decode_masks, decode_photo
from roadwork.data.index import ShardIndex, read_manifest
from roadwork.data.record import Rejected, parse_row
from roadwork.data.shards import SPLITS
from roadwork.data.sources import Ref, Source, open_source
from roadwork.errors import UserError
from roadwork.labelling.backend import Crop, Photo
from roadwork.labelling.crops import tiled_photo, whole_photo

log = logging.getLogger(__name__)

DUPLICATE = "duplicate_id"
Loaded = tuple[int, Photo | str]
"""A position and its photo, or the reason why there is none."""


class PhotoSource(Protocol):
    """Photos with an id and perhaps a label at every position 0..n-1."""

    ids: list[str]
    labels: list[int | None]

    def load(self, positions: Sequence[int]) -> Iterator[Loaded]:
        """The photos at ascending positions, in that order, decoded one by one."""


def open_photos(spec: str, shards: str, tiles: bool, work_dir: Path, seed: int = 0) -> PhotoSource:
    """Photos of a source, or of built shards where `spec` is empty.

    Raises:
        UserError: no such source, or no photos in it.
    """
    photos: PhotoSource
    if spec:
        photos = SourcePhotos(open_source(spec, work_dir, seed).source, tiles)
    else:
        photos = ShardPhotos(shards, tiles)
    if not photos.ids:
        raise UserError(f"masks.source {spec or shards}: no photos there")
    return photos


def repeated(ids: Sequence[str]) -> dict[int, str]:
    """Position -> reason for every photo whose id was there before: masks are kept by id, and have room for one."""
    first: dict[str, int] = {}
    return {
        position: f"{DUPLICATE}: {photo_id} is position {first[photo_id]} as well"
        for position, photo_id in enumerate(ids)
        if first.setdefault(photo_id, position) != position
    }


class SourcePhotos:
    """Photos of a source at full size.

    Args:
        source: rows and pixels.
        tiles: look at tiles besides the whole photo.
    """

    def __init__(self, source: Source, tiles: bool) -> None:
        self.source, self.cut = source, tiled_photo if tiles else whole_photo
        self.ids: list[str] = []
        self.labels: list[int | None] = []
        self._refs: list[Ref] = []
        rejected: dict[int, str] = {}
        for position, (ref, row) in enumerate(source.rows()):
            photo_id, label = str(row.get("id")), None
            try:
                record = parse_row({**row, "image": None, "masks": None})
                photo_id, label = record.id, record.label
            except Rejected as error:
                rejected[position] = error.reason
            self.ids.append(photo_id)
            self.labels.append(label)
            self._refs.append(ref)
        self._bad = repeated(self.ids) | rejected

    def load(self, positions: Sequence[int]) -> Iterator[Loaded]:
        """See PhotoSource. One call reads each of its row groups once, however many positions it has there."""
        loaded = self.source.load([self._refs[p] for p in positions if p not in self._bad])
        for position in positions:
            if position in self._bad:
                yield position, self._bad[position]
                continue
            _, image, masks = next(loaded)
            yield position, self._decode(position, image, masks)

    def _decode(self, position: int, image: bytes, masks: bytes | None) -> Photo | str:
        try:
            rgb, _ = decode_photo(image)
            bits = decode_masks(masks, rgb.shape[1], rgb.shape[0]) if masks else None
        except Rejected as error:
            return error.reason
        return self.cut(self.ids[position], rgb, bits)


class ShardPhotos:
    """Photos of built shards: the views are what is left of them.

    Args:
        folder: of shards.
        tiles: look at every view; otherwise at the whole photo's only.
    """

    def __init__(self, folder: str, tiles: bool) -> None:
        splits = read_manifest(folder)["indexes"]
        self.indexes = [ShardIndex.open(folder, split) for split in SPLITS if split in splits]
        self.tiles = tiles
        self.ids = [str(i) for index in self.indexes for i in index.id]
        self.labels = [None if v < 0 else int(v) for index in self.indexes for v in index.label]
        self._bad = repeated(self.ids)
        self._starts = np.cumsum([0, *(len(index) for index in self.indexes)])

    def load(self, positions: Sequence[int]) -> Iterator[Loaded]:
        """See PhotoSource."""
        for position in positions:
            if position in self._bad:
                yield position, self._bad[position]
                continue
            which = int(np.searchsorted(self._starts, position, side="right")) - 1
            try:
                yield position, self._photo(self.indexes[which], position - int(self._starts[which]))
            except (Unreadable, OSError) as error:
                yield position, f"unreadable: {' '.join(str(error).split())}"

    def _photo(self, index: ShardIndex, row: int) -> Photo:
        width, height = int(index.width[row]), int(index.height[row])
        boxes = np.rint(index.boxes(row) * [width, height, width, height]).astype(int)
        views = index.read_views(row).transpose(0, 2, 3, 1)
        count = len(views) if self.tiles else 1
        crops = tuple(_unsquare(view, box) for view, box in zip(views[:count], boxes[:count], strict=True))
        masks = index.read_masks(row) if index.read_meta(row).get("masks_real", True) else None
        (name,) = index.names([row])
        if masks is None:
            return Photo(name, width, height, crops)
        # The first view is the whole photo; its masks stretch over it whatever their size.
        bits = np.packbits(masks[0], axis=0, bitorder="little")[0]
        return Photo(name, width, height, crops, bits, tuple(index.masks_valid[row].tolist()))


def _unsquare(view: np.ndarray, box: np.ndarray) -> Crop:
    """A view in the shape of its box: views are squares whatever they show."""
    width, height = int(box[2] - box[0]), int(box[3] - box[1])
    scale = view.shape[0] / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    rgb = (
        view
        if size == view.shape[1::-1]
        else cv2.resize(np.ascontiguousarray(view), size, interpolation=cv2.INTER_AREA)
    )
    return Crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])), np.ascontiguousarray(rgb))
