"""Augmentation on the device: parameters per photo from the CPU, pixels in a few fused passes.

    geometry     flip, rotation, perspective, zoom      one interpolation, masks with it
    colour       brightness, contrast, saturation, hue  one matrix
    weather      shadow, fog, glare, rain               one multiply-add with fields
    blur         motion, Gaussian                       a few shifted additions
    noise                                              one addition

A photo's parameters depend on (seed, epoch, position) alone, and each photo is worked on for itself: the result does
not depend on the batch, the process or the number of either. All views of a photo share all parameters, geometry and
light alike (each view is warped about its own centre, weather lies the same way over each); noise differs from view to
view. Only what hits a photo costs anything. On a CPU photos go one by one through the caches, on a GPU all together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from roadwork.config import AugmentConfig
from roadwork.config_ranges import check_augment
from roadwork.data.augment_blur import gaussian_blur, motion_blur
from roadwork.data.augment_challenge import challenge
from roadwork.data.augment_checks import check_inputs, check_range
from roadwork.data.augment_colour import colour, mean_grey
from roadwork.data.augment_geometry import sample, sampling_grid, warp
from roadwork.data.augment_noise import add_noise_
from roadwork.data.augment_parameters import Array, Parameters, draw
from roadwork.data.augment_weather import apply_fields, weather_fields

__all__ = ["Augment", "colour", "gaussian_blur", "motion_blur", "warp"]

_REFERENCE_SIZE = 512  # blur lengths are given for views of this many pixels
_CHUNK = 6 << 20  # bytes of pixels worked on at once on a CPU: what stays in its caches


class Augment(nn.Module):
    """Augments photos as `config` says; the identity (the very tensors) when disabled or in eval mode.

    Keep `key` and `epoch` on the CPU: parameters are drawn there, and reading them from a GPU would wait for it.
    """

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__()
        check_augment(config)
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        views: Tensor,
        key: Tensor,
        epoch: int | Tensor,
        seed: int,
        masks: Tensor | None = None,
        view_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """New views and masks of the same shapes and types.

        Args:
            views: float [B, V, 3, S, S] in [0, 1].
            key: int64 [B] positions in the training stream.
            epoch: one number or int64 [B].
            seed: of the run.
            masks: float or uint8 [B, V, C, h, w]; follow the geometry at their own resolution, 0 outside.
            view_mask: bool [B, V], false for padding: whatever is there counts for nothing and comes out as zero.
                None: all views are there.

        Raises:
            ValueError: wrong shapes or types; on a CPU also pixels outside [0, 1] or NaN. A GPU, which would have to
                wait for such a look, clamps pixels and turns a NaN into 0: what comes out is in [0, 1] all the same.
        """
        if not (self.config.enabled and self.training):
            return views, masks
        check_inputs(views, key, epoch, seed, masks, view_mask)
        epochs = epoch.cpu().numpy() if isinstance(epoch, Tensor) else epoch
        p = draw(self.config, seed, epochs, key.cpu().numpy())
        return self.with_parameters(views, p, masks, view_mask)

    @torch.no_grad()
    def with_parameters(
        self, views: Tensor, p: Parameters, masks: Tensor | None = None, view_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The pixel work alone, with given parameters of B photos; views [B, V, 3, S, S] and masks as in `forward`."""
        x = views.float() if views.dtype in (torch.float16, torch.bfloat16) else views
        out, moved = (self._together if x.is_cuda else self._one_by_one)(x, p, masks, view_mask)
        return out.to(views.dtype), moved

    @staticmethod
    def _together(
        x: Tensor, p: Parameters, masks: Tensor | None, view_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """All photos at once: few launches, and the host waits for nothing."""
        out = _pixels(x, p, _shared(x, p, view_mask)).clamp(0, 1).nan_to_num_(0.0)
        if view_mask is not None:
            out.masked_fill_(~view_mask[..., None, None, None], 0)
        return out, None if masks is None else _move_masks(masks, p)

    def _one_by_one(
        self, x: Tensor, p: Parameters, masks: Tensor | None, view_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Photo by photo, padding left out."""
        out = torch.empty_like(x)
        moved = None if masks is None else torch.empty_like(masks)
        for b in range(len(p)):
            photo, alone = slice(b, b + 1), p.rows(slice(b, b + 1))
            there = np.ones(x.shape[1], bool) if view_mask is None else view_mask[b].numpy()
            count = int(np.flatnonzero(there)[-1]) + 1 if there.any() else 0
            self._one_photo(x[photo, :count], alone, out[photo, :count], there[:count])
            if not there.all():
                out[b, torch.from_numpy(~there)] = 0
            if masks is not None and moved is not None:
                moved[photo] = _move_masks(masks[photo], alone)
        return out, moved

    @staticmethod
    def _one_photo(x: Tensor, p: Parameters, out: Tensor, there: Array) -> None:
        """One photo on a CPU, view by view, so that all passes, the check among them, find their pixels in the cache."""
        if not x.shape[1]:
            return
        shared = _shared(x, p, torch.from_numpy(there)[None])
        step = max(1, _CHUNK // (x[0, 0].numel() * x.element_size()))
        for v in range(0, x.shape[1], step):
            some = slice(v, v + step)
            check_range(x[:, some], there[some])
            torch.clamp(_pixels(x[:, some], p, shared, v), 0, 1, out=out[:, some])


@dataclass
class _Shared:
    """What all views of a photo share, on the device; each for the photos that it hits only."""

    grid: Tensor | None
    matrix: Tensor | None
    keep: Tensor | None
    add: Tensor | None


def _weathered(p: Parameters) -> Array:
    return (p.shadow > 0) | (p.fog > 0) | (p.glare > 0) | (p.rain > 0)


def _shared(x: Tensor, p: Parameters, view_mask: Tensor | None) -> _Shared:
    device, dtype, size = x.device, x.dtype, x.shape[-1]

    def put(values: Array) -> Tensor:
        return torch.from_numpy(values).to(device, dtype, non_blocking=True)

    grid = matrix = keep = add = None
    if p.warp.any():
        grid = sampling_grid(put(p.homography[p.warp]), size, size)
    if p.coloured.any():
        hit = p.rows(p.coloured)
        shift = put(hit.contrast)
        if hit.contrast.any():
            shift = shift * mean_grey(_take(_first(x, view_mask), p.coloured))
        matrix = torch.cat([put(hit.matrix), shift[:, None, None].expand(-1, 3, 1)], 2)
    weathered = _weathered(p)
    if weathered.any():
        keep, add = weather_fields(p.rows(weathered), size, device, dtype)
    return _Shared(grid, matrix, keep, add)


def _first(x: Tensor, view_mask: Tensor | None) -> Tensor:
    """The first view that is there of each photo [N, 3, S, S]; it is the whole photo, so its mean is the photo's."""
    if view_mask is None:
        return x[:, 0]
    return x[torch.arange(len(x), device=x.device), view_mask.int().argmax(1)]


def _index(hit: Array, device: torch.device) -> Tensor:
    return torch.from_numpy(np.flatnonzero(hit)).to(device, non_blocking=True)


def _take(x: Tensor, hit: Array) -> Tensor:
    return x if hit.all() else x.index_select(0, _index(hit, x.device))


class _Work:
    """Photos in the making: an op sees only the photos that it hits, and the given tensor is never written to."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.own = False

    def on(self, hit: Array, op: Callable[[Tensor], Tensor]) -> None:
        """Replace photos where `hit` by op(photos [n, V, 3, S, S])."""
        if not hit.any():
            return
        if hit.all():
            result = op(self.x)
            self.own = self.own or result.data_ptr() != self.x.data_ptr()
            self.x = result
            return
        self.to_own()
        index = _index(hit, self.x.device)
        self.x.index_copy_(0, index, op(self.x.index_select(0, index)))

    def to_own(self) -> None:
        if not self.own:
            self.x, self.own = self.x.clone(), True


def _pixels(x: Tensor, p: Parameters, shared: _Shared, first: int = 0) -> Tensor:
    """All ops on views first, first + 1, ... of photos [n, V, 3, S, S]; not yet clamped, maybe x itself."""
    views, size = x.shape[1], x.shape[-1]
    work = _Work(x)

    def per_view(values: Tensor) -> Tensor:
        return values.unsqueeze(1).expand(-1, views, *values.shape[1:]).flatten(0, 1)

    work.on(p.flip_only, lambda a: a.flip(-1))
    if shared.grid is not None:
        grid = per_view(shared.grid)
        work.on(p.warp, lambda a: sample(a.flatten(0, 1), grid).view_as(a))
    if shared.matrix is not None:
        matrix = per_view(shared.matrix)
        work.on(p.coloured, lambda a: colour(a.flatten(0, 1), matrix).view_as(a))
    keep, add = shared.keep, shared.add
    if keep is not None and add is not None:
        work.on(_weathered(p), lambda a: apply_fields(a, keep, add))
    _camera(work, p, size, first)
    if p.challenge.any():
        hit = p.rows(p.challenge)
        work.on(p.challenge, lambda a: challenge(a, hit, first))
    return work.x


def _camera(work: _Work, p: Parameters, size: int, first: int) -> None:
    """Blur and noise."""
    scale = size / _REFERENCE_SIZE
    for row in np.flatnonzero((p.motion != 0).any(1)):
        alone = np.arange(len(p)) == row
        vector = p.motion[row] * scale
        work.on(alone, partial(_moved, vector=vector))
    blurred = (p.gaussian > 0) & ~p.challenge
    if blurred.any():
        sigma = np.repeat(p.gaussian[blurred] * scale, work.x.shape[1])
        work.on(blurred, lambda a: gaussian_blur(a.flatten(0, 1), sigma).view_as(a))
    noisy = (p.noise > 0) & ~p.challenge
    if noisy.any():
        work.to_own()
        hit = p.rows(noisy)
        work.on(noisy, lambda a: add_noise_(a, hit.noise, hit.noise_seed, first))


def _moved(photos: Tensor, vector: Array) -> Tensor:
    return motion_blur(photos.flatten(0, 1), vector).view_as(photos)


def _move_masks(masks: Tensor, p: Parameters) -> Tensor:
    """Masks [n, V, C, h, w] under the photos' geometry."""
    work, views = _Work(masks), masks.shape[1]
    work.on(p.flip_only, lambda a: a.flip(-1))
    if p.warp.any():
        matrix = torch.from_numpy(p.homography[p.warp]).to(masks.device, torch.float32, non_blocking=True)
        grid = sampling_grid(matrix, *masks.shape[-2:])
        grid = grid.unsqueeze(1).expand(-1, views, -1, -1, -1).flatten(0, 1)

        def turn(a: Tensor) -> Tensor:
            if a.is_floating_point():
                return sample(a.flatten(0, 1), grid).view_as(a)
            soft = sample(a.flatten(0, 1).float(), grid).view_as(a)
            return soft.round_().to(a.dtype)  # bits stay bits: the class that covers half of the cell

        work.on(p.warp, turn)
    return work.x
