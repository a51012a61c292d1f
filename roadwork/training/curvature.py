"""Curvature for Sophia, by backward passes beside the real ones: Gauss-Newton-Bartlett, and Hutchinson for Sophia-H.

Liu et al. 2023 (arXiv 2305.14342). For the former (algorithm 2) labels are SAMPLED from the model's own predictions, and the
squared mean gradient times the batch size estimates the diagonal of the Gauss-Newton matrix. Every head takes part with its
loss weight: a head left out would have no curvature in the trunk that it trains.

Labels are drawn independently, so products of two gradients vanish on average and each is squared by itself: a likelihood
of weight w is added with the ROOT of w, and so is a mean over n views or pixels, whose members weigh w / n each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from roadwork.config import LossConfig
from roadwork.engine import Engine
from roadwork.training.gradients import HeldGradients
from roadwork.training.masters import Masters
from roadwork.training.optimizers import Sophia


def sampled_loss(outputs: Any, weights: LossConfig, photo: Tensor) -> Tensor:
    """Negative log-likelihood of labels drawn from each head's own prediction, by the root of its weight; mean over photos.

    Its squared gradient times the number of photos is, on average, the Gauss-Newton diagonal of the weighted likelihoods.

    Args:
        outputs: the detector's outputs.
        weights: weight of each head; views learn from consistency and from view labels.
        photo: [B] 1, or 0 where a photo is not there.
    """
    share = photo / photo.sum().clamp_min(1)
    views: Tensor = outputs.view_mask.float()
    each = views / views.sum(1, keepdim=True).clamp_min(1).sqrt()
    terms = math.sqrt(weights.focal) * _drawn(outputs.logits)
    terms = terms + math.sqrt(weights.weather) * _drawn(outputs.weather_logits)
    by_view = weights.consistency + weights.view_labels
    terms = terms + math.sqrt(by_view) * (_drawn(outputs.view_logits) * each).sum(1)
    if outputs.seg_logits is not None:
        logits = outputs.seg_logits.float()
        drawn = torch.bernoulli(logits.detach().sigmoid())
        pixels = F.binary_cross_entropy_with_logits(logits, drawn, reduction="none").flatten(2)
        of_view = pixels.sum(2) / math.sqrt(pixels.shape[2])
        terms = terms + math.sqrt(weights.segmentation) * (of_view * each).sum(1)
    return (terms * share).sum()


def _drawn(logits: Tensor) -> Tensor:
    """Cross entropy [...] of classes drawn from softmax(logits [..., C])."""
    flat = logits.float().flatten(0, -2)
    drawn = torch.multinomial(flat.detach().softmax(-1), 1).squeeze(1)
    return F.cross_entropy(flat, drawn, reduction="none").view(logits.shape[:-1])


def update_curvature(
    engine: Engine, masters: Masters, loss: Tensor, photos: int, held: HeldGradients | None = None
) -> bool:
    """Backward of a sampled loss into Sophia's curvature only. Collective.

    To be called between optimizer steps: ZeRO's accumulators are then empty, and are empty again afterwards. A gradient
    that is not finite on any rank changes nothing.

    Args:
        loss: [], mean over this rank's photos.
        photos: of this rank, and of every other.
        held: where ZeRO's gradients are summed, if not by ZeRO itself.

    Returns:
        whether the curvature was updated.

    Raises:
        ValueError: an optimizer other than Sophia.
    """
    optimizer = masters.optimizer
    if not isinstance(optimizer, Sophia):
        raise ValueError(f"curvature is for sophia; the optimizer is {type(optimizer).__name__}")
    if held is not None:
        gradients = _held_gradients(engine, held, loss)
    elif engine.sharded:
        gradients = _zero_gradients(engine, masters, loss)
    else:
        gradients = _plain_gradients(engine, masters, loss)
    finite = torch.stack([torch.isfinite(g).all() for g in gradients]).all().to(torch.float32)
    engine.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        return False
    for flat, gradient in zip(masters.flats(), gradients, strict=True):
        optimizer.update_curvature(flat, gradient, photos * engine.world_size)
    return True


def update_hessian(engine: Engine, masters: Masters, loss: Callable[[], Tensor]) -> list[Tensor]:
    """What Sophia-H is to average in: Hutchinson's estimate, the mean over processes. Collective; without ZeRO.

    An estimate that is not finite on any process is replaced by the average so far, which then stays as it is.

    Args:
        loss: computes this process's loss anew; the mean over processes is the function that is differentiated.

    Returns:
        a tensor shaped like each parameter, in the optimizer's order.
    """
    optimizer = masters.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    found = [engine.all_reduce(h).div_(engine.world_size) for h in hessian_diagonal(parameters, loss)]
    if torch.stack([torch.isfinite(h).all() for h in found]).all():  # a fault on any process has reached every one
        return found
    kept = [optimizer.state[p].get("hessian_moment") for p in parameters]
    return [torch.zeros_like(p) if h is None else h.clone() for p, h in zip(parameters, kept, strict=True)]


def hessian_diagonal(parameters: list[Tensor], loss: Callable[[], Tensor]) -> list[Tensor]:
    """Hutchinson's estimate z * (H z) of the Hessian's diagonal, with z of random signs (Liu et al. 2023, algorithm 1).

    Unbiased, and exact where the Hessian is diagonal. `.grad` is neither read nor written, and no hook of a data-parallel
    wrapper fires, so it may be called between a real backward pass and its step.

    Args:
        loss: computes the loss anew, through the unwrapped module.

    Returns:
        a tensor shaped like each parameter; zeros where the loss does not depend on it, or only linearly.
    """
    # Attention's fused kernels have no second derivative. Recomputed activations ask for it in the backward pass.
    with sdpa_kernel(SDPBackend.MATH):
        first = torch.autograd.grad(loss(), parameters, create_graph=True, allow_unused=True)
        signs = [torch.randint_like(p, 0, 2).mul_(2).sub_(1) for p in parameters]
        curved = [(g, z) for g, z in zip(first, signs, strict=True) if g is not None and g.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in parameters]
        gradients, along = zip(*curved, strict=True)
        products = torch.autograd.grad(gradients, parameters, grad_outputs=along, allow_unused=True)
    pairs = zip(products, signs, strict=True)
    return [torch.zeros_like(z) if product is None else product.mul(z) for product, z in pairs]


def _held_gradients(engine: Engine, held: HeldGradients, loss: Tensor) -> list[Tensor]:
    """The averaged, unclipped partition of the gradient; the sums are empty before and after."""
    held.add(loss)
    found = [partition.float().div(engine.world_size) for partition in held.reduced()]
    held.clear()
    return found


def _plain_gradients(engine: Engine, masters: Masters, loss: Tensor) -> list[Tensor]:
    parameters = list(masters.parameters.values())
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
    return [engine.all_reduce(g).div_(engine.world_size) for g in whole]


def _zero_gradients(engine: Engine, masters: Masters, loss: Tensor) -> list[Tensor]:
    """The averaged, unclipped partition of the gradient; the engine's counters and its boundary stay as they were."""
    ds = engine.accelerator.deepspeed_engine_wrapped.engine
    zero = ds.optimizer
    boundary = ds._is_gradient_accumulation_boundary
    ds.set_gradient_accumulation_boundary(True)
    ds.backward(loss, scale_wrt_gas=False)
    flats = masters.flats()
    gradients = []
    for index, flat in enumerate(flats):
        partition = zero.averaged_gradients[index]
        if hasattr(partition, "flat_partition"):
            owned = partition.flat_partition
        else:
            owned = torch.cat([piece.reshape(-1) for piece in partition])
        gradients.append(owned[: flat.numel()].detach().float().clone())
        if gradients[-1].numel() < flat.numel():  # the last rank's partition is padded
            gradients[-1] = F.pad(gradients[-1], (0, flat.numel() - gradients[-1].numel()))
        zero.averaged_gradients[index] = None
        zero.all_grad_tensors[index] = None
    if hasattr(zero, "_release_preflattened_grad_buffers"):
        zero._release_preflattened_grad_buffers()
    zero.zero_grad()
    zero.micro_step_id = -1
    ds._is_gradient_accumulation_boundary = boundary
    return gradients
