"""Weather and light as fields over the view: every op is x * keep + add, so all of them are one multiply-add.

Fields of shadow, fog and glare vary slowly: they are computed at a quarter of the view size and enlarged. Rain is
computed at full size. A photo's fields are the same in all its views, so they cost once per photo, not once per view.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from roadwork.data.augment_parameters import Parameters, stream

Array = NDArray[Any]

_GRAIN = 64  # widest lattice of random numbers (a column of rain repeats after so many)


def weather_fields(p: Parameters, size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """keep [N, 1, S, S] and add [N, 3, S, S] of all weather of the photos `p`, both in [0, 1].

    From the scene to the lens: shadow falls on things, fog lies before them, glare arises in the lens; rain is drawn
    last, in front of everything.
    """
    n, low = len(p), max(size // 4, 16)

    def put(values: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(device, non_blocking=True)

    line = (torch.arange(low, device=device, dtype=torch.float32) * 2 + 1) / low - 1
    x, y = line.view(1, 1, 1, low), line.view(1, 1, low, 1)
    keep = torch.ones(n, 1, low, low, device=device)
    add = torch.zeros(n, 3, low, low, device=device)
    if p.shadow.any():
        keep = keep * (1 - _field(put(p.shadow)) * shadow_field(put(p.shadow_shape), x, y))
    haze = np.maximum(p.fog, 0.25 * p.rain)  # rain takes distance away too
    if haze.any():
        opacity = fog_field(put(haze), put(_lattice(p.fog_seed)), y)
        keep, add = keep * (1 - opacity), opacity * put(p.airlight)[..., None, None]
    if p.glare.any():
        light = (_field(put(p.glare)) * glare_field(put(p.glare_shape), x, y)).clamp(0, 1)
        light = light * put(p.glare_colour)[..., None, None]
        # screen blending: never beyond white, strongest where it is dark
        veil = light.mean(1, keepdim=True)
        keep, add = keep * (1 - veil), add * (1 - veil) + light
    fields = torch.cat([keep, add], 1)
    if low != size:
        fields = F.interpolate(fields, size=(size, size), mode="bilinear", align_corners=False)
    keep, add = fields[:, :1], fields[:, 1:]
    if p.rain.any():
        streak = rain_field(put(p.rain), put(p.rain_angle), _columns(p.rain_seed, device), size)
        keep, add = keep * (1 - streak), torch.addcmul(add * (1 - streak), streak, torch.full((), 0.82, device=device))
    return keep.to(dtype), add.clamp_(0, 1).to(dtype)


def apply_fields(photos: Tensor, keep: Tensor, add: Tensor) -> Tensor:
    """photos [N, V, 3, S, S] * keep + add, the fields shared by the views."""
    return torch.addcmul(add.unsqueeze(1), photos, keep.unsqueeze(1))


def _field(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _lattice(seed: Array) -> Array:
    return stream(seed, 16 + 81).astype(np.float32)


def _columns(seed: Array, device: torch.device) -> Tensor:
    """[N, 2, G, G] random numbers for two layers of rain."""
    grain = torch.from_numpy(stream(seed, 2 * _GRAIN * _GRAIN).astype(np.float32)).view(-1, 2, _GRAIN, _GRAIN)
    return grain.to(device, non_blocking=True)


def shadow_field(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Band of shade [N, 1, h, w] in [0, 1], as a pole, a tree or a house casts it: two soft edges.

    Args:
        shape: [N, 4] angle, place, half width and softness, in halves of the view.
    """
    angle, place, width, soft = (_field(column) for column in shape.unbind(1))
    across = x * torch.cos(angle) + y * torch.sin(angle) - place
    along = -x * torch.sin(angle) + y * torch.cos(angle)
    # the far edge is not parallel to the near one: shadows widen with distance from what casts them
    return torch.sigmoid((across + width) / soft * 2) * torch.sigmoid((width + 0.25 * along - across) / soft * 2)


def fog_field(density: Tensor, lattice: Tensor, y: Tensor) -> Tensor:
    """Opacity 1 - exp(-beta depth) [N, 1, h, w] (Koschmieder), at most `density` [N] in clear fog.

    Depth is guessed from the picture alone: far at the top, near at the bottom; two octaves of noise make banks of it.
    """
    low = y.shape[2]
    coarse = F.interpolate(lattice[:, :16].view(-1, 1, 4, 4), size=(low, low), mode="bicubic", align_corners=False)
    fine = F.interpolate(lattice[:, 16:].view(-1, 1, 9, 9), size=(low, low), mode="bicubic", align_corners=False)
    depth = (0.45 + 0.55 * torch.sigmoid(-3.0 * y)) * (0.65 + 0.45 * coarse + 0.25 * fine)
    beta = -torch.log1p(-_field(density).clamp(0, 0.98))
    return (1 - torch.exp(-beta * depth)).clamp(0, 1)


def glare_field(shape: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Light in the lens [N, 1, h, w]: a core that burns out (2 and more), its bloom, a veil over the view, faint rays.

    Args:
        shape: [N, 3] place (x, y) of the sun and radius of the bloom, in halves of the view.
    """
    sun_x, sun_y, radius = (_field(column) for column in shape.unbind(1))
    dx, dy = x - sun_x, y - sun_y
    square = dx * dx + dy * dy
    distance = torch.sqrt(square + 1e-4)
    core = torch.exp(-square / (0.35 * radius) ** 2)
    bloom = torch.exp(-distance / radius)
    # six rays: |cos 3 phi| sharpened, by the triple-angle formula instead of atan2
    cosine = dx / distance
    rays = (4 * cosine**3 - 3 * cosine).abs() ** 24 * torch.exp(-distance / (1.6 * radius))
    return 2.0 * core + 0.75 * bloom + 0.12 + 0.3 * rays


def rain_field(amount: Tensor, angle: Tensor, random: Tensor, size: int) -> Tensor:
    """Opacity of rain streaks [N, 1, S, S] in [0, 1]: near drops (long, wide, few) over far ones (short, thin, many).

    The view is cut into columns along the fall and each column, shifted by its own amount, into cells; a cell whose
    random number is small enough holds one streak that swells and fades along its length.

    Args:
        amount: [N] in [0, 1]: how many and how bright.
        angle: [N] of the fall from the vertical, radians.
        random: [N, 2, G, G] uniform.
    """
    line = (torch.arange(size, device=amount.device, dtype=torch.float32) + 0.5) / size
    x, y = line.view(1, 1, size), line.view(1, size, 1)
    cosine, sine = torch.cos(angle).view(-1, 1, 1), torch.sin(angle).view(-1, 1, 1)
    u0, v0 = x * cosine - y * sine, x * sine + y * cosine
    strength = amount.view(-1, 1, 1)
    total: Tensor | None = None
    # (columns, cells per view side, share of cells with a drop, opacity)
    for layer, (columns, cells, share, opacity) in enumerate(((72.0, 5.0, 0.10, 0.55), (150.0, 11.0, 0.14, 0.35))):
        columns = min(columns, size / 2.5)  # a streak is never thinner than a pixel
        u = u0 * columns
        column = torch.floor(u)
        profile = 1 - (2 * (u - column) - 1) ** 2
        index = column.long() % _GRAIN
        table = random[:, layer]
        shift = table[:, 0].gather(1, index.flatten(1)).view_as(u)
        v = v0 * cells + shift * 7
        cell = torch.floor(v)
        drop = table.flatten(1).gather(1, (index * _GRAIN + cell.long() % _GRAIN).flatten(1)).view_as(u)
        fade = 1 - (2 * (v - cell) - 1) ** 2
        bright = ((share * (0.4 + 0.6 * strength) - drop) / share).clamp(0, 1).sqrt()
        streak = profile * fade * bright * (opacity * (0.5 + 0.5 * strength) * (strength > 0))
        total = streak if total is None else total + streak * (1 - total)
    assert total is not None
    return total.unsqueeze(1)
