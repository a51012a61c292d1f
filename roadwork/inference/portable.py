"""The saved network as one graph that runs without this package: torch.export and ONNX, compared with it on the spot."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from roadwork.data.views import MAX_VIEWS
from roadwork.errors import UserError
from roadwork.inference.options import ExportOptions
from roadwork.models import RoadworkDetector
from roadwork.models.saved import CutPhoto, padded

INPUTS, OUTPUT = ("views", "view_mask", "boxes"), "probability"
TOLERANCE = 1e-4
"""Largest difference in probability that an export may show; rounding alone stays far below it."""
SIZES = ((224, 224), (1280, 720), (720, 1280), (640, 480))
"""(width, height) of the pictures that an export is compared on: the service's own, and some with many views."""


class Answering(nn.Module):
    """Pixels in, calibrated probability out: what a service needs of the detector, and nothing else."""

    def __init__(self, detector: RoadworkDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, views: Tensor, view_mask: Tensor, boxes: Tensor) -> Tensor:
        """views fp32 [B, V, 3, S, S] in [0, 1], view_mask bool [B, V], boxes fp32 [B, V, 4] -> fp32 [B]."""
        outputs = self.detector(views, view_mask, None, boxes, segmentation=False)
        return self.detector.probabilities(outputs.logits).float()


def comparison_photos(detector: RoadworkDetector, views: int) -> list[CutPhoto]:
    """Noise pictures of several shapes as the detector cuts them, with at most `views` views each."""
    rng = np.random.default_rng(0)
    cut = [detector.cut(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]
    return [CutPhoto(photo.views[:views], photo.boxes[:views]) for photo in cut]


@torch.no_grad()
def export_program(detector: RoadworkDetector, views: int) -> torch.export.ExportedProgram:
    """The detector by torch.export: any number of photos, exactly `views` views each (padded and masked).

    The calibration is in the graph. Raises UserError for numbers of views that the detector never sees.
    """
    if not 1 <= views <= MAX_VIEWS:
        raise UserError(f"--views is {views}; give 1 to {MAX_VIEWS}, or 0 for as many as the model cuts")
    answering = Answering(detector).eval()
    example = padded(comparison_photos(detector, views)[:3], views)
    answering(*example)  # constants that the backbone keeps must be real tensors before the tracer comes by
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(answering, example, dynamic_shapes={name: {0: batch} for name in INPUTS})


def _stable_sort(values: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable in ONNX, whose TopK puts the lower index first among equals: the same order."""
    from onnxscript import opset18

    op: Any = opset18  # its own annotations do not fit each other
    length = op.Reshape(op.Gather(op.Shape(values), op.Constant(value_int=dim)), op.Constant(value_ints=[1]))
    return op.TopK(values, length, axis=dim, largest=int(descending), sorted=1)


def write_onnx(program: torch.export.ExportedProgram, detector: RoadworkDetector, views: int, path: Path) -> None:
    """Write an exported program as ONNX, with what a caller must know about its inputs as metadata.

    UserError where the packages for it are not installed.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it and would say so in a traceback
    except ImportError:
        raise UserError("ONNX needs the packages of the extra `export`: pip install -e '.[export]'") from None
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        made = torch.onnx.export(
            program,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
            optimize=False,  # the runtime optimises for its own hardware; doing it here takes minutes
        )
    assert made is not None
    sizes = {"view_size": detector.view_size, "views": views, "max_views": detector.max_views}
    made.model.metadata_props.update({name: str(size) for name, size in sizes.items()}, pixels="RGB in [0, 1]")
    _replace(path, lambda temporary: made.save(temporary))


def run_onnx(path: Path) -> Callable[..., Tensor]:
    """The written graph in onnxruntime on the CPU, called like `Answering`: fp32 [B]. UserError where that is not
    installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("the check of the ONNX file needs onnxruntime: pip install -e '.[export]'") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*tensors: Tensor) -> Tensor:
        named = {name: tensor.numpy() for name, tensor in zip(INPUTS, tensors, strict=True)}
        return torch.from_numpy(session.run([OUTPUT], named)[0])

    return run


@torch.no_grad()
def largest_error(run: Callable[..., Tensor], detector: RoadworkDetector, views: int) -> float:
    """Largest difference in probability from `detector.answer`: each photo alone, and all in one padded batch.

    run: called like `Answering`, -> [B].
    """
    photos = comparison_photos(detector, views)
    batches = [[photo] for photo in photos] + [photos]
    found = [run(*padded(batch, views)).double() - torch.tensor(detector.answer(batch)) for batch in batches]
    return float(torch.cat(found).abs().max())


def export(options: ExportOptions) -> dict[Path, float]:
    """Write what `options.format` asks for and compare it with the model. Returns path -> largest error.

    Raises UserError where there is no model or a package is missing, RuntimeError where an export answers differently.
    """
    detector = RoadworkDetector.from_pretrained(options.model)
    out = Path(options.out or options.model)
    views = options.views or detector.max_views
    program = export_program(detector, views)
    written: dict[Path, float] = {}
    if options.format != "onnx":
        path = out / "exported" / "model.pt2"
        _replace(path, lambda temporary: torch.export.save(program, temporary))
        loaded = torch.export.load(path).module()
        written[path] = largest_error(loaded, detector, views)
    if options.format != "torch":
        path = out / "onnx" / "model.onnx"
        write_onnx(program, detector, views, path)
        written[path] = largest_error(run_onnx(path), detector, views)
    for path, error in written.items():
        if not error <= TOLERANCE:
            raise RuntimeError(f"{path} differs from {options.model} by {error:.2g} in probability; do not use it")
    return written


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write in a temporary folder and move what lies there, `path` last.

    The name is the final one from the beginning: many weights go to a file beside it, NAME.data, which it names.
    UserError where the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{os.getpid()}.", dir=path.parent) as folder:
            made = Path(folder) / path.name
            write(made)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == made):
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written: {error.strerror}; give another --out") from None
