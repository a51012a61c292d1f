"""The pre-trained model and what the folds make of it, as one network with a few weights exchanged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roadwork.config import Config
from roadwork.errors import UserError
from roadwork.models import Encoded, RoadworkDetector
from roadwork.models.adapters import Overrides, average, call_with, file_digest, merged_overrides
from roadwork.models.fold_files import fold_path, is_done, read_fold

PRETRAINED, SOUP = "pretrained", "soup"


@dataclass
class Members:
    """Networks that share all weights but their overrides.

    names: `pretrained`, then `fold-0`, ..., then `soup` (the folds' uniform average) where there are folds.
    own_encoder: members with a changed weight before the first decision layer, which must encode for themselves.
    """

    model: RoadworkDetector
    names: list[str]
    overrides: list[Overrides]
    own_encoder: list[bool]
    digests: dict[str, str]

    @property
    def folds(self) -> list[int]:
        """Columns of the ensemble: the pre-trained model and every fold, without the soup."""
        return [column for column, name in enumerate(self.names) if name != SOUP]

    def encode(self, views: Tensor, view_mask: Tensor, boxes: Tensor) -> list[Any]:
        """One encoding per member; members that share the encoder share the object.

        views [B,V,3,S,S], view_mask [B,V], boxes [B,V,4]: as `RoadworkDetector.forward` takes them.
        """
        shared = self.model.encode(views, view_mask, boxes, False)
        return [
            call_with(self.model, overrides, "encode", views, view_mask, boxes, False) if own else shared
            for own, overrides in zip(self.own_encoder, self.overrides, strict=True)
        ]

    def join(self, each: list[list[Any]]) -> list[Any]:
        """Encodings of several batches (augmentations) as one batch per member; shared ones are joined once."""
        if len(each) == 1:
            return each[0]
        joined: dict[int, Any] = {}
        for column, first in enumerate(each[0]):
            if id(first) not in joined:
                joined[id(first)] = Encoded.cat([one[column] for one in each])
        return [joined[id(first)] for first in each[0]]

    def decide(self, encoded: list[Any], metadata: dict[str, Tensor] | None) -> tuple[Tensor, Any]:
        """Log-odds float64 [B,M] of every member, and the pre-trained member's whole output."""
        outputs = [
            call_with(self.model, overrides, "decide", one, metadata, False)
            for one, overrides in zip(encoded, self.overrides, strict=True)
        ]
        logits = torch.stack([output.logits.double() for output in outputs], dim=1)
        return logits[..., 1] - logits[..., 0], outputs[0]


def find_members(config: Config) -> list[Path]:
    """Folders of the folds to load, after a look at best/ and them.

    Raises UserError where best/ is missing, where a fold is missing or was trained from other weights, and where the
    ensemble is demanded without folds.
    """
    run = Path(config.run.dir)
    best = run / "best" / "model.safetensors"
    if not best.is_file():
        raise UserError(f"no pre-trained model at {best.parent}; run launch/pretrain.py with --run.dir {run} first")
    paths = [] if config.predict.ensemble == "off" else fold_paths(run, file_digest(best))
    if config.predict.ensemble == "on" and not paths:
        raise UserError(f"predict.ensemble is on, but {run / 'folds'} has no folds; run launch/dora_folds.py first")
    return paths


def load_members(config: Config, folds: list[Path], device: torch.device) -> Members:
    """best/ and the folds, merged, as overrides of one network."""
    best = Path(config.run.dir) / "best"
    model = RoadworkDetector.from_pretrained(best, device).float().requires_grad_(False)
    digests = {PRETRAINED: file_digest(best / "model.safetensors")}
    names, overrides = [PRETRAINED], [Overrides()]
    for path in folds:
        names.append(path.name)
        overrides.append(merged_overrides(model, path))
        digests[path.name] = file_digest(path / "adapter_model.safetensors")
    if folds:
        names.append(SOUP)
        overrides.append(average(overrides[1:], dict(model.named_parameters())))
    own = [any(model.unit_of(name) is not None for name in changed) for changed in overrides]
    return Members(model, names, overrides, own, digests)


def fold_paths(run: Path, base: str) -> list[Path]:
    """Folders of all folds of a run in order; none where the run has no folder of folds.

    Raises UserError where some or all are missing, damaged or of another model.
    """
    folder = run / "folds"
    numbers = (path.name.removeprefix("fold-") for path in folder.glob("fold-*") if path.is_dir())
    paths = [fold_path(folder, n) for n in sorted(int(n) for n in numbers if n.isdecimal()) if is_done(folder, n)]
    if not paths and folder.is_dir():
        raise UserError(
            f"{folder} was begun and has no finished fold; run launch/dora_folds.py to finish them, "
            "or predict without them by --predict.ensemble off"
        )
    for number, path in enumerate(paths):
        details = read_fold(path)
        if details["base"] != base:
            raise UserError(
                f"{path} was trained from other weights than {run / 'best'}; remove {folder} and run "
                "launch/dora_folds.py again"
            )
        wanted = details["folds"]["num_folds"]
        if path.name != f"fold-{number}" or len(paths) != wanted:
            there = ", ".join(path.name for path in paths)
            raise UserError(f"{folder} has {there} of {wanted} folds; run launch/dora_folds.py to finish them")
    return paths
