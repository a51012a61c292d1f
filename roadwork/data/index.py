"""The index beside the shards: every sample's byte ranges and metadata as columns, and the manifest that commits it.

Files: `DIR/manifest.json` and, per split, `DIR/{split}.index-{hash}.npz`. The manifest names the index files, so its
rename is the one instant at which new shards, weights or masks become visible together.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from roadwork.config import Config
from roadwork.data.cache import ShardCache, is_remote
from roadwork.data.decode import Unreadable, decode_masks, decode_views, unpack_masks
from roadwork.data.ranges import RangeReader
from roadwork.data.scan import ShardRows, scan_shard
from roadwork.data.shards import SCHEMA_VERSION, SPLITS, ShardInfo, parse_shard_name
from roadwork.data.store import Store, open_store
from roadwork.data.views import MASK_STRIDE, MAX_VIEWS, view_boxes
from roadwork.errors import UserError

MANIFEST = "manifest.json"
Table = dict[str, npt.NDArray[Any]]


def rebuild_command(folder: str | os.PathLike[str]) -> str:
    """What a user runs to make the index again from the tars alone."""
    return f"python -m shards.verify {os.fspath(folder)} --rebuild"


class ShardIndex:
    """The samples of one split, in shard order: numpy columns of length n, and reading by byte range.

    Columns: id_bytes [UTF-8]; label int8 (-1 unknown); latitude, longitude float64 (NaN missing); gps_weight float64;
    weather, daytime, scene int16 (-1 NULL); num_views int16; masks_valid bool [n, 6] (all False: no masks); width,
    height int32; shard int32; and offset and size of each member: views_offset, views_size, meta_offset, ...
    The strings id, group and city are written out when they are asked for. `max_views`: of a photo, as it was built.
    """

    def __init__(
        self,
        folder: Path | str,
        split: str,
        manifest: dict[str, Any],
        table: Table,
        cache: tuple[str, float] = ("", 50.0),
    ) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        self.view_size: int = manifest["view_size"]
        self.mask_size: int = manifest["mask_size"]
        self.max_views: int = manifest.get("options", {}).get("max_views", MAX_VIEWS)
        self.shards = [ShardInfo(**line) for line in manifest["shards"] if line["split"] == split]
        self.paths = [file_in(folder, shard.name) for shard in self.shards]
        self.cache: ShardCache | None = None
        if is_remote(folder):
            local = Path(cache[0] or "~/.cache/roadwork").expanduser()
            self.cache = ShardCache(str(folder), local, int(cache[1] * 2**30), self.shards)
        self.id_bytes: npt.NDArray[np.bytes_] = table["id"]
        self._groups: tuple[npt.NDArray[np.str_], npt.NDArray[np.int32]] = table["group_names"], table["group_code"]
        self._cities: tuple[npt.NDArray[np.str_], npt.NDArray[np.int32]] = table["city_names"], table["city_code"]
        self.label: npt.NDArray[np.int8] = table["label"]
        self.latitude: npt.NDArray[np.float64] = table["latitude"]
        self.longitude: npt.NDArray[np.float64] = table["longitude"]
        self.gps_weight: npt.NDArray[np.float64] = table["gps_weight"]
        self.weather: npt.NDArray[np.int16] = table["weather"]
        self.daytime: npt.NDArray[np.int16] = table["daytime"]
        self.scene: npt.NDArray[np.int16] = table["scene"]
        self.num_views: npt.NDArray[np.int16] = table["num_views"]
        self.masks_valid: npt.NDArray[np.bool_] = table["masks_valid"]
        self.width: npt.NDArray[np.int32] = table["width"]
        self.height: npt.NDArray[np.int32] = table["height"]
        self.shard: npt.NDArray[np.int32] = table["shard"]
        self.views_offset: npt.NDArray[np.int64] = table["views_offset"]
        self.views_size: npt.NDArray[np.int64] = table["views_size"]
        self.views_crc: npt.NDArray[np.uint32] = table["views_crc"]
        self.meta_offset: npt.NDArray[np.int64] = table["meta_offset"]
        self.meta_size: npt.NDArray[np.int64] = table["meta_size"]
        self.masks_offset: npt.NDArray[np.int64] = table["masks_offset"]
        self.masks_size: npt.NDArray[np.int64] = table["masks_size"]
        self._box_code: npt.NDArray[np.int32] = table["box_code"]
        self._box_table: npt.NDArray[np.float32] = table["box_table"]
        self._reader = RangeReader(self.paths, cache=self.cache)

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str],
        split: str,
        *,
        verify: bool = False,
        cache_dir: str = "",
        cache_gib: float = 50.0,
    ) -> ShardIndex:
        """Open one split.

        Args:
            folder: local, or a URL that fsspec knows; remote shards are fetched when they are first read, checked by
                SHA-256 and kept in `cache_dir` (default `~/.cache/roadwork`) up to `cache_gib` GiB.
            verify: also compare every shard's SHA-256 (reads everything); otherwise existence and size are checked, by
                the first rank of each machine, and each sample's CRC-32 when it is read.

        Raises:
            UserError: one line naming the file that is missing, truncated, of another schema version or altered, and
                what to run.
        """
        root = root_of(folder)
        manifest = read_manifest(root)
        index = cls(root, split, manifest, _read_table(root, split, manifest), (cache_dir, cache_gib))
        counted = sum(shard.count for shard in index.shards)
        if counted != len(index):
            raise UserError(
                f"{file_in(root, MANIFEST)} counts {counted} samples in {split}, its index has {len(index)}; "
                f"run `{rebuild_command(root)}`"
            )
        if isinstance(root, Path) and (verify or os.environ.get("LOCAL_RANK", "0") == "0"):
            # Once for each machine: a thousand ranks that look at each shard would keep a file system busy.
            for shard in index.shards:
                check_shard(root, shard, verify=verify)
        elif verify and index.cache is not None:
            for number in range(len(index.shards)):
                index.cache.fetch(number)
        return index

    def __len__(self) -> int:
        return len(self.label)

    @functools.cached_property
    def id(self) -> npt.NDArray[np.str_]:
        """Id of each sample: str [n], written out when somebody asks; training needs a few, by `names`."""
        return np.char.decode(self.id_bytes, "utf-8")

    def names(self, rows: npt.ArrayLike) -> list[str]:
        """The ids of some rows, int [k]."""
        names: list[str] = np.char.decode(self.id_bytes[np.asarray(rows, np.int64)], "utf-8").tolist()
        return names

    @property
    def group(self) -> npt.NDArray[np.str_]:
        """Group of each sample: str [n], written out anew at each call; training needs none, and a code takes 4 bytes."""
        names, codes = self._groups
        return names[codes]

    @property
    def city(self) -> npt.NDArray[np.str_]:
        """City of each sample, or empty: str [n], likewise."""
        names, codes = self._cities
        return names[codes]

    def read_views(self, i: int) -> npt.NDArray[np.uint8]:
        """Views of sample i: uint8 [V, 3, S, S] (a transposed view of [V, S, S, 3] memory). Unreadable if damaged."""
        data = self._reader.read(int(self.shard[i]), int(self.views_offset[i]), int(self.views_size[i]))
        views = decode_views(data, int(self.num_views[i]), self.view_size, crc=int(self.views_crc[i]))
        return views.transpose(0, 3, 1, 2)

    def read_masks(self, i: int) -> npt.NDArray[np.uint8] | None:
        """Masks of sample i: {0, 1} uint8 [V, 6, s, s], or None."""
        if not self.masks_size[i]:
            return None
        data = self._reader.read(int(self.shard[i]), int(self.masks_offset[i]), int(self.masks_size[i]))
        return unpack_masks(decode_masks(data, int(self.num_views[i]), self.mask_size))

    def read_meta(self, i: int) -> dict[str, Any]:
        """The JSON of sample i. Its gps_weight is the one of the build; the column holds the current one.

        Raises Unreadable where the bytes are no JSON: no checksum of their own covers them.
        """
        data = self._reader.read(int(self.shard[i]), int(self.meta_offset[i]), int(self.meta_size[i]))
        try:
            meta: dict[str, Any] = json.loads(data)
        except ValueError as error:
            raise Unreadable(f"its metadata do not parse ({error})") from error
        return meta

    def boxes(self, i: int) -> npt.NDArray[np.float32]:
        """View boxes of sample i as fractions of the photo: float32 [V, 4]."""
        return self._box_table[self._box_code[i], : self.num_views[i]]

    def padded_boxes(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """View boxes of many samples: float32 [N, 12, 4], zeros behind each sample's last view."""
        return self._box_table[self._box_code[rows]]


def open_split(config: Config, split: str) -> ShardIndex:
    """One split of a run's shards, behind the run's cache where they are remote. Raises as `ShardIndex.open` does."""
    data = config.data
    return ShardIndex.open(data.shards, split, cache_dir=data.cache_dir, cache_gib=data.cache_gib)


def read_manifest(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder of shards, or a UserError that names what is wrong with it."""
    root = root_of(folder)
    path = file_in(root, MANIFEST)
    if isinstance(root, Path) and not root.is_dir():
        raise UserError(f"there are no shards at {root}; {_build(root)}")
    store = open_store(root)
    try:
        manifest = json.loads(store.read(MANIFEST))
    except FileNotFoundError as error:
        if shards_in(store):
            remedy = f"finish the interrupted build, or run `{rebuild_command(root)}`"
            raise UserError(f"{path} is missing; {remedy}") from error
        raise UserError(f"{path} is missing; {_build(root)}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); make it readable and start again") from error
    except ValueError as error:
        raise UserError(f"{path} is truncated or altered ({error}); run `{rebuild_command(root)}`") from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}; "
            f"build the shards again with `python -m shards.build`"
        )
    if missing := [key for key in ("view_size", "mask_size", "shards", "indexes") if key not in manifest]:
        raise UserError(f"{path} is altered (it lacks {', '.join(missing)}); run `{rebuild_command(root)}`")
    checked: dict[str, Any] = manifest
    return checked


def check_shard(folder: Path, shard: ShardInfo, *, verify: bool) -> None:
    """UserError where a shard is missing, truncated or, with `verify`, altered."""
    path = folder / shard.name
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"shard {path} is missing; build it again with `python -m shards.build`") from error
    if size != shard.bytes:
        word = "truncated" if size < shard.bytes else "altered"
        raise UserError(
            f"shard {path} is {word}: {size} bytes, the manifest says {shard.bytes}; "
            f"remove it and run `python -m shards.build` again"
        )
    if verify:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != shard.sha256:
            raise UserError(
                f"shard {path} is altered (its SHA-256 differs from the manifest's); "
                f"remove it and run `python -m shards.build` again"
            )


def root_of(folder: str | os.PathLike[str]) -> Path | str:
    """A folder as a path, a URL as it is."""
    return os.fspath(folder) if is_remote(folder) else Path(folder)


def place_of(folder: str | os.PathLike[str]) -> str:
    """One name of a folder, wherever it is asked for and through whichever link; a URL as it is."""
    root = root_of(folder)
    return str(root.resolve()) if isinstance(root, Path) else root.rstrip("/")


def file_in(root: Path | str, name: str) -> Path | str:
    """Where a file of a folder or URL lies."""
    return root / name if isinstance(root, Path) else f"{root.rstrip('/')}/{name}"


def _build(root: Path | str) -> str:
    return f"build shards with `python -m shards.build --source SRC --out {root}`"


def _read_table(root: Path | str, split: str, manifest: dict[str, Any]) -> Table:
    if split not in manifest["indexes"]:
        there = ", ".join(sorted(manifest["indexes"])) or "none"
        raise UserError(f"{root} has no split {split!r}; it has: {there}")
    line = manifest["indexes"][split]
    path = file_in(root, line["file"])
    try:
        with open_store(root).open(line["file"]) as file:
            return _columns(file, line)
    except FileNotFoundError as error:
        raise UserError(f"index {path} is missing; run `{rebuild_command(root)}`") from error
    except OSError as error:
        raise UserError(f"index {path} cannot be read ({error}); make it readable and start again") from error
    except ValueError as error:
        raise UserError(f"index {path} {error}; run `{rebuild_command(root)}`") from error


def _columns(file: io.BufferedIOBase, line: dict[str, Any]) -> Table:
    """The columns of an index file, read one by one: a local file's bytes are never held beside them.

    ValueError where it is not the file that the manifest's `line` tells of.
    """
    if hashlib.file_digest(file, "sha256").hexdigest() != line["sha256"]:
        word = "truncated" if file.seek(0, os.SEEK_END) < line["bytes"] else "altered"
        raise ValueError(f"is {word} (its SHA-256 differs from the manifest's)")
    file.seek(0)
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot be read ({error})") from error


def table_of(shards: Sequence[ShardRows]) -> Table:
    """The columns of one split from its scanned shards, in shard order.

    Each [n], but for `masks_valid` bool [n, 6] and what codes [n] choose from: `box_table` fp32 [boxes, 12, 4]
    (fractions of the photo, padded with zeros), `group_names` and `city_names`.
    """
    rows = [row for shard in shards for row in shard.rows]
    groups, group_code = np.unique(np.asarray([str(row["group"] or "") for row in rows]), return_inverse=True)
    cities, city_code = np.unique(np.asarray([row["city"] for row in rows]), return_inverse=True)
    boxes = np.zeros((len(rows), MAX_VIEWS, 4), dtype=np.float32)
    for padded, row in zip(boxes, rows, strict=True):
        padded[: len(row["boxes"])] = row["boxes"]
    box_table, box_code = np.unique(boxes, axis=0, return_inverse=True)

    def column(name: str, kind: Any, null: float) -> npt.NDArray[Any]:
        return np.asarray([null if row[name] is None else row[name] for row in rows], dtype=kind)

    def place(name: str) -> Table:
        spans = np.asarray([row[f"{name}_at"] for row in rows], dtype=np.int64)
        return {f"{name}_offset": spans[:, 0].copy(), f"{name}_size": spans[:, 1].copy()}

    return {
        "id": np.char.encode(np.asarray([row["id"] for row in rows]), "utf-8"),
        "group_names": groups, "group_code": group_code.astype(np.int32),
        "city_names": cities, "city_code": city_code.astype(np.int32),
        "label": column("label", np.int8, -1),
        "latitude": column("latitude", np.float64, np.nan), "longitude": column("longitude", np.float64, np.nan),
        "gps_weight": column("gps_weight", np.float64, 1.0),
        "weather": column("weather", np.int16, -1), "daytime": column("daytime", np.int16, -1),
        "scene": column("scene", np.int16, -1),
        "num_views": np.asarray([len(row["boxes"]) for row in rows], dtype=np.int16),
        "masks_valid": np.asarray([row["masks_valid"] for row in rows], dtype=bool),
        "width": column("width", np.int32, 0), "height": column("height", np.int32, 0),
        "shard": np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.rows) for shard in shards]),
        "box_table": box_table, "box_code": box_code.reshape(-1).astype(np.int32),
        "views_crc": column("crc", np.uint32, 0), **place("views"), **place("meta"), **place("masks"),
    }  # fmt: skip


def write_index(
    folder: str | os.PathLike[str], shards: Sequence[ShardRows], extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write the index of every split that `shards` cover, then the manifest; returns the manifest.

    Args:
        shards: what `scan_shard` found, of all splits, in any order.
        extra: further keys of the manifest (clusters, coverage, prior, ...).

    Raises:
        UserError: no shards at all, or shards of different view sizes.
    """
    ordered = sorted(shards, key=lambda shard: (SPLITS.index(shard.info.split), parse_shard_name(shard.info.name)[1]))
    sizes = {shard.view_size for shard in ordered}
    if len(sizes) != 1:
        raise UserError(
            f"{folder}: shards of {len(ordered)} files hold views of {sorted(sizes)} px; build with one view size"
        )
    size = sizes.pop()
    tables = {}
    for split in SPLITS:
        if mine := [shard for shard in ordered if shard.info.split == split]:
            tables[split] = table_of(mine)
    fixed = {
        "schema_version": SCHEMA_VERSION,
        "view_size": size,
        "mask_size": size // MASK_STRIDE,
        "shards": [asdict(shard.info) for shard in ordered],
        "indexes": {},
    }
    return _commit(root_of(folder), {**(extra or {}), **fixed}, tables)


def update_index(
    folder: str | os.PathLike[str],
    columns: Mapping[str, Mapping[str, npt.NDArray[Any]]],
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Replace columns (`{split: {"gps_weight": array}}`) and manifest keys in one atomic step; the tars stay.

    Arrays have the shape of the column that they replace, [n] or [n, 6], and take its dtype.

    Raises:
        ValueError: no such column, or another shape.
        UserError: no such split, or an index that is missing or damaged.
    """
    root = root_of(folder)
    manifest = read_manifest(root)
    tables = {}
    for split, changed in columns.items():
        table = _read_table(root, split, manifest)
        for name, values in changed.items():
            if name not in table or np.shape(values) != table[name].shape:
                raise ValueError(f"column {name} of {split}: shape {np.shape(values)} does not fit the index")
            table[name] = np.asarray(values, dtype=table[name].dtype)
        tables[split] = table
    return _commit(root, {**manifest, **(extra or {})}, tables)


def rebuild_index(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Make index and manifest again from the tars alone. GPS weights are then those of the build.

    Of the build's options it finds again what training and the service ask for. UserError where there are no tars, or
    one cannot be read.
    """
    root = root_of(folder)
    store = open_store(root)
    names = shards_in(store)
    if not names:
        raise UserError(
            f"there are no shards at {root}; build them with `python -m shards.build --source SRC --out {root}`"
        )
    shards = [scan_stored(root, store, name) for name in names]
    described = any(row["has_text"] for shard in shards for row in shard.rows)
    options = {"max_views": _most_views(shards), "text_encoder": "unknown" if described else ""}
    return write_index(root, shards, {"rebuilt_from_tars": True, "options": options})


def _most_views(shards: Sequence[ShardRows]) -> int:
    """The largest `max_views` with which every photo of `shards` has as many views as it has."""
    cuts = {(row["width"], row["height"], shard.view_size, len(row["boxes"])) for shard in shards for row in shard.rows}
    for most in range(MAX_VIEWS, 0, -1):
        if all(len(view_boxes(width, height, size, most)) == views for width, height, size, views in cuts):
            return most
    return MAX_VIEWS  # cut by another rule


def shards_in(store: Store) -> list[str]:
    """Names of the shards that lie in a store, whether its manifest knows them or not."""
    return [name for name in store.names() if name.endswith(".tar") and name.startswith(tuple(f"{s}-" for s in SPLITS))]


def scan_stored(root: Path | str, store: Store, name: str) -> ShardRows:
    """`scan_shard` of a shard in a store."""
    with store.fetched(name) as path:
        return scan_shard(path, file_in(root, name))


def _commit(root: Path | str, manifest: dict[str, Any], tables: Mapping[str, Table]) -> dict[str, Any]:
    """Index files under names of their content, then the manifest in one step, then old index files are removed."""
    store = open_store(root)
    indexes = dict(manifest["indexes"])
    for split, table in tables.items():
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **table)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()
        name = f"{split}.index-{digest[:16]}.npz"
        store.write(name, data)
        indexes[split] = {"file": name, "sha256": digest, "bytes": len(data), "count": len(table["label"])}
    manifest = {**manifest, "indexes": indexes}
    store.write(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")
    kept = {line["file"] for line in indexes.values()}
    for old in store.names():
        if ".index-" in old and old.endswith(".npz") and old not in kept:
            store.remove(old)
    return manifest
