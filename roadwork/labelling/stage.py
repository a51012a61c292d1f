"""The labelling stage: many processes, one folder, no talking.

Units of `batch` consecutive positions go round robin to the processes (and to the tasks of a Slurm array). What a unit
is depends on the source and the batch alone, so every photo is computed in the same company whatever the number of
processes, and the masks are the same to the last byte. A photo's files are its own checkpoint: a relaunch, on any
number of processes, does the units that miss one.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from roadwork.data.mask_files import ABOUT, file_stem, has_masks, write_atomically, write_masks
from roadwork.errors import UserError
from roadwork.labelling.backend import Backend, Photo
from roadwork.labelling.source import DUPLICATE, Loaded, PhotoSource
from roadwork.monitoring.progress import Progress

log = logging.getLogger(__name__)

SETTINGS = f"{ABOUT}/settings.json"
SUMMARY = f"{ABOUT}/summary.json"
FAILED = f"{ABOUT}/failed"
"""Folder of one json per photo that failed; removed when a later run succeeds."""
ENDED = f"{ABOUT}/ended"
"""Folder of one mark per process that has done its share."""
HOPELESS = 20
"""This many failures without one success end the run: it is not the photos."""
PREFETCH = 4
"""Decoded photos that wait for the model."""


class Process(Protocol):
    """What the stage needs of `roadwork.engine.Engine`."""

    rank: int
    world_size: int

    @property
    def is_main(self) -> bool: ...

    def barrier(self) -> None: ...


@dataclass(frozen=True)
class Share:
    """Which part of the units is this process's.

    Attributes:
        index: 0..count-1 over all processes of all array tasks.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, process: Process, environ: Mapping[str, str], part: str = "") -> Share:
        """From the process and the part of the work that all processes of this launch have.

        Args:
            process: rank and number of processes.
            environ: where a Slurm job array says which task this is.
            part: `I/N`, before what the array says.

        Raises:
            UserError: see `parse_part` and `array_part`.
        """
        index, count = parse_part(part) if part else array_part(environ)
        return cls(index * process.world_size + process.rank, count * process.world_size)


@dataclass
class Result:
    """What one process did.

    Attributes:
        total: photos of this process's share. kept: found done. made: labelled now. without: the backend knows
            nothing about them. failed: id -> reason. seconds: wall time.
    """

    total: int = 0
    kept: int = 0
    made: int = 0
    without: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def parse_part(part: str) -> tuple[int, int]:
    """(index from 0, count) of `I/N` with 1 <= I <= N. Raises UserError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"masks.part is {part!r}; it is I/N with I from 1 to N, such as 2/8")
    return int(found[1]) - 1, int(found[2])


def array_part(environ: Mapping[str, str]) -> tuple[int, int]:
    """(index from 0, count) of this task of a Slurm job array: `sbatch --array=0-7` makes eight parts; (0, 1) without.

    Raises:
        UserError: an array with gaps between its indices: a part of the photos would be nobody's.
    """
    tasks = int(environ.get("SLURM_ARRAY_TASK_COUNT", 1))
    if tasks == 1:
        return 0, 1
    first, last = int(environ["SLURM_ARRAY_TASK_MIN"]), int(environ["SLURM_ARRAY_TASK_MAX"])
    if last - first != tasks - 1:
        raise UserError(f"this job array has {tasks} tasks with gaps between their indices; use --array=0-{tasks - 1}")
    return int(environ["SLURM_ARRAY_TASK_ID"]) - first, tasks


def label_photos(
    photos: PhotoSource,
    backend: Backend,
    out: Path,
    share: Share,
    batch: int = 1,
    console: bool = False,
) -> Result:
    """Label this process's share of the photos into `out`.

    Args:
        photos: the source.
        backend: what makes masks.
        out: folder of masks.
        share: whose turn it is.
        batch: photos per unit.
        console: show a progress line.

    Raises:
        UserError: photo after photo fails and none succeeds.
        OSError: the folder cannot be written.
    """
    started = time.monotonic()
    mine = [unit for i, unit in enumerate(units(len(photos.ids), batch)) if i % share.count == share.index]
    result = Result(total=sum(len(unit) for unit in mine))
    missing = {p for unit in mine for p in unit if not has_masks(out, photos.ids[p])}
    todo = [unit for unit in mine if missing.intersection(unit)]
    result.kept = result.total - len(missing)
    loaded = _ahead(photos.load([p for unit in todo for p in unit]))
    with Progress("pseudo_masks", len(missing), enabled=console) as progress:
        for unit in todo:
            _label_unit([next(loaded) for _ in unit], missing, photos, backend, out, result)
            progress.advance(len(missing.intersection(unit)), {"failed": len(result.failed)} if result.failed else {})
            if len(result.failed) >= HOPELESS and not result.made + result.kept + result.without:
                reason = next(reversed(result.failed.values()))
                raise UserError(f"the first {len(result.failed)} photos all failed, the last with: {reason}")
    result.seconds = time.monotonic() - started
    return result


def units(count: int, batch: int) -> list[range]:
    """Consecutive positions that are labelled together, `batch` at a time; UserError for less than 1."""
    if batch < 1:
        raise UserError(f"masks.batch is {batch}; it must be at least 1")
    return [range(start, min(start + batch, count)) for start in range(0, count, batch)]


def _label_unit(
    loaded: list[Loaded], missing: set[int], photos: PhotoSource, backend: Backend, out: Path, result: Result
) -> None:
    """Label one unit; whoever fails is recorded, the others are labelled all the same."""
    good = [(position, photo) for position, photo in loaded if isinstance(photo, Photo)]
    for position, photo in loaded:
        if isinstance(photo, str) and position in missing:
            _record_failure(out, photos.ids[position], position, photo, result)
    for (position, photo), masks in zip(good, _try_label(backend, [photo for _, photo in good]), strict=True):
        if position not in missing:
            continue
        if isinstance(masks, str):
            _record_failure(out, photo.id, position, masks, result)
        elif masks is None:
            result.without += 1
        else:
            write_masks(out, photo.id, masks)
            _failure_path(out, photo.id).unlink(missing_ok=True)
            result.made += 1


def _try_label(backend: Backend, photos: list[Photo]) -> list[Any]:
    """Masks, None, or the reason of a failure per photo. A unit that fails is tried again photo by photo."""
    if not photos:
        return []
    try:
        return list(backend.label(photos))
    except UserError:
        raise
    except Exception as error:  # whatever one photo provokes must not cost the night's work
        if len(photos) > 1:
            return [_try_label(backend, [photo])[0] for photo in photos]
        log.warning("%s failed", photos[0].id, exc_info=True)
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]


def _record_failure(out: Path, photo_id: str, position: int, reason: str, result: Result) -> None:
    log.warning("photo %s (position %d) is skipped: %s", photo_id, position, reason)
    if reason.startswith(DUPLICATE):
        return  # the photo itself is elsewhere, and has files of this name
    result.failed[photo_id] = reason
    path = _failure_path(out, photo_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"id": photo_id, "position": position, "reason": reason}).encode())


def _failure_path(out: Path, photo_id: str) -> Path:
    return out / FAILED / f"{file_stem(photo_id)}.json"


def _ahead(loaded: Iterator[Loaded]) -> Iterator[Loaded]:
    """The same, decoded in a thread of its own while the model works."""
    waiting: queue.Queue[Any] = queue.Queue(PREFETCH)
    stop = threading.Event()

    def put(item: Any) -> bool:
        while not stop.is_set():
            try:
                waiting.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in loaded:
                if not put(item):
                    return
            put(None)
        except BaseException as error:  # handed to the thread that waits
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()


def claim(out: Path, settings: dict[str, Any], process: Process) -> None:
    """Note how a folder's masks are made, or check that they are made in the same way: one folder, one kind of masks.

    Raises:
        UserError: the folder holds masks of other settings (names the first that differs).
    """
    path = out / SETTINGS
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if process.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_atomically(path, text.encode())
    process.barrier()
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is not JSON; remove it, or give another --masks.out") from None
    for key in sorted(settings.keys() | before.keys()):
        if before.get(key) != settings.get(key):
            raise UserError(
                f"{out} holds masks made with {key} {before.get(key)!r}, now {settings.get(key)!r} is asked for; "
                "give another --masks.out, or remove that folder"
            )


def note_start(out: Path, share: Share) -> None:
    """Take this process's mark of an earlier run away; before the barrier of `claim`."""
    _mark(out, share).unlink(missing_ok=True)


def note_end(out: Path, share: Share, result: Result) -> list[Result] | None:
    """Leave this process's mark. The last one to end gets everybody's results: it writes the summary.

    Marks are files, since a collective would time out where one process has an hour more to do than another, and the
    tasks of a job array share no process group.
    """
    path = _mark(out, share)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(asdict(result)).encode())
    results = []
    for index in range(share.count):
        try:
            results.append(Result(**json.loads(_mark(out, Share(index, share.count)).read_text())))
        except FileNotFoundError:
            return None
    return results


def _mark(out: Path, share: Share) -> Path:
    return out / ENDED / f"{share.index}-of-{share.count}.json"


def write_summary(out: Path, photos: PhotoSource, origin: str, results: Sequence[Result]) -> dict[str, Any]:
    """`summary.json`: what the folder holds now, and what failed. Returns it."""
    ids = set(photos.ids)
    done = sum(has_masks(out, photo_id) for photo_id in ids)
    failed = []
    for path in sorted((out / FAILED).glob("*.json")) if (out / FAILED).is_dir() else []:
        failed.append(json.loads(path.read_text()))
    failed.sort(key=lambda entry: entry["position"])
    seconds = max((result.seconds for result in results), default=0.0)
    made = sum(result.made for result in results)
    summary = {
        "origin": origin,
        "photos": len(ids),
        "with_masks": done,
        "without_masks": len(ids) - done - len(failed),
        "failed": failed,
        "labelled_now": made,
        "processes": len(results),
        "photos_per_s": round(made / seconds, 3) if seconds else None,
    }
    write_atomically(out / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    return summary
