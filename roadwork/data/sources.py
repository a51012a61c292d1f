"""Where photos come from: the hub, parquet in the hub's schema, a CSV of files, the embedded street benchmark.

A source is read twice. `rows()` gives metadata only (pixels stay on disk or on the hub), from which splits, weights
and the plan of the shards follow; `load(refs)` then reads the pixels of chosen rows, in any process. So 15 GB on the
hub are read by byte range and never need to be on this disk.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import logging
import posixpath
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from roadwork.data.absent import if_there
from roadwork.data.record import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    Record,
    Rejected,
    flatten,
    image_bytes,
    parse_row,
)
from roadwork.errors import UserError

HUB_NAME = "natix-network-org/roadwork"
SPLITS = ("train", "val", "test", "predict")
_SPLIT_WORDS = {
    "train": "train",
    "test": "test",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "predict": "predict",
}
_SPLIT_IN_NAME = re.compile(r"(?:^|[/_.-])(train|test|validation|valid|val|predict)(?=[/_.-])")
_CSV_COLUMNS = (
    "path",
    "label",
    "id",
    "latitude",
    "longitude",
    "group",
    "weather",
    "daytime",
    "scene",
    "description",
    "split",
    "city",
    "city_name",
)

_READ_AT_ONCE = 4 << 20
"""Bytes of a column that are asked for together; without such a bound Arrow reads a row group's columns as a whole."""

Ref = tuple[int, int, int]
"""File, row group and row within it."""
Drawn = Callable[[int, int], None]
"""Told (photos drawn, photos in all)."""


class Source(Protocol):
    """Anything that photos can be read from. Must be picklable: `load` and `stamp` run in worker processes."""

    name: str
    extra_columns: list[str]

    def rows(self) -> Iterator[tuple[Ref, dict[str, Any]]]:
        """Metadata of every row in the public schema, without pixels; `split` holds the published split or None."""

    def load(self, refs: Sequence[Ref]) -> Iterator[tuple[Ref, bytes, bytes | None]]:
        """(ref, encoded photo, encoded masks or None) of the chosen rows, in the given order within a row group."""

    def stamp(self, ref: Ref) -> str:
        """Changes when the bytes behind the row may have changed."""


def open_source(
    spec: str,
    work_dir: str | Path | None = None,
    seed: int = 0,
    processes: int | None = None,
    progress: Drawn | None = None,
) -> Photos:
    """`natix`, `street[:N]`, `csv:FILE`, or a folder, glob, file or fsspec URL of parquet.

    work_dir keeps the embedded benchmark's parquet between calls; without it a temporary folder is used, and
    `progress` is told while it is drawn.
    Raises UserError where the source is missing, unreachable or of another schema.
    """
    if spec == "natix":
        return Photos(HubSource())
    if spec == "street" or spec.startswith("street:"):
        return Photos(street_source(spec, work_dir, seed, processes, progress))
    if spec.startswith("csv:"):
        return Photos(CsvSource(spec.removeprefix("csv:")))
    return Photos(ParquetSource(spec))


class Photos:
    """Iterates a source as Records with pixels; what cannot be parsed is in `rejected` afterwards as (id, reason)."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.rejected: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[Record]:
        self.rejected = []
        window: dict[Ref, dict[str, Any]] = {}
        last: tuple[int, int] | None = None
        for ref, row in self.source.rows():
            if window and (ref[:2] != last or len(window) >= 64):
                yield from self._parsed(window)
                window = {}
            window[ref], last = row, ref[:2]
        yield from self._parsed(window)

    def _parsed(self, window: dict[Ref, dict[str, Any]]) -> Iterator[Record]:
        for ref, image, masks in self.source.load(list(window)):
            row = window[ref] | {"image": image, "masks": masks}
            try:
                yield parse_row(row).but(split=row.get("split"))
            except Rejected as error:
                self.rejected.append((str(row.get("id")), error.reason))


# ---------------------------------------------------------------------------------------------- parquet


@dataclass(frozen=True)
class ParquetFile:
    """One file: where it is, which published split its name says, and what identifies its content."""

    url: str
    split: str | None
    stamp: str
    row_groups: int


@dataclass
class ParquetSource:
    """Parquet in the public schema, flat or nested, under a folder, glob, file or any fsspec URL."""

    spec: str
    name: str = ""
    files: list[ParquetFile] = field(default_factory=list)
    extra_columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or self.spec
        if not self.files:
            self.files = [self._file(url) for url in self._urls()]

    def _urls(self) -> list[str]:
        try:
            fs, path = fsspec.core.url_to_fs(self.spec)
            if any(mark in path for mark in "*?["):
                found = fs.glob(path)
            elif fs.isdir(path):
                found = fs.glob(path.rstrip("/") + "/**/*.parquet")
            else:
                found = [path] if fs.exists(path) else []
        except (ValueError, ImportError, OSError) as error:
            raise UserError(f"source {self.spec}: {error}") from error
        if not found:
            raise UserError(
                f"source {self.spec}: no parquet there; give natix, street[:N], csv:FILE, "
                "or a folder, glob or URL of parquet files"
            )
        return [fs.unstrip_protocol(path) for path in sorted(found)]

    def _file(self, url: str) -> ParquetFile:
        fs, path = fsspec.core.url_to_fs(url)
        try:
            info = fs.info(path)
            with fs.open(path, "rb") as stream:
                file = pq.ParquetFile(stream)
                self._check(url, file.schema_arrow)
                row_groups = file.num_row_groups
        except pa.ArrowInvalid as error:
            raise UserError(
                f"source {url}: not a readable parquet file ({str(error).splitlines()[0][:120]})"
            ) from error
        except OSError as error:
            raise UserError(f"source {url}: cannot be read ({error})") from error
        identity = [info.get(key) for key in ("size", "mtime", "etag", "ETag", "sha256", "blob_id", "LastModified")]
        return ParquetFile(url, split_of_name(path), f"{posixpath.basename(path)} {identity}", row_groups)

    def _check(self, url: str, schema: pa.Schema) -> None:
        types = flat_types(schema)
        missing = [name for name in REQUIRED_COLUMNS if name not in types]
        if missing:
            raise UserError(
                f"source {url}: required column {', '.join(missing)} is missing; it holds {', '.join(schema.names)}"
            )
        for name, kind in types.items():
            allowed = _wrong_type(name, kind)
            if allowed:
                raise UserError(f"source {url}: column {name} has the type {kind}; it must be {allowed}")
        known = set(REQUIRED_COLUMNS) | set(OPTIONAL_COLUMNS) | {"split"}
        self.extra_columns = sorted(set(self.extra_columns) | (set(types) - known))

    def rows(self) -> Iterator[tuple[Ref, dict[str, Any]]]:
        for number, entry in enumerate(self.files):
            with _reading(entry.url), fsspec.open(entry.url, "rb") as stream:
                file = pq.ParquetFile(stream)
                names = [name for name in _top_level(file.schema_arrow) if name not in ("image", "masks")]
                for group in range(file.num_row_groups):
                    table = file.read_row_group(group, columns=names)
                    for row, values in enumerate(table.to_pylist()):
                        flat = flatten(values)
                        yield (number, group, row), flat | {"split": split_word(flat.get("split")) or entry.split}

    def load(self, refs: Sequence[Ref]) -> Iterator[tuple[Ref, bytes, bytes | None]]:
        position = 0
        while position < len(refs):
            number, group = refs[position][:2]
            end = position + 1
            while end < len(refs) and refs[end][:2] == (number, group) and refs[end - 1] < refs[end]:
                end += 1
            with _reading(self.files[number].url):
                yield from self._load_group(number, group, refs[position:end])
            position = end

    def _load_group(self, number: int, group: int, refs: Sequence[Ref]) -> Iterator[tuple[Ref, bytes, bytes | None]]:
        """Rows of one group that ascend, streamed up to the last of them: a group may be a whole file of many GB."""
        with fsspec.open(self.files[number].url, "rb") as stream:
            file = pq.ParquetFile(stream, buffer_size=_READ_AT_ONCE, pre_buffer=False)
            columns = [name for name in ("image", "masks") if name in file.schema_arrow.names]
            start, wanted = 0, 0
            for batch in file.iter_batches(16, row_groups=[group], columns=columns, use_threads=False):
                while refs[wanted][2] < start + batch.num_rows:
                    row = refs[wanted][2] - start
                    image = image_bytes(batch["image"][row].as_py())
                    masks = image_bytes(batch["masks"][row].as_py()) if "masks" in columns else b""
                    yield refs[wanted], image, masks or None
                    wanted += 1
                    if wanted == len(refs):
                        return
                start += batch.num_rows
        raise IndexError(f"row group {group} has {start} rows, row {refs[wanted][2]} was there before")

    def stamp(self, ref: Ref) -> str:
        return self.files[ref[0]].stamp


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """UserError for a file that was there when the source was opened and cannot be read now: a network, a disk, a change
    behind our back. Backends raise what they like for it."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        raise UserError(
            f"source {url}: cannot be read any more ({type(error).__name__}: {reason}); run the same command again: "
            f"finished shards are kept"
        ) from error


def _top_level(schema: pa.Schema) -> list[str]:
    """Top-level columns that hold anything we read."""
    known = set(REQUIRED_COLUMNS) | set(OPTIONAL_COLUMNS) | {"split"}
    parents = {name.split(".")[0] for name in known}
    return [name for name in schema.names if name in known or name in parents]


def flat_types(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Flat dotted names to types; structs other than `image` are opened."""
    types: dict[str, pa.DataType] = {}
    for item in schema:
        if pa.types.is_struct(item.type) and item.name not in ("image", "masks"):
            types |= {f"{item.name}.{child.name}": child.type for child in item.type}
        else:
            types[item.name] = item.type
    return types


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index: int = kind.get_field_index("bytes")
        return index >= 0 and _is_bytes(kind.field(index).type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _wrong_type(name: str, kind: pa.DataType) -> str:
    """What the type of a column must be; empty where it is right."""
    if name in ("image", "masks"):
        empty_masks = name == "masks" and pa.types.is_null(kind)
        return "" if _is_bytes(kind) or empty_masks else "bytes, or a struct with bytes"
    if pa.types.is_null(kind):
        return ""
    whole = pa.types.is_integer(kind)
    if name == "id":
        return "" if whole or _is_text(kind) else "an integer or a string"
    if name == "label":
        return "" if whole or pa.types.is_boolean(kind) or pa.types.is_floating(kind) else "an integer"
    if name == "gps":
        pair = _is_list(kind) and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
        return "" if _is_text(kind) or pair else 'a string "[latitude, longitude]"'
    if name == "video_info.vid_id":
        return "" if _is_text(kind) or whole else "a string"
    if name.startswith("scene_level_tags."):
        words = _is_list(kind) and _is_text(kind.value_type)
        return "" if _is_text(kind) or words else "a string"
    if name in ("city_name", "scene_description"):
        return "" if _is_text(kind) else "a string"
    return ""


def split_of_name(path: str) -> str | None:
    """Published split in a file's name or its folder (`data/train-00000-of-00026.parquet`), else None."""
    tail = "/".join(path.split("/")[-2:])
    found = _SPLIT_IN_NAME.findall(tail.lower())
    return _SPLIT_WORDS[found[-1]] if found else None


def split_word(value: Any) -> str | None:
    """A split by name; None for nothing. Raises UserError for an unknown word."""
    word = str(value or "").strip().lower()
    if word and word not in _SPLIT_WORDS:
        raise UserError(f"split {value!r} is unknown; allowed: {', '.join(SPLITS)} or empty")
    return _SPLIT_WORDS.get(word)


# ---------------------------------------------------------------------------------------------- hub and street


def HubSource(name: str = HUB_NAME) -> ParquetSource:  # noqa: N802 - reads like the other sources
    """The hub's parquet, resolved by `datasets` and read by byte range."""
    logging.disable(logging.WARNING)  # the hub's client tells its retries; the one line below says what matters
    try:
        import datasets

        files = datasets.load_dataset_builder(name).config.data_files or {}
        listed = [(str(split), str(url)) for split, urls in files.items() for url in urls]
    except Exception as error:  # datasets raises a dozen kinds for no network, no access, no such name
        raise UserError(
            f"source natix: the hub's {name} cannot be reached ({type(error).__name__}); download its parquet files "
            f"elsewhere (hf download {name} --repo-type dataset) and give their folder as the source"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    if not listed:
        raise UserError(f"source natix: the hub's {name} lists no parquet files; give a folder of them as the source")
    source = ParquetSource.__new__(ParquetSource)
    source.spec, source.name, source.files, source.extra_columns = name, "natix", [], []
    for split, url in sorted(listed):
        entry = source._file(url)
        source.files.append(ParquetFile(entry.url, split_word(split), entry.stamp, entry.row_groups))
    return source


def street_source(
    spec: str, work_dir: str | Path | None, seed: int, processes: int | None, progress: Drawn | None = None
) -> ParquetSource:
    """The embedded benchmark: drawn once, written in the public schema, and read back like any other parquet."""
    text = spec.partition(":")[2] or "1000"
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"source {spec}: N in street:N is a whole number of photos, 1 or more")
    from roadwork.data import street

    folder = Path(work_dir) if work_dir is not None else Path(tempfile.mkdtemp(prefix="roadwork-street-"))
    code = sorted(Path(street.__file__).parent.glob("street*.py"))
    drawn_by = hashlib.sha256(b"".join(path.read_bytes() for path in code)).hexdigest()[:16]
    wanted = f"street n={int(text)} seed={seed} code={drawn_by}\n"
    marker = folder / "COMPLETE"
    if not marker.is_file() or marker.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [marker, *folder.glob("**/*.parquet")]:
            stale.unlink(missing_ok=True)
        street.write_parquet(folder, int(text), seed, processes, progress)
        marker.write_text(wanted)
    return ParquetSource(str(folder), name=spec)


# ---------------------------------------------------------------------------------------------- csv


@dataclass
class CsvSource:
    """Photos as files, named by a CSV with the header `path,label` and what else is known."""

    path: str
    name: str = ""
    extra_columns: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or f"csv:{self.path}"
        file = Path(self.path)
        if not file.is_file():
            raise UserError(f"source {self.name}: no such file; give a CSV with the header path,label")
        try:
            with file.open(newline="", encoding="utf-8-sig") as stream:
                reader = csv.DictReader(stream)
                names = [(name or "").strip().lower() for name in reader.fieldnames or []]
                reader.fieldnames = names
                self.table = [self._row(row) for row in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"source {self.name}: not a CSV in UTF-8 ({error})") from error
        except OSError as error:
            raise UserError(f"source {self.name}: cannot be read ({error})") from error
        if "path" not in names:
            raise UserError(f"source {self.name}: the column path is missing; the header holds {','.join(names)}")
        if not self.table:
            raise UserError(f"source {self.name}: no photo below the header")
        self.extra_columns = sorted(set(names) - set(_CSV_COLUMNS) - {""})

    def __getstate__(self) -> dict[str, Any]:
        """Paths alone: worker processes `load` and `stamp`, and need nothing else of a table of millions of rows."""
        return self.__dict__ | {"table": [{"path": row["path"]} for row in self.table]}

    @staticmethod
    def _row(raw: dict[str, Any]) -> dict[str, Any]:
        def get(name: str) -> str:
            return (raw.get(name) or "").strip()

        row: dict[str, Any] = {
            "path": get("path"),
            "id": get("id") or get("path"),
            "label": get("label"),
            "city_name": get("city_name") or get("city"),
            "video_info.vid_id": get("group"),
            "scene_level_tags.weather": get("weather"),
            "scene_level_tags.daytime": get("daytime"),
            "scene_level_tags.scene_environment": get("scene"),
            "scene_description": get("description"),
            "split": get("split"),
        }
        if get("latitude") or get("longitude"):
            row["gps"] = [get("latitude"), get("longitude")]
        return row

    def rows(self) -> Iterator[tuple[Ref, dict[str, Any]]]:
        for number, row in enumerate(self.table):
            yield (0, 0, number), row | {"split": split_word(row["split"])}

    def _photo(self, ref: Ref) -> Path:
        name: str = self.table[ref[2]]["path"]
        return Path(self.path).parent / name

    def load(self, refs: Iterable[Ref]) -> Iterator[tuple[Ref, bytes, bytes | None]]:
        for ref in refs:
            photo, data = self._photo(ref), b""
            with if_there("photo", photo):
                data = photo.read_bytes()
            yield ref, data, None

    def stamp(self, ref: Ref) -> str:
        photo = self._photo(ref)
        with if_there("photo", photo):
            info = photo.stat()
            return f"{info.st_size} {info.st_mtime_ns}"
        return "missing"
