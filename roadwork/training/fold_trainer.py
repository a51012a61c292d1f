"""Trains one fold: DoRA adapters on the detector's decision part, in fp32, with early stopping by held-out MCC."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from scipy.special import expit
from torch import nn

from roadwork.config import Config, FoldsConfig
from roadwork.data.order import EpochOrder
from roadwork.errors import UserError
from roadwork.evaluation.metrics import confusion, log_loss, mcc
from roadwork.losses import FocalLoss
from roadwork.models import RoadworkDetector
from roadwork.models.adapters import attach
from roadwork.monitoring.progress import Progress
from roadwork.training.fold_cache import Prefix, PrefixSource

WARMUP = 0.1
"""Share of a fold's steps with a linearly rising learning rate."""
GRAD_CLIP = 1.0


@dataclass(frozen=True)
class FoldData:
    """The labelled training photos that folds are made of; all arrays have one entry per photo.

    rows: rows of the index; labels {0,1}; weights of the draws; fold: the fold that holds the photo out.
    """

    rows: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    fold: np.ndarray
    number: int


@dataclass
class FoldResult:
    """One trained fold: its adapters in memory, figures, and the held-out answers of its best epoch.

    readable: bool, one per held-out photo; false where it could not be decoded (its log-odds are 0).
    """

    model: PeftModel
    held: np.ndarray
    log_odds: np.ndarray
    readable: np.ndarray
    history: list[dict[str, float]]
    best_epoch: int


def learning_rate_factor(step: int, total: int) -> float:
    """Linear warm-up over WARMUP of the steps, then half a cosine to 0; step counts from 0."""
    warm = max(1, round(WARMUP * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters; magnitudes, biases and norms (all that is one-dimensional) are not decayed."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    free = [value for name, value in named if value.ndim < 2 or "lora_magnitude" in name]
    decayed = [value for name, value in named if not (value.ndim < 2 or "lora_magnitude" in name)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def copy_of(positions: np.ndarray, epoch: int, copies: int) -> np.ndarray:
    """Which fixed copy of each photo [N] an epoch sees: they take turns, so every copy is used. positions: int [N]."""
    return (positions + epoch) % copies


def own_copy(model: RoadworkDetector) -> RoadworkDetector:
    """A model to adapt: own modules and buffers, the SAME parameter tensors.

    peft leaves adapted weights as they are (adapters are new tensors, saved heads are copied), so a fold cannot change
    the pristine weights, and five folds of a large backbone cost the memory of one.
    """
    return copy.deepcopy(model, {id(value): value for value in model.parameters()})


def train_fold(
    pristine: RoadworkDetector,
    source: PrefixSource,
    data: FoldData,
    fold: int,
    config: Config,
    device: torch.device,
    console: bool = False,
) -> FoldResult:
    """Fine-tune one fold and keep the epoch with the best held-out MCC (ties: the lower held-out loss).

    `pristine` is fp32 on `device` and stays as it is. console: show a progress line.
    """
    folds = config.folds
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed * 1_000_003 + fold)
        model = attach(own_copy(pristine), folds)
        loss = FocalLoss(config.loss.gamma, config.loss.alpha, config.loss.label_smoothing)
        trainer = _FoldTrainer(model, source, data, fold, config, loss, device)
        with Progress(f"dora_folds: fold {fold}", trainer.total, enabled=console) as trainer.progress:
            return trainer.run()


class _FoldTrainer:
    def __init__(
        self,
        model: PeftModel,
        source: PrefixSource,
        data: FoldData,
        fold: int,
        config: Config,
        loss: FocalLoss,
        device: torch.device,
    ) -> None:
        self.model, self.source, self.data, self.fold, self.loss = model, source, data, fold, loss
        self.config: FoldsConfig = config.folds
        self.seed = config.seed
        self.device = device
        self.inside = np.flatnonzero(data.fold != fold)
        self.held = np.flatnonzero(data.fold == fold)
        self.labels = torch.as_tensor(data.labels, device=device)
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, self.config.weight_decay), lr=self.config.learning_rate
        )
        self.total = max(1, -(-len(self.inside) // self.config.batch) * self.config.epochs)
        self.step = 0
        self.progress = Progress(f"fold {fold}", enabled=False)

    @property
    def detector(self) -> RoadworkDetector:
        """The detector with the adapters in it."""
        return cast(RoadworkDetector, self.model.get_base_model())

    def run(self) -> FoldResult:
        """All epochs, or until `patience` epochs brought nothing better.

        Epoch 0, the network as it was, is a figure and no candidate: pre-training saw the photos that are held out here.
        """
        history = [self._figures(0, math.nan, *self.held_out())]
        best: tuple[tuple[float, float], int, dict[str, torch.Tensor], np.ndarray, np.ndarray] | None = None
        for epoch in range(1, self.config.epochs + 1):
            mean_loss = self._epoch(epoch)
            log_odds, readable = self.held_out()
            history.append(self._figures(epoch, mean_loss, log_odds, readable))
            self.progress.update(self.step, 0, {"loss": mean_loss, "MCC": history[-1]["mcc"]})
            key = (history[-1]["mcc"], -history[-1]["held_out_loss"])
            if best is None or key > best[0]:
                state = {name: value.detach().clone() for name, value in get_peft_model_state_dict(self.model).items()}
                best = (key, epoch, state, log_odds, readable)
            elif self.config.patience and epoch - best[1] >= self.config.patience:
                break
        if best is None:
            raise UserError(f"folds.epochs is {self.config.epochs}; at least 1 is needed")
        set_peft_model_state_dict(self.model, best[2])
        return FoldResult(self.model, self.held, best[3], best[4], history, best[1])

    def _epoch(self, epoch: int) -> float:
        """Mean loss over the readable photos; nan where there was none."""
        self._train_mode()
        order = EpochOrder(self.data.weights[self.inside], self.seed + self.fold, epoch)
        drawn = self.inside[order.at(np.arange(len(self.inside)))]
        copies = copy_of(drawn, epoch, self.config.copies)
        total, seen = 0.0, 0
        for prefix in self.source.batches(self.detector, drawn, copies, self.config.batch):
            readable = int(prefix.readable.sum())
            if readable:  # a step without a gradient would still decay the weights
                total += self._update(prefix) * readable
                seen += readable
            self.step += 1
            self.progress.update(self.step, len(prefix.positions))
        return total / seen if seen else math.nan

    def _update(self, prefix: Prefix) -> float:
        """One optimizer step; the mean loss over the batch's readable photos."""
        factor = learning_rate_factor(self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor
        logits = self.detector.decide(prefix.encoded, prefix.metadata, segmentation=False).logits.float()
        loss = self.loss(logits, self.labels[prefix.positions], present=prefix.readable)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], GRAD_CLIP)
        self.optimizer.step()
        return float(loss.item())

    def _train_mode(self) -> None:
        """Dropout on, but the detector itself not 'training': in training it adds up its experts' load over ALL
        processes, and the other processes are busy with other folds."""
        self.model.train()
        self.detector.training = False

    @torch.no_grad()
    def held_out(self) -> tuple[np.ndarray, np.ndarray]:
        """Log-odds of the held-out photos, un-augmented, float64, and which of them are readable (else 0), bool."""
        self.model.eval()
        found, readable = np.empty(len(self.held)), np.empty(len(self.held), bool)
        first = 0
        for prefix in self.source.batches(self.detector, self.held, np.zeros(len(self.held), int), self.config.batch):
            logits = self.detector.decide(prefix.encoded, prefix.metadata, segmentation=False).logits.double()
            part = slice(first, first + len(logits))
            found[part] = (logits[:, 1] - logits[:, 0]).cpu().numpy()
            readable[part] = prefix.readable.cpu().numpy()
            first = part.stop
        if not readable.any():
            raise UserError(f"folds: none of the {len(found)} photos that fold {self.fold} holds out can be read")
        return np.where(readable, found, 0.0), readable

    def _figures(self, epoch: int, train_loss: float, log_odds: np.ndarray, readable: np.ndarray) -> dict[str, float]:
        """Figures over the readable held-out photos."""
        labels = self.data.labels[self.held][readable]
        probability = expit(log_odds[readable])
        loss = log_loss(labels, probability)
        figures = {"epoch": epoch, "mcc": mcc(confusion(labels, probability)), "held_out_loss": loss}
        return figures | ({} if math.isnan(train_loss) else {"train_loss": train_loss})
