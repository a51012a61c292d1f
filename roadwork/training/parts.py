"""What a training run is made of: data, model and optimizer, from the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from roadwork.config import Config
from roadwork.data.index import ShardIndex, open_split
from roadwork.data.loader import EvalLoader, TrainLoader
from roadwork.data.order import EndlessOrder
from roadwork.data.table import open_order, stream_digest
from roadwork.engine import Engine
from roadwork.errors import UserError
from roadwork.models.detector import RoadworkDetector
from roadwork.models.groups import parameter_groups
from roadwork.training.atomic import replace_folder
from roadwork.training.counts import StepCounts
from roadwork.training.optimizers import build_optimizer


@dataclass
class Data:
    """The two splits, the order over the training split, and how far the run goes."""

    train: ShardIndex
    val: ShardIndex
    order: EndlessOrder
    kind: str
    """`global`, or `windowed by N`."""
    photos: str
    """SHA-256 of the photos and weights that the order draws from."""
    steps: int
    """Optimizer steps of the run."""
    end_position: int
    """Positions of the order from here on are past the end."""
    validate_every: int
    """Optimizer steps between validations."""
    view_size: int
    global_batch: int
    keep_ratio: float

    def train_loader(self, engine: Engine, config: Config, start_step: int) -> TrainLoader:
        """This rank's micro-batches from optimizer step `start_step` on."""
        return TrainLoader(
            self.train,
            self.order,
            global_batch=self.global_batch,
            micro_batch=config.training.micro_batch,
            rank=engine.rank,
            world_size=engine.world_size,
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            start_step=start_step,
            end_position=self.end_position,
            bad_sample_budget=None,  # judged over all ranks by the trainer: one rank alone must not leave
            load_text=config.model.reads_text,
        )

    def val_loader(self, engine: Engine, config: Config) -> EvalLoader:
        """This rank's photos of the validation split."""
        return EvalLoader(
            self.val,
            batch=config.predict.batch,
            rank=engine.rank,
            world_size=engine.world_size,
            workers=config.data.workers,
            bad_sample_budget=None,
            load_text=config.model.reads_text,
        )

    def counts(self, parts: int) -> StepCounts:
        """The losses' denominators; parts = processes times micro-batches per step."""
        return StepCounts(self.train, self.order, self.global_batch, self.end_position, self.keep_ratio, parts)


def build_data(config: Config) -> Data:
    """Open the shards and lay out the run.

    Raises:
        UserError: shards missing or altered, an empty split, no vectors for a text field that is on.
    """
    train, val = (open_split(config, split) for split in ("train", "val"))
    for name, index in (("train", train), ("val", val)):
        if not len(index):
            raise UserError(f"{config.data.shards} has no photo in split {name}; build shards with more photos")
    if not (val.label >= 0).any():
        raise UserError(f"{config.data.shards} has no label in split val, which chooses the weights; label some photos")
    if (
        config.model.metadata
        and "text" in config.model.metadata_fields
        and not train.manifest.get("options", {}).get("text_encoder")
    ):
        raise UserError(
            f"model.metadata_fields has text, and {config.data.shards} holds no vectors of descriptions; build the shards "
            f"again with --text-encoder minilm, or leave text out"
        )
    training, batch = config.training, config.training.global_batch
    weighted, window = config.data.gps_weighted, config.data.window if config.data.order == "windowed" else 0
    end = training.max_steps * batch if training.max_steps else round(training.epochs * len(train))
    by_epochs = max(1, math.ceil(training.validate_every_epochs * len(train) / batch))
    return Data(
        train=train,
        val=val,
        order=open_order(train, config.seed, weighted=weighted, window=window),
        kind=f"windowed by {window}" if window else "global",
        photos=stream_digest(train, weighted=weighted),
        steps=math.ceil(end / batch),
        end_position=end,
        validate_every=training.validate_every_steps or by_epochs,
        view_size=train.view_size,
        global_batch=batch,
        keep_ratio=config.model.keep_ratio,
    )


class Made(NamedTuple):
    """A detector and its optimizer, not yet prepared.

    The engine rounds what it is given to bf16; the masters and every saved model start from these fp32 tensors.
    """

    model: RoadworkDetector
    optimizer: torch.optim.Optimizer
    constants: dict[str, Tensor]
    """Frozen weights and buffers by name."""
    trainable: dict[str, Tensor]
    """Trainable weights by name, fp32."""


def build_model(config: Config, view_size: int) -> Made:
    """The detector with its initial or warm-start weights, and the optimizer over its parameter groups."""
    torch.manual_seed(config.seed)
    model = RoadworkDetector(config.model, view_size)
    if config.model.init_from:
        model.load_weights(config.model.init_from)
    training = {name: p.detach().clone().float() for name, p in model.named_parameters() if p.requires_grad}
    constants = {name: t.detach().clone() for name, t in model.state_dict().items() if name not in training}
    groups = parameter_groups(
        model,
        config.training.learning_rate,
        config.optimizer.weight_decay,
        config.model.layer_decay,
        config.model.backbone_lr_factor,
    )
    return Made(model, build_optimizer(config, groups), constants, training)


def save_model(folder: Path, model: RoadworkDetector, state: dict[str, Tensor]) -> None:
    """Write a `from_pretrained` folder from whole fp32 tensors; a reader sees the old one or the new one. Rank 0.

    state: by name, shaped like the model's own.

    Raises:
        OSError: a full or read-only disk; the old folder is untouched.
    """

    def fill(new: Path) -> None:
        try:
            model.save_pretrained(new, state=state)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    replace_folder(folder, fill)
