"""The exported graphs answer what the model answers, in runtimes that know nothing of this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from roadwork.errors import UserError
from roadwork.inference.options import ExportOptions
from roadwork.inference.portable import _replace, export, export_program, run_onnx
from roadwork.models import RoadworkDetector
from roadwork.models.saved import padded
from tests.inference.spread import spread_answers, tiny_detector


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny detector with random weights whose answers differ from picture to picture."""
    detector = tiny_detector()
    with torch.no_grad():
        detector.pruner.net[-1].weight.mul_(100)
    spread_answers(detector, pictures())
    folder = tmp_path_factory.mktemp("portable") / "model"
    return detector.save_pretrained(folder, calibration={"temperature": 0.5, "bias": 0.3})


def pictures() -> list[np.ndarray]:
    """Of one view and of many."""
    rng = np.random.default_rng(5)
    shapes = [(224, 224), (360, 640), (700, 300), (224, 224), (90, 160)]
    return [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def written(model: Path) -> dict[Path, float]:
    return export(ExportOptions(model=str(model), format="both"))


def test_onnxruntime_and_torch_export_answer_as_the_model(model: Path, written: dict[Path, float]) -> None:
    assert [str(path.relative_to(model)) for path in written] == ["exported/model.pt2", "onnx/model.onnx"]
    assert max(written.values()) < 1e-5
    detector = RoadworkDetector.from_pretrained(model)
    cut = [detector.cut(picture) for picture in pictures()]
    assert {len(photo.views) for photo in cut} >= {1, 12}
    expected = [detector.predict(picture) for picture in pictures()]
    assert np.ptp(expected) > 1e-2, "answers that hardly differ would prove nothing"
    for run in (run_onnx(model / "onnx" / "model.onnx"), torch.export.load(model / "exported" / "model.pt2").module()):
        together = run(*padded(cut, 12)).tolist()
        alone = [run(*padded([photo], 12)).item() for photo in cut]
        assert together == pytest.approx(expected, abs=1e-5) and alone == pytest.approx(expected, abs=1e-5)


def test_the_graph_says_what_it_takes(model: Path, written: dict[Path, float]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [
        ("views", [12, 3, 64, 64]), ("view_mask", [12]), ("boxes", [12, 4]),
    ]  # fmt: skip
    known = session.get_modelmeta().custom_metadata_map
    assert (known["view_size"], known["views"], known["max_views"]) == ("64", "12", "12")
    assert RoadworkDetector.from_pretrained(model).predict(np.zeros((64, 64, 3), dtype=np.uint8)) <= 1
    assert not list(model.rglob(".*"))


def test_without_a_number_the_graph_takes_as_many_views_as_the_model_cuts(model: Path, tmp_path: Path) -> None:
    detector = RoadworkDetector.from_pretrained(model)
    detector.max_views = 4
    detector.save_pretrained(tmp_path)
    (error,) = export(ExportOptions(model=str(tmp_path), format="torch")).values()
    assert error < 1e-5
    graph = torch.export.load(tmp_path / "exported" / "model.pt2").module()
    (cut,) = [detector.cut(picture) for picture in pictures()[1:2]]
    assert graph(*padded([cut])).item() == pytest.approx(detector.predict(pictures()[1]), abs=1e-5)
    assert len(cut.views) == 4


def test_weights_beside_the_graph_are_found_under_its_own_name(tmp_path: Path) -> None:
    import onnxruntime

    layer, path = torch.nn.Linear(64, 32).eval(), tmp_path / "onnx" / "model.onnx"
    made = torch.onnx.export(layer, (torch.zeros(1, 64),), dynamo=True, optimize=False, verbose=False)
    assert made is not None
    for _ in range(2):  # the second time over files that are there
        _replace(path, lambda temporary: made.save(temporary, external_data=True))
        assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (name,) = [i.name for i in session.get_inputs()]
        assert session.run(None, {name: np.ones((1, 64), np.float32)})[0] == pytest.approx(
            layer(torch.ones(1, 64)).detach().numpy(), abs=1e-5
        )


def test_impossible_numbers_of_views_and_missing_models_are_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--views is 13; give 1 to 12"):
        export_program(RoadworkDetector.from_pretrained(model), 13)
    with pytest.raises(UserError, match="holds no saved model"):
        export(ExportOptions(model=str(tmp_path)))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/x/onnx cannot be written: Not a directory; give another --out"):
        export(ExportOptions(model=str(model), out=str(tmp_path / "file" / "x")))
