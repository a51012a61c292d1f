"""The saved network over a split: its answers, where it looked, and how large the objects are, in one reading."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch

from roadwork.config import Config
from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex
from roadwork.data.loader import EvalLoader
from roadwork.engine import Engine
from roadwork.errors import UserError
from roadwork.evaluation.errors import covered
from roadwork.inference.calibration import analytic_shift, shift_to_prior
from roadwork.inference.plan import prior_of_draws
from roadwork.inference.single_view import as_sent, photos_of
from roadwork.models import RoadworkDetector
from roadwork.monitoring.progress import Progress


def load(
    folder: Path, config: Config, index: ShardIndex, train: ShardIndex | None, notes: list[str], device: torch.device
) -> RoadworkDetector:
    """The saved network, moved to predict.prior: from the prior of its calibration, or without one from that of the draws.

    train: the split whose draws those are; None: nobody knows them, and the answers are left as they are.
    UserError where the shards' views have another size, or `folder` holds no network of this package.
    """
    network = RoadworkDetector.from_pretrained(folder, device)
    if network.view_size != index.view_size:
        raise UserError(
            f"the shards have views of {index.view_size} px, the model in {folder} wants {network.view_size}; "
            f"build shards with --view-size {network.view_size}"
        )
    if other := other_cut(network, index):
        notes.append(other)
    if network.calibration is None:
        told = "are not shifted to the prior: the shards have no train split, so that of its draws is unknown"
        if train is not None:
            shift = analytic_shift(prior_of_draws(train, config), config.predict.prior)
            network.calibration = {"temperature": 1.0, "bias": shift}
            told = f"are shifted by {shift:+.3f} to the prior, from that of the draws of these shards' train split"
        notes.append(f"{folder.name}/ has no fitted calibration: its answers {told}")
    elif shift := shift_to_prior(network.calibration.get("prior"), config.predict.prior, f"{folder.name}/", notes):
        bias = network.calibration.get("bias", 0.0) + shift
        network.calibration |= {"bias": bias, "prior": config.predict.prior}
    return network


def other_cut(network: RoadworkDetector, index: ShardIndex) -> str:
    """A note where the shards cut photos into more or fewer views than the network by itself; else empty."""
    if network.max_views == index.max_views:
        return ""
    return (
        f"the shards have at most {index.max_views} views of a photo, the network cuts pictures into at most "
        f"{network.max_views}: figures on all views are of another input than the service sees"
    )


@dataclass(frozen=True)
class Seen:
    """What one pass over the photos gives, by id.

    systems: probabilities of `image_only` and `image_only_224`; attention: over the photo's views, 0 for a pruned one;
    shares: see `errors.object_share`, None where there was no pass.
    """

    systems: dict[str, dict[str, float]] = field(default_factory=dict)
    attention: dict[str, list[float]] = field(default_factory=dict)
    shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Answer:
    """Of one photo: probabilities on all views and on a single one, and what else `Seen` holds of it."""

    id: str
    all_views: float
    single_view: float
    attention: list[float]
    share: float
    readable: bool


def network_answers(
    network: RoadworkDetector, config: Config, engine: Engine, index: ShardIndex, notes: list[str]
) -> Seen:
    """The saved network's answers to every photo, and the photos' masks, in one reading. Collective."""
    found: list[Answer] = []
    loader = EvalLoader(
        index, batch=config.predict.batch, rank=engine.rank, world_size=engine.world_size,
        workers=config.data.workers, bad_sample_budget=1.0,
    )  # fmt: skip
    console = engine.is_main and config.monitoring.console
    with Progress("evaluate", len(index), enabled=console) as progress:
        for batch in loader:
            found += answer(network, config, index, batch, engine.device)
            progress.advance(len(batch.ids) * engine.world_size)
    everyone = {photo.id: photo for photo in engine.gather_object(found)}
    photos = [everyone[str(name)] for name in index.id]
    if lost := sorted(photo.id for photo in photos if not photo.readable):
        notes.append(f"{len(lost)} photos could not be read and are answered with the prior: {', '.join(lost[:5])}")
    systems = {
        "image_only": {photo.id: photo.all_views for photo in photos},
        "image_only_224": {photo.id: photo.single_view for photo in photos},
    }
    return Seen(systems, {p.id: p.attention for p in photos}, {p.id: p.share for p in photos})


@torch.inference_mode()
def answer(
    network: RoadworkDetector, config: Config, index: ShardIndex, batch: Batch, device: torch.device
) -> list[Answer]:
    """One batch's photos. An unreadable one is answered with the prior: that is all that is known of it."""
    prior, size = config.predict.prior, config.predict.batch
    alone = network.predict_batch([as_sent(photo) for photo in photos_of(index, batch)], batch=size)
    here = batch.to(device)
    outputs = network(here.views.float() / 255, here.view_mask, None, here.boxes, segmentation=False)
    full = network.probabilities(outputs.logits).tolist()
    attention = outputs.attention.new_zeros(here.view_mask.shape).scatter_add_(1, outputs.kept, outputs.attention)
    rows = zip(attention.tolist(), batch.view_mask.sum(1).tolist(), strict=True)
    weights = [[round(weight, 4) for weight in row[:views]] for row, views in rows]
    readable = (batch.weight > 0).tolist()
    return [
        Answer(name, p if there else prior, q if there else prior, seen, share, there)
        for name, p, q, seen, share, there in zip(
            batch.ids, full, alone, weights, shares_of(batch), readable, strict=True
        )
    ]


def shares_of(batch: Batch) -> list[float]:
    """`errors.object_share` of each photo of a batch, from the masks that it holds."""
    if batch.masks is None:
        return [math.nan] * len(batch.ids)
    known = (batch.masks_valid.any(1) & (batch.weight > 0)).tolist()
    masks = batch.masks[:, 0].numpy()
    return [covered(photo) if there else math.nan for photo, there in zip(masks, known, strict=True)]
