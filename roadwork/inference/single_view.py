"""The photo as the challenge sends it, undegraded: one centred square of 224 px, no metadata."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from roadwork.data.batch import Batch
from roadwork.data.index import ShardIndex
from roadwork.evaluation import challenge
from roadwork.evaluation.photos import stitched
from roadwork.inference.members import Members
from roadwork.models.saved import padded


def photos_of(index: ShardIndex, batch: Batch) -> Iterator[challenge.Picture]:
    """The photos of a batch on the CPU, stitched from the views that it holds; an unreadable one is black."""
    for k, row in enumerate(batch.sample.tolist()):
        if batch.weight[k] > 0:
            yield stitched(index, row, views=batch.views[k, batch.view_mask[k]].numpy())
        else:
            yield np.zeros((challenge.SIZE, challenge.SIZE, 3), dtype=np.uint8)


def as_sent(photo: challenge.Picture) -> challenge.Picture:
    """The photo as an undegraded question of the challenge."""
    return challenge.open_picture(challenge.jpeg(challenge.centre_square(photo)))


@torch.inference_mode()
def single_view_log_odds(members: Members, index: ShardIndex, batch: Batch, device: torch.device) -> Tensor:
    """Log-odds float64 [B,M] of every member for the photos of a batch on the CPU."""
    cut = [members.model.cut(as_sent(photo)) for photo in photos_of(index, batch)]
    views, mask, boxes = (value.to(device) for value in padded(cut))
    return members.decide(members.encode(views, mask, boxes), None)[0]
