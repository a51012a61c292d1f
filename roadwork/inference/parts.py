"""Results of a sharded stage: one append-only file per process, restartable, merged by id exactly once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from roadwork.errors import UserError

Record = dict[str, Any]


def part_paths(folder: Path, split: str) -> list[Path]:
    """Part files of a split, of whatever number of processes wrote them."""
    return sorted(folder.glob(f"{split}-rank-*.jsonl"))


def read_parts(folder: Path, split: str) -> dict[str, Record]:
    """Every finished photo of a split by id; a torn last line (a kill in the middle of a write) is not finished.

    Raises UserError where a photo stands in the parts twice, or a line that is not the last does not parse.
    """
    records: dict[str, Record] = {}
    for path in part_paths(folder, split):
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines[:-1]):
            try:
                record = json.loads(line)
                name = record["id"]
            except (ValueError, TypeError, KeyError):
                raise UserError(
                    f"{path} line {number + 1} is damaged; remove {folder} and run the prediction again"
                ) from None
            if name in records:
                raise UserError(
                    f"photo {name} stands twice in {folder} (second time in {path.name}); "
                    "remove that folder and run the prediction again"
                )
            records[name] = record
    return records


class PartWriter:
    """Appends whole batches to this process's part file: a kill loses at most the batch in work."""

    def __init__(self, folder: Path, split: str, rank: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{split}-rank-{rank:05d}.jsonl"
        self._file = self.path.open("ab")
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        content = self.path.read_bytes()
        keep = content.rfind(b"\n") + 1
        if keep != len(content):
            os.truncate(self.path, keep)

    def append(self, records: Iterable[Record]) -> None:
        """Write the records of one batch, on the disk when this returns."""
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def merge(records: dict[str, Record], ids: Sequence[str], what: str) -> list[Record]:
    """Records in the order of `ids`. Raises UserError unless the two sets of ids are equal and no id is doubled."""
    if len(set(ids)) != len(ids):
        raise UserError(f"{what}: the index holds {len(ids) - len(set(ids))} ids twice; build the shards again")
    missing = [name for name in ids if name not in records]
    foreign = sorted(set(records) - set(ids))
    if missing or foreign:
        first = missing[0] if missing else foreign[0]
        raise UserError(
            f"{what}: {len(missing)} photos of the index have no result and {len(foreign)} results no photo "
            f"(first: {first}); run the prediction again, it continues where it stopped"
        )
    return [records[name] for name in ids]


def open_parts(folder: Path, fingerprint: str) -> bool:
    """Keep parts made under the same fingerprint, else start empty (one process calls this). True where kept."""
    stamp = folder / "fingerprint"
    kept = stamp.is_file() and stamp.read_text() == fingerprint
    if not kept:
        for path in folder.glob("*.jsonl"):
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(stamp, fingerprint)
    return kept


def write_atomic(path: Path, content: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
