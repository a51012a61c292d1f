"""Saving, loading, warm starts, and the answer to one picture."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from roadwork.config import ModelConfig
from roadwork.data.images import decode_photo
from roadwork.data.views import view_boxes
from roadwork.errors import UserError
from roadwork.models import RoadworkDetector
from roadwork.models.saved import padded, to_rgb

Build = Callable[..., RoadworkDetector]


@pytest.fixture
def photo() -> npt.NDArray[np.uint8]:
    """A smooth picture, so that JPEG keeps it."""
    y, x = np.mgrid[0:90, 0:160]
    return np.stack([x, y * 2, (x + y)], axis=-1).clip(0, 255).astype(np.uint8)


def _bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["test_vit", "efficientnet_lite0"])
def test_saved_and_loaded_models_are_equal(
    build: Build, tmp_path: Path, photo: npt.NDArray[np.uint8], name: str
) -> None:
    model = build(backbone=name, weights="auto" if name == "efficientnet_lite0" else "random").eval()
    model.save_pretrained(tmp_path)
    loaded = RoadworkDetector.from_pretrained(tmp_path)
    assert loaded.weights_origin == model.weights_origin
    assert loaded.config == model.config
    assert not loaded.training
    for (key, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b), key
    assert loaded.predict(photo) == model.predict(photo)
    card = (tmp_path / "README.md").read_text()
    assert model.weights_origin in card
    assert "random" in card if name == "test_vit" else "ImageNet" in card
    assert not list(tmp_path.glob("*.tmp"))


def test_a_photo_is_cut_into_as_many_views_as_in_the_shards_of_the_training(build: Build, tmp_path: Path) -> None:
    model, photo = build().eval(), np.zeros((360, 640, 3), np.uint8)
    assert len(model.cut(photo).views) == 12
    model.max_views = 4
    loaded = RoadworkDetector.from_pretrained(model.save_pretrained(tmp_path))
    cut = loaded.cut(photo)
    assert len(cut.views) == 4
    np.testing.assert_allclose(cut.boxes * [640, 360, 640, 360], view_boxes(640, 360, 64, 4), rtol=1e-6)
    assert "at most 4 of a photo" in (tmp_path / "README.md").read_text()
    content = json.loads((tmp_path / "config.json").read_text())
    assert content.pop("max_views") == 4
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert RoadworkDetector.from_pretrained(tmp_path).max_views == 12, "as the version that wrote no number did"


def test_how_to_compute_is_not_loaded(build: Build, tmp_path: Path) -> None:
    """Another machine may lack the kernels of the one that trained."""
    build(attention="math").save_pretrained(tmp_path)
    loaded = RoadworkDetector.from_pretrained(tmp_path)
    assert loaded.config.attention == "auto" and loaded.runtime()["attention"].startswith("auto (")


def test_the_folder_is_one_that_the_hub_takes_as_it_is(build: Build, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path, {"temperature": 1.0, "bias": 0.0})
    assert {path.name for path in tmp_path.rglob("*")} == {
        "model.safetensors", "config.json", "calibration.json", "README.md",
    }  # fmt: skip
    data = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert data["pipeline_tag"] == "image-classification" and data["library_name"] == "roadwork"


def test_calibration_is_used_and_kept(build: Build, tmp_path: Path, photo: npt.NDArray[np.uint8]) -> None:
    model = build().eval()
    views, mask, boxes = padded([model.cut(photo)])
    with torch.no_grad():
        logits = model(views, mask, None, boxes).logits[0].double()
    margin = float(logits[1] - logits[0])
    assert model.predict(photo) == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-6)
    for calibration in ({"temperature": 0.5, "bias": -1.5}, {"scale": 2.0, "bias": -1.5}):
        model.save_pretrained(tmp_path, calibration)
        loaded = RoadworkDetector.from_pretrained(tmp_path)
        assert loaded.predict(photo) == pytest.approx(1 / (1 + np.exp(-(2 * margin - 1.5))), abs=1e-6)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "calibration.json").read_text()) == {"scale": 2.0, "bias": -1.5}
    with pytest.raises(UserError, match="calibration"):
        model.save_pretrained(tmp_path, {"temperature": 0.0, "bias": 0.0})


def test_predict_takes_every_kind_of_picture(build: Build, tmp_path: Path, photo: npt.NDArray[np.uint8]) -> None:
    model = build().eval()
    image = Image.fromarray(photo)
    expected = model.predict(photo)
    assert 0 <= expected <= 1
    png = _bytes(image, "PNG")
    (tmp_path / "photo.png").write_bytes(png)
    for same in (image, png, tmp_path / "photo.png", str(tmp_path / "photo.png"), image.convert("RGBA")):
        assert model.predict(same) == expected
    grey = photo[..., 0]
    assert (
        model.predict(grey)
        == model.predict(Image.fromarray(grey))
        == model.predict(_bytes(Image.fromarray(grey), "PNG"))
    )
    for mode in ("CMYK", "P", "LA", "1", "YCbCr"):
        assert 0 <= model.predict(image.convert(mode)) <= 1
    assert 0 <= model.predict(_bytes(image.convert("CMYK"), "JPEG")) <= 1
    upright = _bytes(image, "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: viewers rotate by 270 degrees
    turned = _bytes(image.rotate(90, expand=True), "JPEG", quality=95, exif=exif)
    assert to_rgb(turned).shape == photo.shape
    assert np.abs(to_rgb(turned).astype(int) - to_rgb(upright).astype(int)).mean() < 3
    assert model.predict_batch([photo, grey, png]) == pytest.approx([expected, model.predict(grey), expected], abs=1e-5)


@pytest.mark.parametrize("brightest", [200, 300, 65535])
def test_16_bit_greyscale_keeps_its_range_as_in_the_shards(brightest: int) -> None:
    wide = np.linspace(0, brightest, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = Image.fromarray(wide)
    png = _bytes(image, "PNG")
    for rgb in (to_rgb(png), to_rgb(image)):
        assert np.array_equal(rgb[..., 0], (wide >> 8).astype(np.uint8))
        assert np.array_equal(rgb, decode_photo(png)[0])


def test_a_pil_picture_is_treated_as_its_file(photo: npt.NDArray[np.uint8]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    see_through = Image.fromarray(np.dstack([photo, photo[..., 0]]))
    for image in (see_through, see_through.convert("LA"), Image.fromarray(photo).quantize(20), Image.fromarray(photo)):
        png = _bytes(image, "PNG", exif=exif)
        rgb = to_rgb(Image.open(io.BytesIO(png)))
        assert rgb.shape == (160, 90, 3) and np.array_equal(rgb, to_rgb(png))


def test_bad_pictures_are_errors(build: Build, tmp_path: Path, photo: npt.NDArray[np.uint8]) -> None:
    model = build().eval()
    jpeg, png = (_bytes(Image.fromarray(photo), kind) for kind in ("JPEG", "PNG"))
    wrong: list[object] = [
        b"",
        b"not an image",
        jpeg[: len(jpeg) // 2],
        jpeg[: len(jpeg) // 2] + b"\xff\xd9",  # Pillow alone would answer for half a photo
        png[:-40],
        _bytes(Image.fromarray(photo), "EPS"),  # Pillow would start an interpreter for it
        tmp_path / "missing.jpg",
        tmp_path,
        "a" * 5000,
        photo.astype(np.float32),
        photo[..., :2],
        photo[:10],
        Image.fromarray(photo[:10]),
        Image.fromarray(photo[..., 0].astype(np.float32)),
    ]
    for image in wrong:
        with pytest.raises(ValueError) as caught:
            model.predict(image)
        assert "\n" not in str(caught.value)
    for image in (None, 3, [photo], torch.zeros(3, 32, 32)):
        with pytest.raises(TypeError):
            model.predict(image)


def test_many_pictures_are_cut_batch_by_batch(build: Build, photo: npt.NDArray[np.uint8]) -> None:
    model = build().eval()
    expected = [model.predict(photo), model.predict(photo[::-1])]
    order: list[str] = []
    cut, answer = model.cut, model.answer
    model.cut = lambda image: order.append("cut") or cut(image)  # type: ignore[func-returns-value, method-assign]
    model.answer = lambda photos: order.append("answer") or answer(photos)  # type: ignore[func-returns-value, method-assign]
    found = model.predict_batch([photo, photo[::-1], photo, photo[::-1], photo], 2)
    assert found == pytest.approx([*expected, *expected, expected[0]], abs=1e-5)
    assert order == ["cut", "cut", "answer", "cut", "cut", "answer", "cut", "answer"]
    assert model.predict_batch([]) == []


def test_predict_leaves_the_model_as_it_was(build: Build, photo: npt.NDArray[np.uint8]) -> None:
    model = build().train()
    assert model.predict(photo) == model.predict(photo)
    assert model.training and model.layers.training


def test_warm_start_and_other_architectures(build: Build, tmp_path: Path) -> None:
    saved = build(seed=1)
    saved.save_pretrained(tmp_path)
    fresh = build(seed=2)
    fresh.load_weights(tmp_path)
    assert torch.equal(fresh.projection.weight, saved.projection.weight)
    for message, changes in {
        "backbone 'test_vit'": {"backbone": "test_resnet"},
        "another architecture: layers.2": {"num_layers": 3},
        "another architecture: .* is \\(": {"hidden_dim": 64},
    }.items():
        with pytest.raises(UserError, match=message):
            build(**changes).load_weights(tmp_path)
    with pytest.raises(UserError, match="holds no saved model"):
        RoadworkDetector.from_pretrained(tmp_path / "nowhere")
    content = json.loads((tmp_path / "config.json").read_text())
    for field, value in {"architecture": "Other", "format": 99}.items():
        (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
        with pytest.raises(UserError, match=str(value)):
            RoadworkDetector.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="cannot be read"):
        RoadworkDetector.from_pretrained(tmp_path)


DAMAGED: list[tuple[str, Any, str]] = [
    ("view_size", None, r"config.json lacks the field view_size"),
    ("backbone", None, r"config.json lacks the field backbone"),
    ("model", None, r"config.json lacks the field model"),
    ("backbone.name", None, r"config.json lacks the field backbone.name"),
    ("view_size", "64", r"config.json: view_size is '64'; expected int"),
    ("view_size", -64, r"config.json: .*-64"),
    ("max_views", 0, r"config.json: max_views is 0; expected an int from 1 to 12"),
    ("max_views", 13, r"config.json: max_views is 13; expected"),
    ("max_views", "4", r"config.json: max_views is '4'; expected"),
    ("max_views", True, r"config.json: max_views is True; expected"),
    ("model", [], r"config.json: model is \[\]; expected dict"),
    ("backbone", "test_vit", r"config.json: backbone is 'test_vit'; expected dict"),
    ("model.hidden_dim", "a", r"config.json: model.hidden_dim is 'a'; expected int"),
    ("model.hidden_dim", 30, r"config.json: model.hidden_dim is 30; give a multiple of 4"),
    ("model.metadata", 1, r"config.json: model.metadata is 1; expected bool"),
    ("model.dropout", float("nan"), r"config.json: model.dropout is nan; expected float"),
    ("model.metadata_fields", ["gps", 3], r"config.json: model.metadata_fields is .*; expected list\[str\]"),
    ("model.compile_mode", "fast", r"config.json: model.compile_mode is 'fast'; expected Literal\['default', "),
    ("backbone.zzz", 1, r"config.json: backbone.zzz is unknown; allowed: name, mean, std"),
    ("backbone.mean", [1], r"config.json: backbone.mean is \[1\]; expected tuple\[float, float, float\]"),
    ("backbone.std", [1, 0, 1], r"config.json: backbone.std is \[1, 0, 1\]; expected three numbers above 0"),
    ("backbone.name", "nonsense", r"config.json: .*'nonsense' is not a timm model"),
    ("backbone.arguments", {"zzz": 3}, r"config.json: timm cannot build test_vit"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ModelConfig("test_vit", "random", prune_after=2, hidden_dim=32, num_layers=1, num_heads=4, num_kv_heads=2)
    folder = tmp_path_factory.mktemp("saved")
    return RoadworkDetector(config, 64).save_pretrained(folder, {"temperature": 1.0, "bias": 0.0})


@pytest.mark.parametrize(("field", "value", "message"), DAMAGED, ids=[f"{row[0]}={row[1]}" for row in DAMAGED])
def test_a_damaged_configuration_is_one_line_with_file_and_field(
    saved: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    shutil.copytree(saved, tmp_path / "model")
    content = json.loads((saved / "config.json").read_text())
    *sections, name = field.split(".")
    place = content[sections[0]] if sections else content
    if value is None:
        del place[name]
    else:
        place[name] = value
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        RoadworkDetector.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"), [("calibration.json", '{"temp'), ("calibration.json", "[1]"), ("calibration.json", "{}"),
                       ("calibration.json", '{"scale": 1, "prior": 1}'), ("config.json", "{"), ("config.json", "\xff\xfe")]
)  # fmt: skip
def test_torn_files_beside_the_weights_are_named(saved: Path, tmp_path: Path, name: str, text: str) -> None:
    shutil.copytree(saved, tmp_path / "model")
    (tmp_path / "model" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"model/{name}") as caught:
        RoadworkDetector.from_pretrained(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_fields_of_a_later_version_are_left_out(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    content = json.loads((saved / "config.json").read_text())
    content["model"]["invented_later"] = 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(content))
    assert RoadworkDetector.from_pretrained(tmp_path / "model").calibration == {"temperature": 1.0, "bias": 0.0}
