"""The reference: one process, fp32 masters, no engine.

A sum in floating point depends on its order, so the ranks' gradients are added in the engine's: laid out as its buffer holds
them, and added along gloo's ring. Held gradients lie there by the rank that owns them, and within it by group; those of each
micro-batch lie in ZeRO's bucket one behind the other as the backward pass finishes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork.command_line import parse
from roadwork.config import Config, accumulation
from roadwork.cpu_bf16 import widen_products
from roadwork.data.loader import Batch, TrainLoader
from roadwork.losses import Targets, TotalLoss
from roadwork.training.curvature import hessian_diagonal, sampled_loss
from roadwork.training.parts import build_data, build_model
from tests.distributed.choices import Choices, Chosen

Tensors = dict[str, Tensor]
MOMENTUM = 0.9
"""Of the trials with plain gradient descent."""


@dataclass
class Plain:
    """What the reference computed."""

    first_gradient: Tensors = field(default_factory=dict)
    masters: Tensors = field(default_factory=dict)
    average: Tensors = field(default_factory=dict)
    hessian: Tensors = field(default_factory=dict)
    first_estimate: Tensors = field(default_factory=dict)
    """Sophia-H: the Hessian's diagonal before the first step, the mean over ranks."""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    chosen: dict[int, Chosen] = field(default_factory=dict)
    """Views and experts by position of the stream."""


class Ring:
    """gloo's sum over ranks, all of them in this process. Over more than two it begins elsewhere in each part of a tensor."""

    def __init__(self, world: int) -> None:
        store, wait = dist.HashStore(), timedelta(seconds=60)

        def join(rank: int) -> dist.ProcessGroupGloo:
            return dist.ProcessGroupGloo(store, rank, world, wait)

        with ThreadPoolExecutor(world) as pool:  # each returns when all have come
            self.groups = list(pool.map(join, range(world)))

    def sum(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum of one tensor [n] per rank, which it overwrites."""
        for work in [group.allreduce([part]) for group, part in zip(self.groups, parts, strict=True)]:
            work.wait()
        return parts[0]


class Run:
    """Weights in `dtype` to compute with, fp32 masters to step with; `autocast` as a plain engine's."""

    def __init__(
        self, options: list[str], world: int, dtype: torch.dtype, autocast: bool = False, sgd: bool = False
    ) -> None:
        widen_products()  # the kernels of the ranks
        self.config: Config = parse("pretrain", options).config
        self.world, self.dtype, self.autocast, self.sgd = world, dtype, autocast, sgd
        self.data = build_data(self.config)
        self.model, self.optimizer, _, whole = build_model(self.config, self.data.view_size)
        self.micro_steps = accumulation(self.config, world)
        self.counts = self.data.counts(world * self.micro_steps)
        self.masters = {name: t.clone() for name, t in whole.items()}
        self.model.to(dtype)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.arrived: Tensors = {}
        """Gradients of the last backward pass, in the order in which it finished them."""
        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(partial(self._arrive, name))
        self.ring = Ring(world)
        self.groups = [
            (group, [name for name, p in self.parameters.items() if any(p is q for q in group["params"])])
            for group in self.optimizer.param_groups
        ]
        self.average = {name: t.clone() for name, t in self.masters.items()}
        self.loss = TotalLoss(self.config.loss)
        self.choices = Choices(self.model)
        self.out = Plain(chosen=self.choices.of)
        self._show()

    def _show(self) -> None:
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.masters[name].to(self.dtype))

    def _loader(self, rank: int) -> TrainLoader:
        return TrainLoader(
            self.data.train, self.data.order, global_batch=self.config.training.global_batch,
            micro_batch=self.config.training.micro_batch, rank=rank, world_size=self.world, workers=0,
            end_position=self.data.end_position,
        )  # fmt: skip

    def _forward(self, batch: Batch) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            return self.model(batch.views.float() / 255, batch.view_mask, batch.metadata, batch.boxes)

    def _arrive(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.arrived[name], parameter.grad = parameter.grad.float(), None

    def _gradient(self, loss: Tensor) -> Tensors:
        """fp32 gradients of the parameters that the loss depends on, in the order in which they were finished."""
        self.arrived = {}
        loss.backward()  # type: ignore[no-untyped-call]
        return self.arrived

    def _reductions(self, gradients: Sequence[Sequence[Tensors]]) -> list[Tensors]:
        """What all ranks together have at each of the engine's reductions, from micro-steps of a gradient per rank."""
        if self.config.engine.hold_gradients:
            return [self._over_owners([self._summed(mine) for mine in zip(*gradients, strict=True)])]
        return [self._over_ranks(parts) for parts in gradients]

    def _summed(self, micro_steps: Sequence[Tensors]) -> Tensors:
        """One rank's gradients of a whole optimizer step."""
        total = {name: torch.zeros_like(t) for name, t in self.masters.items()}
        for part in micro_steps:
            for name, gradient in part.items():
                total[name] += gradient
        return total

    def _over_owners(self, parts: Sequence[Tensors]) -> Tensors:
        """The sum of all ranks' gradients, added as they lie in the engine's buffer: for each rank what it owns."""
        laid_out = [[self.owned([part[name] for name in names]) for _, names in self.groups] for part in parts]
        buffers = [torch.cat([group[rank] for rank in range(self.world) for group in groups]) for groups in laid_out]
        whole = self.ring.sum(buffers).view(self.world, -1)
        found: Tensors = {}
        for (_, names), stretch in zip(self.groups, whole.split([len(g[0]) for g in laid_out[0]], dim=1), strict=True):
            found |= self.whole(names, stretch.reshape(-1))
        return found

    def owned(self, tensors: list[Tensor]) -> list[Tensor]:
        """A parameter group flat, padded and cut into a part per rank, as ZeRO holds it."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % (2 * self.world)))
        return [part.clone() for part in padded.chunk(self.world)]

    def whole(self, names: Sequence[str], flat: Tensor) -> Tensors:
        """The tensors of a padded flat group."""
        sizes = [self.masters[name].numel() for name in names]
        pieces = flat[: sum(sizes)].split(sizes)
        return {name: piece.view_as(self.masters[name]) for name, piece in zip(names, pieces, strict=True)}

    def _over_ranks(self, parts: Sequence[Tensors]) -> Tensors:
        """The sum of all ranks' gradients, added as the engine adds its bucket."""
        assert len({tuple(part) for part in parts}) == 1, "ranks whose gradients come in different orders"
        whole = self.ring.sum([torch.cat([g.reshape(-1) for g in part.values()]) for part in parts])
        pieces = whole.split([g.numel() for g in parts[0].values()])
        return {name: piece.view_as(g) for (name, g), piece in zip(parts[0].items(), pieces, strict=True)}

    def _loss(self, step: int, batch: Batch) -> Tensor:
        outputs = self._forward(batch)
        masks = batch.masks.float() if batch.masks is not None else None
        targets = Targets(batch.label, batch.weather, masks, batch.masks_valid, batch.weight, self.counts.of(step))
        ramp = min(1.0, (step + 1) / self.config.loss.consistency_ramp_steps)
        return self.loss(outputs, targets, ramp)[0]

    def _micro(self, step: int, batch: Batch) -> tuple[Tensors, float]:
        self.choices.positions = batch.position.tolist()
        loss = self._loss(step, batch)
        return self._gradient(loss), float(loss.detach())

    def train(self, steps: int, factor: Any) -> Plain:
        """`factor(step)` is the schedule's factor on the peak learning rate."""
        stepper = self._stepper()
        iterators = [iter(self._loader(rank)) for rank in range(self.world)]
        for step in range(steps):
            loss, last, gradients = 0.0, list[Batch](), list[list[Tensors]]()
            for _ in range(self.micro_steps):
                last = [next(it) for it in iterators]
                parts = [self._micro(step, batch) for batch in last]
                loss += sum(value for _, value in parts)
                gradients.append([gradient for gradient, _ in parts])
            total = {name: torch.zeros_like(t) for name, t in self.masters.items()}
            for reduced in self._reductions(gradients):
                for name, gradient in reduced.items():
                    total[name] += gradient
            if self.config.optimizer.name == "sophia_h" and step % self.config.optimizer.hessian_every == 0:
                stepper.curvature(step, last)
            self._step(step, total, stepper, self.config.training.learning_rate * factor(step))
            self.out.losses.append(loss)
            if self.config.optimizer.name == "sophia" and step % self.config.optimizer.hessian_every == 0:
                stepper.curvature(last)  # type: ignore[union-attr]
        self.out.masters, self.out.average = self.masters, self.average
        return self.out

    def _stepper(self) -> Any:
        if self.sgd:
            return _Sgd(self)
        return {"sophia": _Sophia, "sophia_h": _SophiaH, "adamw": _Adam}[self.config.optimizer.name](self)

    def _step(self, step: int, total: Tensors, stepper: Any, rate: float) -> None:
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in total.values()))
        if step == 0:
            self.out.first_gradient = {name: g.clone() for name, g in total.items()}
        limit = self.config.training.grad_clip
        if limit and norm > limit:
            total = {name: g * (limit / (norm + 1e-6)) for name, g in total.items()}
        stepper.step(step + 1, total, rate)
        decay = min(self.config.training.ema_decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self.masters[name], 1 - decay)
        self._show()
        self.out.norms.append(norm)
        self.out.rates.append(rate)


class _Adam:
    """torch's AdamW over the tensors that ZeRO holds: each parameter group flat, padded and cut into a part per rank.

    The kernel rounds the last few elements of a tensor, which fill no vector, in a way of their own: the cuts matter.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        o = run.config.optimizer
        self.parts = [run.owned([run.masters[name] for name in names]) for _, names in run.groups]
        given = [
            {"params": parts, "weight_decay": group["weight_decay"], "lr": 0.0}
            for parts, (group, _) in zip(self.parts, run.groups, strict=True)
        ]
        self.optimizer = torch.optim.AdamW(given, betas=o.betas, eps=o.eps, fused=True)

    def step(self, count: int, gradient: Tensors, rate: float) -> None:
        for group, parts, (given, names) in zip(self.optimizer.param_groups, self.parts, self.run.groups, strict=True):
            group["lr"] = rate * given.get("lr_scale", 1.0)
            for part, grad in zip(parts, self.run.owned([gradient[name] for name in names]), strict=True):
                part.grad = grad
        self.optimizer.step()
        for parts, (_, names) in zip(self.parts, self.run.groups, strict=True):
            for name, whole in self.run.whole(names, torch.cat(parts)).items():
                self.run.masters[name].copy_(whole)


class _Sgd:
    """Gradient descent with heavy-ball momentum, without decay."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.velocity = {name: torch.zeros_like(t) for name, t in run.masters.items()}

    def step(self, count: int, gradient: Tensors, rate: float) -> None:
        for group, names in self.run.groups:
            for name in names:
                self.velocity[name].mul_(MOMENTUM).add_(gradient[name])
                self.run.masters[name].sub_(self.velocity[name], alpha=rate * group.get("lr_scale", 1.0))


class _Sophia:
    """Sophia-G written out from the paper (arXiv 2305.14342, algorithm 3), with AdamW's step where there is no curvature."""

    def __init__(self, run: Run) -> None:
        self.run = run
        zeros = {name: torch.zeros_like(t) for name, t in run.masters.items()}
        self.mean, self.adam, self.square, self.h = ({k: v.clone() for k, v in zeros.items()} for _ in range(4))
        run.out.hessian = self.h

    def step(self, count: int, gradient: Tensors, rate: float) -> None:
        o = self.run.config.optimizer
        for group, names in self.run.groups:
            lr = rate * group.get("lr_scale", 1.0)
            for name in names:
                g, weight = gradient[name], self.run.masters[name]
                self.mean[name].lerp_(g, 1 - o.sophia_betas[0])
                self.adam[name].lerp_(g, 1 - o.betas[0])
                self.square[name].mul_(o.betas[1]).addcmul_(g, g, value=1 - o.betas[1])
                weight.mul_(1 - lr * group["weight_decay"])
                h = o.sophia_rho * self.h[name]
                newton = (self.mean[name] / h.clamp_min(o.eps)).clamp(-1, 1)
                root = (self.square[name] / (1 - o.betas[1] ** count)).sqrt() + o.eps
                plain = self.adam[name] / (1 - o.betas[0] ** count) / root
                weight.sub_(torch.where(h > o.eps, newton, plain), alpha=lr)

    def curvature(self, batches: list[Batch]) -> None:
        run, parts = self.run, []
        for rank, batch in enumerate(batches):
            torch.manual_seed(1000 + rank)
            parts.append(run._gradient(sampled_loss(run._forward(batch), run.config.loss, batch.weight)))
        photos = sum(len(batch.weight) for batch in batches)
        beta = run.config.optimizer.sophia_betas[1]
        for name, h in self.h.items():
            h.mul_(beta)
            if name in parts[0]:
                g = sum(part[name] for part in parts) / run.world
                h.addcmul_(g, g, value=(1 - beta) * photos)


class _SophiaH:
    """Sophia-H written out from the paper (arXiv 2305.14342, algorithms 1 and 3), the Hessian averaged over the ranks."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.mean, self.h = ({name: torch.zeros_like(t) for name, t in run.masters.items()} for _ in range(2))
        run.out.hessian = self.h

    def curvature(self, step: int, batches: list[Batch]) -> None:
        run = self.run
        names = [name for _, group in run.groups for name in group]  # in the order in which the signs are drawn
        total = {name: torch.zeros_like(h) for name, h in self.h.items()}
        for rank, batch in enumerate(batches):
            torch.manual_seed(1000 + rank)
            # Bound to this batch: its loss stands for the mean over ranks and micro-batches.
            found = hessian_diagonal(
                [run.parameters[name] for name in names],
                lambda batch=batch: run._loss(step, batch) * (run.world * run.micro_steps),  # type: ignore[misc]
            )
            for name, diagonal in zip(names, found, strict=True):
                total[name] += diagonal / run.world
        run.out.first_estimate = run.out.first_estimate or total
        for name, h in self.h.items():
            h.lerp_(total[name], 1 - run.config.optimizer.sophia_betas[1])

    def step(self, count: int, gradient: Tensors, rate: float) -> None:
        o = self.run.config.optimizer
        for group, names in self.run.groups:
            lr, decay = rate * group["lr_scale"] * o.sophia_rho, group["weight_decay"] / o.sophia_rho
            for name in names:
                weight = self.run.masters[name]
                self.mean[name].lerp_(gradient[name], 1 - o.sophia_betas[0])
                bound = (o.sophia_rho * self.h[name]).clamp_min(o.eps)
                weight.mul_(1 - lr * decay).sub_((self.mean[name] / bound).clamp(-1, 1), alpha=lr)
