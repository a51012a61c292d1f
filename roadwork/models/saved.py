"""A detector on disk, and its answer to one picture."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from roadwork.config import ModelConfig
from roadwork.data.images import MIN_SIDE, Photo, convert_image
from roadwork.data.record import Rejected
from roadwork.data.views import MAX_VIEWS, make_views, view_boxes
from roadwork.errors import UserError
from roadwork.models.backbone import Backbone
from roadwork.models.saved_config import (
    ARCHITECTURE,
    CALIBRATION,
    CONFIG,
    FORMAT,
    WEIGHTS,
    read_calibration,
    read_config,
    scale_bias,
)
from roadwork.models.weights import Recipe, check_finite

CARD = "README.md"


def to_rgb(image: str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Any picture -> uint8 [H, W, 3], upright (EXIF), sides at least 16.

    Args:
        image: path, encoded bytes (of a format that photos may have in shards), PIL image (greyscale, palette, CMYK,
            alpha, 16 bit are converted; alpha over white), or uint8 array [H, W, 3] or [H, W].

    Raises:
        TypeError: another type.
        ValueError: bytes that do not decode completely or must not be decoded (`Photo`), wrong shapes or dtypes, sides
            too small.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8:
            raise ValueError(f"array of {image.dtype}; expected uint8 [H, W, 3] or [H, W]")
        if image.ndim == 2:
            image = np.repeat(image[:, :, None], 3, axis=2)
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"array of shape {image.shape}; expected [H, W, 3] or [H, W]")
        rgb = np.ascontiguousarray(image)
    elif isinstance(image, str | os.PathLike):
        rgb = _decode(_content(Path(image)), str(image))
    elif isinstance(image, bytes | bytearray | memoryview):
        rgb = _decode(bytes(image), f"{len(image)} bytes")
    elif isinstance(image, Image.Image):
        rgb = _decode(image, "(PIL)")
    else:
        raise TypeError(f"image is {type(image).__name__}; expected a path, bytes, a PIL image or a uint8 array")
    if min(rgb.shape[:2]) < MIN_SIDE:
        raise ValueError(f"image of {rgb.shape[1]}x{rgb.shape[0]} px; sides must be at least {MIN_SIDE}")
    return rgb


def _content(path: Path) -> bytes:
    try:
        if path.is_file():
            return path.read_bytes()
        reason = "not a file"
    except OSError as error:  # a name too long, no permission
        reason = error.strerror or str(error)
    raise ValueError(f"image {str(path)[:200]!r} cannot be read: {reason}; give the path of a picture")


def _decode(image: bytes | Image.Image, name: str) -> npt.NDArray[np.uint8]:
    """By the decoder of the shards, so that a picture's answer is of the pixels that training saw."""
    try:
        return Photo(image).decode()[0] if isinstance(image, bytes) else convert_image(image)
    except Rejected as error:
        raise ValueError(f"image {name} cannot be used: {error.reason}") from error


class CutPhoto(NamedTuple):
    """One photo cut into the views that the network sees."""

    views: npt.NDArray[np.uint8]
    """[V, S, S, 3]."""
    boxes: npt.NDArray[np.float32]
    """[V, 4] as fractions of the photo (x0, y0, x1, y1)."""


def padded(photos: Sequence[CutPhoto], slots: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Photos as the detector's arguments: float views [B, V, 3, S, S] in [0, 1], mask bool [B, V], boxes [B, V, 4].

    V is the largest number of views among them, or `slots` where that is larger.
    """
    size, most = photos[0].views.shape[1], max(slots, *(len(photo.views) for photo in photos))
    views = torch.zeros(len(photos), most, 3, size, size)
    mask = torch.zeros(len(photos), most, dtype=torch.bool)
    boxes = torch.zeros(len(photos), most, 4)
    for i, photo in enumerate(photos):
        count = len(photo.views)
        views[i, :count] = torch.from_numpy(photo.views).permute(0, 3, 1, 2).float() / 255
        mask[i, :count] = True
        boxes[i, :count] = torch.from_numpy(photo.boxes)
    return views, mask, boxes


class Saved(nn.Module):
    """save_pretrained, from_pretrained, predict: mixed into the detector."""

    config: ModelConfig
    backbone: Backbone
    view_size: int
    max_views: int = MAX_VIEWS
    """Views that `cut` makes of a photo at most: as many as the shards that this model was trained on."""
    calibration: dict[str, float] | None

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        calibration: dict[str, float] | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write safetensors, config, card and, where given, the calibration.

        Args:
            folder: created where missing; each file replaced atomically.
            calibration: `temperature` (or `scale` = 1 / temperature) and `bias`, and where it is known the class `prior`
                that they answer for; None keeps the model's own, if any.
            state: weights to write instead of the model's own, shaped like those, such as fp32 masters of a model that
                computes in bf16.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        calibration = self.calibration if calibration is None else calibration
        state = {
            name: value.detach().cpu().contiguous().clone() for name, value in (state or self.state_dict()).items()
        }
        temporary = out / (WEIGHTS + ".tmp")
        save_file(state, temporary, metadata={"format": "pt"})
        os.replace(temporary, out / WEIGHTS)
        recipe: Recipe = self.backbone.recipe
        content = {
            "architecture": ARCHITECTURE,
            "format": FORMAT,
            "view_size": self.view_size,
            "max_views": self.max_views,
            "weights_origin": recipe.origin,
            "backbone": dataclasses.asdict(recipe),
            "model": dataclasses.asdict(self.config),
        }
        _write(out / CONFIG, json.dumps(content, indent=2) + "\n")
        if calibration is not None:
            scale_bias(calibration)
            _write(out / CALIBRATION, json.dumps(calibration, indent=2) + "\n")
        elif (out / CALIBRATION).exists():
            (out / CALIBRATION).unlink()
        parameters = sum(p.numel() for p in self.parameters())
        _write(out / CARD, _card(content, parameters, calibration))
        return out

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """The saved detector in eval mode; UserError where the folder holds no such model."""
        source = Path(folder)
        saved = read_config(source)
        try:
            model = cls(saved.model, saved.view_size, saved.backbone)
        except UserError as error:
            raise UserError(f"{source / CONFIG}: {error}") from error
        model.load_weights(source)
        model.max_views = saved.max_views
        model.calibration = read_calibration(source)
        return model.to(device).eval()

    def load_weights(self, folder: str | os.PathLike[str]) -> None:
        """Warm start from a saved model of the same architecture; a UserError says what differs otherwise."""
        source = Path(folder)
        saved = read_config(source)
        given, mine = saved.model.backbone, self.config.backbone
        if given != mine:
            raise UserError(
                f"{source} holds a model with backbone {given!r}, this one has {mine!r}; pass --model.backbone {given}"
            )
        try:
            state = load_file(source / WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{source / WEIGHTS} cannot be read: {error}") from error
        self._compare(state, source)
        check_finite(state, source / WEIGHTS)
        self.load_state_dict(state)
        self.backbone.recipe = saved.backbone

    def _compare(self, state: dict[str, Tensor], source: Path) -> None:
        own = self.state_dict()
        for name in sorted(set(own) | set(state)):
            there, here = state.get(name), own.get(name)
            if there is None or here is None or there.shape != here.shape:
                theirs = "nothing" if there is None else str(tuple(there.shape))
                ours = "nothing" if here is None else str(tuple(here.shape))
                raise UserError(f"{source} holds another architecture: {name} is {theirs} there and {ours} here")

    def predict(self, image: Any) -> float:
        """Probability of roadwork in [0, 1], calibrated where there is a calibration; pixels alone, as the service.

        Args:
            image: see `to_rgb`.
        """
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Any], batch: int = 8) -> list[float]:
        """The same for several pictures, `batch` at a time: no more of them are in memory as views at once."""
        batches = (images[start : start + batch] for start in range(0, len(images), batch))
        return [p for some in batches for p in self.answer([self.cut(image) for image in some])]

    def cut(self, image: Any) -> CutPhoto:
        """A picture (see `to_rgb`) as the views that the network sees; safe in several threads."""
        rgb = to_rgb(image)
        height, width = rgb.shape[:2]
        boxes = view_boxes(width, height, self.view_size, self.max_views)
        views = make_views(rgb, boxes, self.view_size)
        return CutPhoto(views, np.asarray(boxes / [width, height, width, height], dtype=np.float32))

    @torch.inference_mode()
    def answer(self, photos: Sequence[CutPhoto]) -> list[float]:
        """Calibrated probabilities of at least one photo in one forward pass; training mode is as before afterwards."""
        was, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            views, mask, boxes = padded(photos)
            outputs = self(views.to(device), mask, None, boxes, segmentation=False)
            return self.probabilities(outputs.logits).tolist()
        finally:
            self.train(was)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits [B, 2] -> float64 [B]: sigmoid((positive - negative) * scale + bias)."""
        scale, bias = (1.0, 0.0) if self.calibration is None else scale_bias(self.calibration)
        margin = (logits[:, 1] - logits[:, 0]).double()
        return torch.sigmoid(margin * scale + bias)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _card(content: dict[str, Any], parameters: int, calibration: dict[str, float] | None) -> str:
    model = content["model"]
    fields = ", ".join(model["metadata_fields"]) if model["metadata"] else "none"
    calibrated = "none: raw probabilities" if calibration is None else json.dumps(calibration)
    return f"""---
library_name: roadwork
pipeline_tag: image-classification
tags: [roadwork-detection, street-photos]
---
# Roadwork detector

Says how probable roadwork is in a street photo.

- Backbone: `{model["backbone"]}`, weights: {content["weights_origin"]}; trained part: {model["trainable"]}
- Views of {content["view_size"]} px, at most {content["max_views"]} of a photo; {parameters / 1e6:.1f} M parameters
- Metadata seen: {fields} (pixels alone are enough)
- Calibration: {calibrated}

```python
from roadwork.models import RoadworkDetector

detector = RoadworkDetector.from_pretrained(".")
probability = detector.predict("photo.jpg")
```

Scores belong to the run that made this model; see its report. The backbone's weights keep the licence of their origin.
"""
