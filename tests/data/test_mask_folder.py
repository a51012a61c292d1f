"""A folder of masks as the shard builder reads it: absent, exact, a model's, damaged; and names that disks accept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadwork.data.mask_files import (
    PhotoMasks,
    decode_bits,
    file_stem,
    has_masks,
    mask_paths,
    read_masks,
    shrink_bits,
    write_atomically,
    write_masks,
)
from roadwork.data.masks import MaskFolder
from roadwork.data.record import Rejected
from roadwork.errors import UserError

BITS = np.zeros((40, 60), np.uint8)
BITS[6:20, 10:30] = 0b000011
BITS[14:34, 26:54] |= 0b100000


def masks(**changes: object) -> PhotoMasks:
    facts: dict[str, object] = {
        "bits": BITS,
        "valid": (True, True, False, True, True, True),
        "confidence": (0.9, 0.5, 0.0, 0.0, 0.0, 0.75),
        "origin": "a model",
        "width": 600,
        "height": 400,
        "objects": (2, 1, 0, 0, 0, 1),
    }
    return PhotoMasks(**(facts | changes))  # type: ignore[arg-type]


def png(bits: np.ndarray) -> bytes:
    return cv2.imencode(".png", bits)[1].tobytes()


def test_a_photo_without_files_has_no_masks(tmp_path: Path) -> None:
    folder = MaskFolder(str(tmp_path))
    assert folder.get("7") is None and read_masks(tmp_path, "7") is None and not has_masks(tmp_path, "7")
    assert folder.stamp("7") == "none, none"


def test_a_png_alone_counts_as_exact_masks_of_every_class(tmp_path: Path) -> None:
    (tmp_path / "7.png").write_bytes(png(BITS))
    found = MaskFolder(str(tmp_path)).get("7")
    assert found is not None and found.valid == [True] * 6 and found.confidence == [1.0] * 6
    assert found.real and found.origin == f"folder {tmp_path.name}"
    assert np.array_equal(decode_bits(found.png), BITS)


def test_what_a_model_wrote_says_so(tmp_path: Path) -> None:
    write_masks(tmp_path, "7", masks())
    found = MaskFolder(str(tmp_path)).get("7")
    assert found is not None and found.valid == [True, True, False, True, True, True]
    assert found.confidence == [0.9, 0.5, 0.0, 0.0, 0.0, 0.75] and found.origin == "a model" and not found.real
    write_masks(tmp_path, "8", masks(real=True))
    real = MaskFolder(str(tmp_path)).get("8")
    assert real is not None and real.real


def test_a_stamp_changes_with_either_file(tmp_path: Path) -> None:
    folder = MaskFolder(str(tmp_path))
    write_masks(tmp_path, "7", masks())
    seen = {folder.stamp("7"), folder.stamp("8")}
    assert len(seen) == 2
    for path in mask_paths(tmp_path, "7"):
        os.utime(path, ns=(1, 1))
        seen.add(folder.stamp("7"))
    assert len(seen) == 4


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="a file whose bytes the system cannot give: Linux has one"
)
def test_masks_on_a_disk_that_fails_are_not_absent(tmp_path: Path) -> None:
    (tmp_path / "7.png").symlink_to("/proc/self/mem")
    with pytest.raises(UserError, match=r"7\.png: cannot be read \(Input/output error\)"):
        MaskFolder(str(tmp_path)).get("7")


def test_a_picture_that_is_not_the_described_one_is_rejected(tmp_path: Path) -> None:
    write_masks(tmp_path, "7", masks())
    (tmp_path / "7.png").write_bytes(png(BITS ^ 1))
    with pytest.raises(Rejected, match="masks_damaged"):
        MaskFolder(str(tmp_path)).get("7")
    with pytest.raises(ValueError, match="7.png does not match the checksum in 7.json; label this photo again"):
        read_masks(tmp_path, "7")
    assert not has_masks(tmp_path, "7")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"masks"'])
def test_a_description_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    """Also JSON that parses and is no description."""
    write_masks(tmp_path, "7", masks())
    (tmp_path / "7.json").write_text(text)
    with pytest.raises(UserError, match=r"7\.json"):
        MaskFolder(str(tmp_path)).get("7")
    with pytest.raises(ValueError, match=r"7\.json .*label this photo again"):
        read_masks(tmp_path, "7")
    assert not has_masks(tmp_path, "7")


@pytest.mark.parametrize("field", ["masks_valid", "masks_confidence"])
def test_a_description_of_another_number_of_classes_is_refused(tmp_path: Path, field: str) -> None:
    write_masks(tmp_path, "7", masks())
    facts = json.loads((tmp_path / "7.json").read_text())
    facts[field] = facts[field][:5]
    (tmp_path / "7.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match="must hold 6 values"):
        MaskFolder(str(tmp_path)).get("7")


@pytest.mark.parametrize("field", ["masks_valid", "masks_confidence", "objects", "origin", "photo", "crc32"])
def test_a_description_that_lacks_something_names_it(tmp_path: Path, field: str) -> None:
    write_masks(tmp_path, "7", masks())
    facts = json.loads((tmp_path / "7.json").read_text())
    del facts[field]
    (tmp_path / "7.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=f"lacks {field}"):
        read_masks(tmp_path, "7")


def test_a_description_without_its_picture_is_named(tmp_path: Path) -> None:
    write_masks(tmp_path, "7", masks())
    (tmp_path / "7.png").unlink()
    with pytest.raises(ValueError, match="has no 7.png beside it"):
        read_masks(tmp_path, "7")
    assert MaskFolder(str(tmp_path)).get("7") is None


def test_no_folder_is_told_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"launch/pseudo_masks.py"):
        MaskFolder(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": np.zeros((4, 4, 3), np.uint8)},
        {"bits": np.zeros((4, 4), np.int32)},
        {"bits": np.zeros((0, 4), np.uint8)},
        {"valid": (True,) * 5},
        {"confidence": (1.0,) * 7},
        {"objects": ()},
    ],
)
def test_masks_of_an_impossible_shape_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="needed"):
        masks(**changes)


@given(st.text(min_size=1, max_size=140))
def test_every_id_has_a_name_that_a_disk_accepts(photo_id: str) -> None:
    """255 bytes at most, no separator, not hidden; with the suffixes that are put around it while it is written."""
    stem = file_stem(photo_id)
    assert len(f".{stem}.json.partial-4194304".encode()) <= 255
    assert "/" not in stem and "\0" not in stem and not stem.startswith(".")


@pytest.mark.parametrize("photo_id", ["東" * 100, "ä" * 100, "x" * 100, "x" * 101, "名" * 33])
def test_long_ids_of_any_script_are_written_and_read(tmp_path: Path, photo_id: str) -> None:
    write_masks(tmp_path, photo_id, masks())
    found = read_masks(tmp_path, photo_id)
    assert found is not None and np.array_equal(found.bits, BITS)
    assert len(list(tmp_path.iterdir())) == 2


def test_different_ids_have_different_files() -> None:
    ids = ["a", "a/b", "a_b", "a.b", "A", ".a", "", "a" * 101, "a" * 102, "ä", "sha256-" + "0" * 40]
    assert len({file_stem(photo_id) for photo_id in ids}) == len(ids)


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "7.png"
    write_atomically(target, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old" and [path.name for path in tmp_path.iterdir()] == ["7.png"]


@pytest.mark.parametrize(
    "data", [b"", b"no picture", png(np.zeros((4, 4, 3), np.uint8)), png(np.zeros((4, 4), np.uint16))]
)
def test_bytes_that_are_no_class_bits_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a PNG of class bits"):
        decode_bits(data)


def test_shrinking_never_mixes_classes_and_never_invents_one() -> None:
    small = shrink_bits(BITS, 20, 30)
    assert small.shape == (20, 30) and small.dtype == np.uint8
    assert int(small.max()) & ~0b100011 == 0
    for k in (0, 1, 5):
        assert abs((small >> k & 1).mean() - (BITS >> k & 1).mean()) < 1e-9
    assert shrink_bits(BITS, 40, 60) is BITS
    assert not shrink_bits(np.zeros((8, 8), np.uint8), 4, 4).any()


@pytest.mark.parametrize(("share", "there"), [(0.25, True), (0.5, False), (1.0, False)])
def test_a_cell_has_a_class_from_the_stated_share_on(share: float, there: bool) -> None:
    bits = np.zeros((4, 4), np.uint8)
    bits[0, 0] = 1 << 3  # a quarter of the first cell of 2 x 2 pixels
    assert bool(shrink_bits(bits, 2, 2, share)[0, 0] >> 3 & 1) is there
