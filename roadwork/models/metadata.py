"""What is known about a photo besides its pixels, each field with a learned NULL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from roadwork.errors import UserError

WIDTHS = {"gps": 128, "weather": 64, "daytime": 64, "scene": 64, "text": 384}
METADATA_DIM = sum(WIDTHS.values())
VOCABULARY = {"weather": 8, "daytime": 6, "scene": 7}
TEXT_DIM = 384
FREQUENCIES = 16


def gps_features(degrees: Tensor) -> Tensor:
    """Multi-scale sines of the place on the unit sphere.

    The sphere has no seam at 180 degrees and no stretched longitudes. Wavelengths halve from 2 Earth radii (2^0) to
    about 400 m (2^15). float64 inside: fp32 degrees times 2^15 would lose the fine scales, bf16 all but the coarsest.

    Args:
        degrees: [B, 2] latitude, longitude; fp32 or wider.

    Returns:
        fp32 [B, 3 + 6 * 16]; rows with NaN are NaN.
    """
    lat, lon = torch.deg2rad(degrees.double()).unbind(-1)
    xyz = torch.stack([lat.cos() * lon.cos(), lat.cos() * lon.sin(), lat.sin()], dim=-1)
    scales = math.pi * 2.0 ** torch.arange(FREQUENCIES, dtype=torch.float64, device=degrees.device)
    angles = (xyz[:, :, None] * scales).flatten(1)
    return torch.cat([xyz, angles.sin(), angles.cos()], dim=-1).float()


class MetadataEncoder(nn.Module):
    """GPS 128, weather, daytime and scene 64 each, text 384: [B, 704].

    A missing value, a field that the model may not see and a whole photo's dropped metadata all give the field's
    learned NULL. The service sends pixels alone, so training drops the metadata of whole photos.

    Args:
        fields: fields that may be seen. dropout: probability that a photo's fields are ALL dropped in training.
    """

    def __init__(self, fields: Sequence[str], dropout: float) -> None:
        super().__init__()
        unknown = sorted(set(fields) - set(WIDTHS))
        if unknown:
            raise UserError(f"model.metadata_fields has {unknown[0]!r}; allowed: {', '.join(WIDTHS)}")
        if not 0 <= dropout <= 1:
            raise UserError(f"model.metadata_dropout is {dropout}; give a probability in [0, 1]")
        self.fields = [name for name in WIDTHS if name in set(fields)]
        self.dropout = dropout
        self.null = nn.ParameterDict({name: nn.Parameter(torch.empty(width)) for name, width in WIDTHS.items()})
        self.encoders = nn.ModuleDict()
        for name in self.fields:
            if name in VOCABULARY:
                self.encoders[name] = nn.Embedding(VOCABULARY[name], WIDTHS[name])
            else:
                width = TEXT_DIM if name == "text" else 3 + 6 * FREQUENCIES
                self.encoders[name] = nn.Linear(width, WIDTHS[name])

    def forward(self, metadata: Mapping[str, Tensor] | None, batch: int) -> Tensor:
        """Encode.

        Args:
            metadata: `gps` [B, 2] degrees (NaN: missing), `weather`, `daytime`, `scene` int64 [B] (-1: NULL), `text`
                fp32 [B, 384] (NaN or all zeros: missing); absent keys and None: all NULL.
            batch: B.

        Returns:
            [B, 704] in the parameters' dtype.
        """
        _check_names(metadata)
        device = self.null["gps"].device
        dropped = None
        if self.training and self.dropout > 0 and metadata is not None:
            dropped = torch.rand(batch, device=device) < self.dropout
        parts = []
        for name in WIDTHS:
            null = self.null[name].expand(batch, -1)
            value = None if metadata is None or name not in self.fields else metadata.get(name)
            if value is None:
                # The encoder's parameters get a gradient of zeros, not none: every process reduces the same tensors.
                parts.append(null + 0.0 * sum(p.sum() for p in self._parameters_of(name)) if self.training else null)
                continue
            encoded, present = self._encode(name, value.to(device), batch)
            if dropped is not None:
                present = present & ~dropped
            parts.append(torch.where(present[:, None], encoded.to(null.dtype), null))
        return torch.cat(parts, dim=-1)

    def _parameters_of(self, name: str) -> list[Tensor]:
        return list(self.encoders[name].parameters()) if name in self.encoders else []

    def _encode(self, name: str, value: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Encoded field [B, width], and which photos have it."""
        width = {"gps": (batch, 2), "text": (batch, TEXT_DIM)}.get(name, (batch,))
        if tuple(value.shape) != width:
            raise ValueError(f"metadata[{name!r}] has shape {tuple(value.shape)}; expected {width}")
        encoder = self.encoders[name]
        dtype = self.null[name].dtype
        if name in VOCABULARY:
            size = VOCABULARY[name]
            whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
            if not whole or (value.device.type == "cpu" and bool(((value < -1) | (value >= size)).any())):
                raise ValueError(f"metadata[{name!r}] must be integers -1 (NULL) to {size - 1}; got {value.tolist()}")
            present = (value >= 0) & (value < size)
            return encoder(value.clamp(0, size - 1).long()), present
        if name == "gps":
            present = torch.isfinite(value).all(-1)
            outside = (value.abs() > value.new_tensor([90.0, 180.0])).any(-1)
            if value.device.type == "cpu" and bool(outside.any()):
                raise ValueError(
                    f"metadata['gps'] has {value[outside][0].tolist()}; expected [latitude, longitude] within 90 and 180 "
                    f"degrees, NaN where missing"
                )
            features = gps_features(torch.where(present[:, None], value, 0.0))
        else:
            present = torch.isfinite(value).all(-1) & (value != 0).any(-1)
            features = torch.where(present[:, None], value, 0.0)
        return encoder(features.to(dtype)), present


def _check_names(metadata: object) -> None:
    """ValueError for what is no mapping of known fields to tensors."""
    if metadata is None:
        return
    allowed = ", ".join(WIDTHS)
    if not isinstance(metadata, Mapping):
        raise ValueError(f"metadata are {type(metadata).__name__}; expected a mapping of {allowed} to tensors, or None")
    for name, value in metadata.items():
        if name not in WIDTHS:
            raise ValueError(f"metadata have a field {name!r}; allowed: {allowed}")
        if not isinstance(value, Tensor):
            raise ValueError(f"metadata[{name!r}] is {type(value).__name__}; expected a tensor")
