"""SAM 3 (arXiv 2511.16719): six concepts by text, one vision pass per photo.

Of the 840 M parameters, 454 M are the vision encoder; it runs once per crop and all prompts share its features. Text
features are computed once per run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch

from roadwork.data.mask_files import PhotoMasks
from roadwork.errors import UserError
from roadwork.labelling import tiny
from roadwork.labelling.backend import PROMPTS, RANDOM_TINY, Canvas, Crop, Limits, Photo
from roadwork.labelling.weights import model_folder

log = logging.getLogger(__name__)

DEFAULT_MODEL = "facebook/sam3"
QUERIES_AT_ONCE = 16
"""Objects whose masks are enlarged together: bounds memory to 16 canvases where a crowd of 200 would need gigabytes."""


@dataclass(frozen=True)
class _Text:
    """One prompt's features: [1, 32, hidden] and the mask of its tokens [1, 32]."""

    features: torch.Tensor
    mask: torch.Tensor


class Sam3Backend:
    """Text-prompted masks.

    Args:
        model: local folder or hub name; empty: facebook/sam3; `random-tiny`.
        device: where to compute; bfloat16 on a GPU, float32 elsewhere.
        limits: what counts as an object.
        batch: crops per vision pass.
        shared_vision: False runs the vision encoder once per prompt, as the model's own `forward` does: the
            reference that tests and the benchmark compare with.
        semantic: take the model's union map instead of single objects: quicker, but one score per photo.
        seed: of random-tiny's weights.

    Raises:
        UserError: weights that cannot be had.
    """

    def __init__(
        self,
        model: str = "",
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        batch: int = 1,
        shared_vision: bool = True,
        semantic: bool = False,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.limits = limits or Limits()
        self.batch, self.shared_vision, self.semantic = max(1, batch), shared_vision, semantic
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        name = model or DEFAULT_MODEL
        network, self.processor = tiny.sam3(seed) if name == RANDOM_TINY else _pretrained(name)
        self.origin = tiny.ORIGIN if name == RANDOM_TINY else name
        self.model = network.to(self.device, self.dtype).eval()
        self.texts = [self._text(prompt) for prompt in PROMPTS.values()]

    def label(self, photos: Sequence[Photo]) -> list[PhotoMasks | None]:
        """Masks of each photo; every class is valid, since each was asked for."""
        canvases = [Canvas(photo.width, photo.height, self.limits) for photo in photos]
        crops = [(canvas, crop) for canvas, photo in zip(canvases, photos, strict=True) for crop in photo.crops]
        for start in range(0, len(crops), self.batch):
            self._label_crops(crops[start : start + self.batch])
        return [canvas.masks(self.origin) for canvas in canvases]

    @torch.inference_mode()
    def _text(self, prompt: str) -> _Text:
        inputs = self.processor(text=[prompt], return_tensors="pt").to(self.device)
        found = self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return _Text(found.pooler_output, inputs["attention_mask"])

    @torch.inference_mode()
    def _label_crops(self, crops: list[tuple[Canvas, Crop]]) -> None:
        pixels = self.processor(
            images=[crop.rgb for _, crop in crops], return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"].to(self.device, self.dtype)
        vision = self.model.get_vision_features(pixel_values=pixels) if self.shared_vision else None
        for class_index, text in enumerate(self.texts):
            seen = {"vision_embeds": vision} if vision is not None else {"pixel_values": pixels}
            outputs = self.model(**seen, **_expanded(text, len(crops)))
            for row, (canvas, crop) in enumerate(crops):
                self._add_objects(outputs, row, class_index, canvas, crop)

    def _add_objects(self, outputs: Any, row: int, class_index: int, canvas: Canvas, crop: Crop) -> None:
        presence = float(outputs.presence_logits[row].float().sigmoid().max())
        if presence < self.limits.presence:
            return
        top, left, bottom, right = canvas.window(crop.box)
        size = (bottom - top, right - left)
        if self.semantic:
            one = _rows(outputs, row, None)
            found = self.processor.post_process_semantic_segmentation(one, [size], self.limits.mask)[0]
            for mask in _components(found.cpu().numpy().astype(np.uint8)):
                canvas.add(class_index, crop.box, mask, presence)
            return
        scores = outputs.pred_logits[row].float().sigmoid() * presence
        above = (scores > self.limits.score).nonzero()[:, 0]
        for queries in above.split(QUERIES_AT_ONCE):
            found = self.processor.post_process_instance_segmentation(
                _rows(outputs, row, queries), self.limits.score, self.limits.mask, [size]
            )[0]
            for mask, score in zip(found["masks"].bool().cpu().numpy(), found["scores"].tolist(), strict=True):
                canvas.add(class_index, crop.box, mask, score)


def _expanded(text: _Text, count: int) -> dict[str, Any]:
    """One prompt for `count` crops. The model wants the whole output of get_text_features, not its tensor."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    features = text.features.expand(count, -1, -1)
    return {
        "text_embeds": BaseModelOutputWithPooling(pooler_output=features),
        "attention_mask": text.mask.expand(count, -1),
    }


def _rows(outputs: Any, row: int, queries: torch.Tensor | None) -> Any:
    """The outputs of one crop (and of some of its queries) in float32, as the processor takes them."""
    one = slice(row, row + 1)
    if queries is None:
        return type(outputs)(semantic_seg=outputs.semantic_seg[one].float())
    return type(outputs)(
        pred_masks=outputs.pred_masks[one][:, queries].float(),
        pred_boxes=outputs.pred_boxes[one][:, queries].float(),
        pred_logits=outputs.pred_logits[one][:, queries].float(),
        presence_logits=outputs.presence_logits[one].float(),
    )


def _components(bits: np.ndarray) -> list[np.ndarray]:
    """Connected parts of a map, so that the smallest size holds for each."""
    count, parts = cv2.connectedComponents(bits)
    return [parts == part for part in range(1, count)]


def _pretrained(name: str) -> tuple[Any, Any]:
    from transformers import Sam3Model, Sam3Processor

    folder = model_folder(name)
    try:
        return Sam3Model.from_pretrained(folder), Sam3Processor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"masks.model {name}: not a complete SAM 3 of transformers ({reason})") from None
