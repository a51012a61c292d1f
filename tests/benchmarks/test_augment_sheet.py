"""The contact sheet shows every op of the augmentation."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import augment_sheet
from roadwork.config import AugmentConfig


def test_every_op_has_a_row_of_pictures_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment_sheet, "_SIDE", 64)  # of the photos: the sheet is for a person, the test is not
    names = [name for name, _, _ in augment_sheet._ops(AugmentConfig())]
    wanted = {name.removesuffix("_p") for name in vars(AugmentConfig()) if name.endswith("_p")}
    assert {name.lower().replace(" ", "_") for name in names} == wanted and len(names) == len(wanted)
    photos = []
    for i, (width, height) in enumerate(((96, 72), (70, 110))):
        pixels = np.random.default_rng(i).integers(60, 200, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        photos.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(photos[-1])
    augment_sheet.write_sheet(tmp_path / "sheet.jpg", photos)
    with Image.open(tmp_path / "sheet.jpg") as file:
        sheet = np.asarray(file.convert("RGB")).astype(int)
    tile = augment_sheet._TILE
    assert sheet.shape[:2] == ((len(names) + 1) // 2 * (tile + 18), 8 * tile + 12)
    for i, name in enumerate(names):
        x, y = i % 2 * (4 * tile + 12), i // 2 * (tile + 18) + 18
        before, strongest = (sheet[y : y + tile, x + k * tile : x + (k + 1) * tile] for k in (0, 3))
        assert np.abs(before - strongest).mean() > 1, f"{name} changes nothing"
