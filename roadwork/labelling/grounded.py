"""Open-vocabulary boxes (Grounding DINO or OWLv2) and SAM 1 inside them.

A box needs a detector's score and a mask SAM's own estimate of its quality; the detectors' scores live on a scale of
their own (0.3 is a good box), so `limits.score` bounds the quality and `box_score` the box.
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
from roadwork.labelling.weights import model_folder, sam_checkpoint

log = logging.getLogger(__name__)

DEFAULT_MODEL = "IDEA-Research/grounding-dino-tiny+vit_b"
DINO_TYPES = ("grounding-dino", "mm-grounding-dino")
OWL_TYPES = ("owlv2", "owlvit")
_SAM_BY_WIDTH = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}


@dataclass(frozen=True)
class Box:
    """A detection: class 0..5, score, and (x0, y0, x1, y1) in pixels of the crop that the detector saw."""

    class_index: int
    score: float
    corners: np.ndarray


class GroundedSamBackend:
    """Boxes by words, masks by boxes.

    Args:
        model: `DETECTOR+SAM`: a hub name or folder, and vit_b, vit_l, vit_h or a .pth file; empty: the default;
            `random-tiny`, or `random-tiny-owlv2` for the other detector.
        device: where to compute.
        limits: what counts as an object; `score` bounds SAM's estimate of the mask's quality.
        box_score: smallest score of a box.
        batch: crops per detector pass.
        seed: of random-tiny's weights.

    Raises:
        UserError: weights that cannot be had, or a detector of another kind.
    """

    def __init__(
        self,
        model: str = "",
        device: torch.device | str = "cpu",
        limits: Limits | None = None,
        batch: int = 1,
        box_score: float = 0.3,
        seed: int = 0,
    ) -> None:
        from segment_anything import SamPredictor

        self.device = torch.device(device)
        self.limits, self.box_score, self.batch = limits or Limits(), box_score, max(1, batch)
        name = model or DEFAULT_MODEL
        if name.startswith(RANDOM_TINY):
            self.origin = tiny.ORIGIN
            detector, self.processor, sam = _random(name, seed)
        else:
            self.origin = name
            detector, self.processor, sam = _pretrained(name)
        self.kind = detector.config.model_type
        self.detector = detector.to(self.device).eval()
        self.sam = SamPredictor(sam.to(self.device).eval())

    def label(self, photos: Sequence[Photo]) -> list[PhotoMasks | None]:
        """Masks of each photo; every class is valid, since each was asked for."""
        canvases = [Canvas(photo.width, photo.height, self.limits) for photo in photos]
        crops = [(canvas, crop) for canvas, photo in zip(canvases, photos, strict=True) for crop in photo.crops]
        for start in range(0, len(crops), self.batch):
            chunk = crops[start : start + self.batch]
            for (canvas, crop), boxes in zip(chunk, self.detect([crop for _, crop in chunk]), strict=True):
                if boxes:
                    self._segment(canvas, crop, boxes)
        return [canvas.masks(self.origin) for canvas in canvases]

    @torch.inference_mode()
    def detect(self, crops: Sequence[Crop]) -> list[list[Box]]:
        """Boxes of each crop with at least `box_score`."""
        images = [crop.rgb for crop in crops]
        sizes = [image.shape[:2] for image in images]
        prompts = [list(PROMPTS.values())] * len(crops)
        if self.kind in OWL_TYPES:
            inputs = self.processor(images=images, text=prompts, return_tensors="pt", input_data_format="channels_last")
            outputs = self.detector(**inputs.to(self.device))
            found = self.processor.post_process_grounded_object_detection(
                outputs, threshold=self.box_score, target_sizes=sizes
            )
            return [_boxes(one["labels"].tolist(), one["scores"].tolist(), one) for one in found]
        inputs = self.processor(
            images=images, text=prompts, return_tensors="pt", padding=True, input_data_format="channels_last"
        ).to(self.device)
        outputs = self.detector(**inputs)
        found = self.processor.post_process_grounded_object_detection(
            outputs, inputs["input_ids"], threshold=self.box_score, text_threshold=self.box_score, target_sizes=sizes
        )
        named = zip(self._named(outputs.logits, inputs["input_ids"]), found, strict=True)
        boxes = [_boxes(classes, scores, one) for (classes, scores), one in named]
        return [[box for box in of_crop if box.score > self.box_score] for of_crop in boxes]

    def _named(self, logits: torch.Tensor, input_ids: torch.Tensor) -> list[tuple[list[int], list[float]]]:
        """Class and score of each box that the processor keeps: of the prompt with the best word.

        The processor's own text labels mix the words of several prompts ("traffic cone construction"), and its score may
        be that of a token which is no word.
        """
        stop = self.processor.tokenizer.convert_tokens_to_ids(".")
        named = []
        for row, ids in zip(logits.sigmoid(), input_ids, strict=True):
            kept = row[row.max(dim=-1).values > self.box_score]
            ends = (ids == stop).nonzero()[:, 0].tolist()[: len(PROMPTS)]
            starts = [1, *(end + 1 for end in ends[:-1])]
            best = [kept[:, start:end].max(dim=-1).values for start, end in zip(starts, ends, strict=True)]
            scores, classes = torch.stack(best, dim=-1).max(dim=-1)
            named.append((classes.tolist(), scores.tolist()))
        return named

    def _segment(self, canvas: Canvas, crop: Crop, boxes: list[Box]) -> None:
        """SAM's best mask in each box. SAM sees at most 1024 px, so it is given the canvas's resolution."""
        top, left, bottom, right = canvas.window(crop.box)
        height, width = bottom - top, right - left
        shrink = cv2.INTER_AREA if width < crop.rgb.shape[1] else cv2.INTER_LINEAR
        self.sam.set_image(cv2.resize(crop.rgb, (width, height), interpolation=shrink))
        scale = np.tile([width / crop.rgb.shape[1], height / crop.rgb.shape[0]], 2)
        for box in boxes:
            masks, qualities, _ = self.sam.predict(box=box.corners * scale, multimask_output=True)
            best = int(qualities.argmax())
            if qualities[best] >= self.limits.score:
                # The box's score says how sure the class is; the quality only how sharp the outline.
                canvas.add(box.class_index, crop.box, masks[best], box.score)
        self.sam.reset_image()


def _boxes(classes: list[int], scores: list[float], found: dict[str, Any]) -> list[Box]:
    corners = found["boxes"].float().cpu().numpy()
    return [Box(k, s, c) for k, s, c in zip(classes, scores, corners, strict=True)]


def _random(name: str, seed: int) -> tuple[Any, Any, torch.nn.Module]:
    words = sorted({word for prompt in PROMPTS.values() for word in prompt.split()})
    detector, processor = tiny.owlv2(seed) if name.endswith("owlv2") else tiny.grounding_dino(words, seed)
    return detector, processor, tiny.sam1(seed)


def split_name(name: str) -> tuple[str, str]:
    """Detector and SAM of `DETECTOR+SAM`; SAM's smallest where none is named."""
    detector, plus, sam = name.rpartition("+")
    return (detector, sam) if plus else (name, "vit_b")


def _pretrained(name: str) -> tuple[Any, Any, torch.nn.Module]:
    from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

    detector_name, sam_name = split_name(name)
    folder = model_folder(detector_name)
    try:
        detector = AutoModelForZeroShotObjectDetection.from_pretrained(folder, dtype=torch.float32)  # as inputs are
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"masks.model {detector_name}: not a complete open-vocabulary detector ({reason})") from None
    kinds = DINO_TYPES + OWL_TYPES
    if detector.config.model_type not in kinds:
        raise UserError(
            f"masks.model {detector_name} is of the kind {detector.config.model_type}; allowed: {', '.join(kinds)}"
        )
    return detector, processor, load_sam(sam_name)


def load_sam(name: str) -> torch.nn.Module:
    """SAM 1 from a checkpoint of segment_anything; its size is read from the weights.

    Raises:
        UserError: no such file, or a file that holds something else.
    """
    from segment_anything import sam_model_registry

    path = sam_checkpoint(name)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        size = _SAM_BY_WIDTH[weights["image_encoder.pos_embed"].shape[-1]]
        sam: torch.nn.Module = sam_model_registry[size]()
        sam.load_state_dict(weights)
    except Exception as error:  # pickle, zip, key and shape errors all mean the same to the user
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"masks.model: {path} is not a SAM 1 checkpoint of segment_anything ({reason})") from None
    return sam
