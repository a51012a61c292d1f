"""The pseudo-mask stage from its options: what `launch/pseudo_masks.py` calls."""

from __future__ import annotations

import fcntl
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from roadwork.config import Config, MasksConfig, masks_folder
from roadwork.data.mask_files import ABOUT
from roadwork.engine import Engine, launched_rank
from roadwork.errors import UserError
from roadwork.labelling import grounded, sam3
from roadwork.labelling.backend import PROMPTS, RANDOM_TINY, Backend, Limits
from roadwork.labelling.grounded import GroundedSamBackend
from roadwork.labelling.quality import write_quality
from roadwork.labelling.real import CocoMasks, RealBackend
from roadwork.labelling.sam3 import Sam3Backend
from roadwork.labelling.source import PhotoSource, open_photos
from roadwork.labelling.stage import (
    Share,
    claim,
    label_photos,
    note_end,
    note_start,
    parse_part,
    write_summary,
)
from roadwork.labelling.weights import model_folder, sam_checkpoint
from roadwork.monitoring.console import quiet_libraries
from roadwork.run_folder import prepare_folder

log = logging.getLogger(__name__)


def make_pseudo_masks(config: Config) -> dict[str, Any] | None:
    """Label every photo of the source into the folder of masks, or continue. Collective only at its start.

    Returns:
        The summary, on the process that ends last; None on the others.

    Raises:
        UserError: options, photos or weights that cannot work.
    """
    options = config.masks
    check(options)
    out = masks_folder(config)
    quiet_libraries(prepare_folder(config) / "logs" / f"pseudo_masks-rank-{launched_rank():04d}.log")
    # All that can be refused is refused on every process alike, before a process group starts.
    photos = _open(config, out)
    coco = CocoMasks(options.annotations) if options.annotations else None
    check_weights(options)
    engine = Engine.start(config, "pseudo_masks")
    if engine.device.type == "cpu":
        # Sums depend on the number of threads: with one, any number of processes draws the same masks to the last bit.
        torch.set_num_threads(config.engine.threads or 1)
    backend = make_backend(options, engine.device, config.seed, coco)
    share = Share.of(engine, os.environ, options.part)
    note_start(out, share)
    claim(out, settings(options, backend), engine)
    if engine.is_main:
        _say(f"{len(photos.ids)} photos, masks by {backend.origin}, {share.count} processes, into {out}")
    console = engine.is_main and config.monitoring.console
    result = label_photos(photos, backend, out, share, options.batch, console)
    results = note_end(out, share, result)
    summary = None
    if results is not None:
        summary = write_summary(out, photos, backend.origin, results)
        write_quality(out, photos, Path(options.compare) if options.compare else None)
        _report(out, summary)
    engine.close()
    return summary


def check(options: MasksConfig) -> None:
    """Refuse impossible options before anything starts. Raises UserError."""
    for name in ("score_threshold", "presence_threshold", "box_threshold"):
        if not 0 <= getattr(options, name) < 1:
            raise UserError(f"masks.{name} is {getattr(options, name)}; it lies in [0, 1)")
    if options.semantic and options.backend != "sam3":
        raise UserError(f"masks.semantic takes SAM 3's map; masks.backend is {options.backend}")
    if options.compare and not Path(options.compare).is_dir():
        raise UserError(f"masks.compare {options.compare}: no such folder; give one that launch/pseudo_masks.py wrote")
    if options.part:
        parse_part(options.part)
    if options.min_object_size < 0:
        raise UserError(f"masks.min_object_size is {options.min_object_size}; it is a number of pixels, 0 or more")
    if options.batch < 1:
        raise UserError(f"masks.batch is {options.batch}; it must be at least 1")
    if options.backend == "real" and not options.annotations and not options.source:
        raise UserError(
            "masks.backend real needs masks that people drew: give --masks.annotations FILE.json (COCO), or a "
            "--masks.source whose photos bring masks, such as street:40"
        )


def check_weights(options: MasksConfig) -> None:
    """Find or fetch the files of the model, without building it. Raises UserError where they cannot be had."""
    if options.backend == "real" or options.model.startswith(RANDOM_TINY):
        return
    if options.backend == "sam3":
        model_folder(options.model or sam3.DEFAULT_MODEL)
    else:
        detector, sam = grounded.split_name(options.model or grounded.DEFAULT_MODEL)
        model_folder(detector)
        sam_checkpoint(sam)


def make_backend(
    options: MasksConfig, device: torch.device | str, seed: int = 0, coco: CocoMasks | None = None
) -> Backend:
    """The backend that the options name; with annotations, real masks come first and the backend labels the rest.

    Raises:
        UserError: weights that cannot be had.
    """
    # A score is an object's own times the presence, so a presence below the score's threshold can never reach it.
    presence = max(options.presence_threshold, options.score_threshold)
    limits = Limits(options.score_threshold, presence, options.min_object_size)
    if options.backend == "real":
        return RealBackend(coco)
    made: Backend
    if options.backend == "sam3":
        made = Sam3Backend(options.model, device, limits, options.batch, semantic=options.semantic, seed=seed)
    else:
        made = GroundedSamBackend(options.model, device, limits, options.batch, options.box_threshold, seed)
    if "randomly initialised" in made.origin and launched_rank() == 0:
        log.warning("%s is randomly initialised: its masks are noise", options.model)
        _say(f"{options.backend}: {options.model} is randomly initialised; its masks are noise, good for a trial only")
    return RealBackend(coco, fallback=made) if coco else made


def settings(options: MasksConfig, backend: Backend) -> dict[str, Any]:
    """What decides the masks: kept in the folder, so that one folder holds one kind."""
    made = {
        "origin": backend.origin,
        **{name: getattr(options, name) for name in ("backend", "source", "tiles", "batch")},
    }
    if options.backend == "real":
        return made
    own = ("presence_threshold", "semantic") if options.backend == "sam3" else ("box_threshold",)
    thresholds = {name: getattr(options, name) for name in ("score_threshold", "min_object_size", *own)}
    return {**made, **thresholds, "prompts": PROMPTS}


def _open(config: Config, out: Path) -> PhotoSource:
    """Open the photos, one process after the other: the first draws an embedded source, the others find it drawn."""
    work = out / ABOUT / "source"
    try:
        work.mkdir(parents=True, exist_ok=True)
        with open(out / ABOUT / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return open_photos(config.masks.source, config.data.shards, config.masks.tiles, work, config.seed)
    except OSError as error:
        raise UserError(f"masks.out {out} cannot be written ({error.strerror or error})") from None


def describe(config: Config) -> None:
    """`--dry_run`: what would be labelled, and where to. Raises UserError for impossible options."""
    check(config.masks)
    source = config.masks.source or f"the shards of {config.data.shards}"
    _say(f"{source} would be labelled by {config.masks.backend} ({config.masks.model or 'its default'})")
    _say(f"into {masks_folder(config)}")


def _report(out: Path, summary: dict[str, Any]) -> None:
    rate = f" at {summary['photos_per_s']} photos/s" if summary["photos_per_s"] else ""
    _say(
        f"masks: {summary['with_masks']} of {summary['photos']} photos have them, {summary['labelled_now']} made "
        f"now{rate}, {len(summary['failed'])} failed, {summary['without_masks']} unknown to the backend"
    )
    _say(f"summary.json, quality.json and the contact sheet quality.png are in {out / ABOUT}")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
