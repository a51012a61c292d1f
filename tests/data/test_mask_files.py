"""Files of masks: complete or absent, small, and read by the shard builder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from roadwork.data.decode import MAX_MASK_BYTES, decode_masks, encode_masks
from roadwork.data.mask_files import (
    PhotoMasks,
    has_masks,
    mask_paths,
    read_masks,
    shrink_bits,
    write_masks,
)
from roadwork.data.masks import MaskFolder


def _masks(bits: np.ndarray) -> PhotoMasks:
    valid = (True, True, False, True, True, True)
    return PhotoMasks(bits, valid, (0.9, 0.0, 0.0, 0.12345, 0.0, 1.0), "hand", 40, 30, (2, 0, 0, 1, 0, 1))


@pytest.fixture
def bits() -> np.ndarray:
    made = np.zeros((30, 40), np.uint8)
    made[3:9, 5:12] = 0b101001
    return made


@pytest.mark.parametrize("photo_id", ["a1", "a/b", "a_b", ".hidden", "x" * 300, "straße", "about"])
def test_round_trip(tmp_path: Path, bits: np.ndarray, photo_id: str) -> None:
    assert read_masks(tmp_path, photo_id) is None and not has_masks(tmp_path, photo_id)
    write_masks(tmp_path, photo_id, _masks(bits))
    found = read_masks(tmp_path, photo_id)
    assert found is not None and (found.bits == bits).all()
    assert found.valid == _masks(bits).valid and found.confidence == (0.9, 0.0, 0.0, 0.1235, 0.0, 1.0)
    assert (found.width, found.height, found.objects, found.origin) == (40, 30, (2, 0, 0, 1, 0, 1), "hand")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_shard_builder_reads_the_same_files(tmp_path: Path, bits: np.ndarray) -> None:
    for photo_id in ("a1", "a/b", ".x"):
        write_masks(tmp_path, photo_id, _masks(bits))
        found = MaskFolder(str(tmp_path)).get(photo_id)
        assert found is not None
        assert found.valid == [True, True, False, True, True, True] and found.confidence[0] == 0.9
        assert found.origin == "hand" and not found.real


def test_noise_fits_into_the_limit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 64, (1008, 1344), dtype=np.uint8)
    assert write_masks(tmp_path, "a", PhotoMasks(noise, (True,) * 6, (0.0,) * 6, "noise", 4032, 3024)) <= MAX_MASK_BYTES
    assert mask_paths(tmp_path, "a")[0].stat().st_size <= MAX_MASK_BYTES
    found = read_masks(tmp_path, "a")
    assert found is not None and (found.width, found.height) == (4032, 3024)


def test_noise_in_the_views_of_a_shard_fits_as_well() -> None:
    noise = np.random.default_rng(0).integers(0, 64, (12, 129, 129), dtype=np.uint8)
    png = encode_masks(noise.reshape(-1, 129))
    assert len(png) <= MAX_MASK_BYTES
    found = decode_masks(png, 12, 129)
    assert found.any() and (found[:, 0, 0] == noise[:, 0, 0]).all()
    objects = np.zeros((12, 129, 129), np.uint8)
    for k in range(12):
        objects[k, 3 * k : 3 * k + 40, 7:90] = 1 << k % 6
    assert (decode_masks(encode_masks(objects.reshape(-1, 129)), 12, 129) == objects).all(), "objects are kept exactly"


def test_torn_pairs_are_not_there(tmp_path: Path, bits: np.ndarray) -> None:
    write_masks(tmp_path, "a", _masks(bits))
    png, facts = mask_paths(tmp_path, "a")
    whole = png.read_bytes()
    png.write_bytes(whole[:-20])
    assert not has_masks(tmp_path, "a")
    with pytest.raises(ValueError, match="checksum"):
        read_masks(tmp_path, "a")
    png.unlink()
    assert not has_masks(tmp_path, "a")
    png.write_bytes(whole)
    facts.write_text(json.dumps({"masks_valid": []}))
    with pytest.raises(ValueError, match="lacks"):
        read_masks(tmp_path, "a")
    facts.unlink()
    assert read_masks(tmp_path, "a") is None, "a PNG whose json was never written is not there"


def test_same_masks_same_bytes(tmp_path: Path, bits: np.ndarray) -> None:
    write_masks(tmp_path, "a", _masks(bits))
    before = [path.read_bytes() for path in mask_paths(tmp_path, "a")]
    write_masks(tmp_path, "a", _masks(bits))
    assert [path.read_bytes() for path in mask_paths(tmp_path, "a")] == before


def test_shrinking_keeps_what_covers_half() -> None:
    bits = np.zeros((4, 4), np.uint8)
    bits[:2, :2] = 3
    bits[2, 2:] = 4
    assert shrink_bits(bits, 2, 2).tolist() == [[3, 0], [0, 4]]


@pytest.mark.parametrize("size", [(9, 13), (61, 80), (9, 80)])
def test_resizing_keeps_areas(size: tuple[int, int]) -> None:
    bits = np.zeros((30, 40), np.uint8)
    bits[:15] |= 1
    bits[:, 20:] |= 32
    made = shrink_bits(bits, *size)
    assert made.shape == size
    assert (made & 1).astype(bool).mean() == pytest.approx(0.5, abs=0.08)
    assert (made & 32).astype(bool).mean() == pytest.approx(0.5, abs=0.08)
