"""Sheets and masks as bytes: what survives encoding, and that altered or foreign bytes are named, never decoded as right."""

from __future__ import annotations

import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st

from roadwork.data.decode import (
    MAX_MASK_BYTES,
    NUM_CLASSES,
    Unreadable,
    decode_masks,
    decode_views,
    encode_masks,
    encode_views,
    unpack_masks,
)
from roadwork.data.views import compose_sheet, split_sheet


def views(number: int, size: int, seed: int = 0) -> np.ndarray:
    """uint8 [V, S, S, 3], smooth enough for a JPEG to keep."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (number, 4, 4, 3), dtype=np.uint8)
    return np.stack([cv2.resize(view, (size, size), interpolation=cv2.INTER_CUBIC) for view in coarse])


@settings(max_examples=25)
@given(st.integers(1, 12), st.sampled_from([16, 32, 64]), st.integers(0, 99))
def test_views_come_back_nearly_as_they_were(number: int, size: int, seed: int) -> None:
    given_views = views(number, size, seed)
    decoded = decode_views(encode_views(compose_sheet(given_views)), number, size)
    assert decoded.shape == given_views.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - given_views).mean() < 4


def test_the_same_views_give_the_same_bytes_in_any_memory_layout() -> None:
    sheet = compose_sheet(views(3, 32))
    data = encode_views(sheet)
    assert encode_views(sheet.copy()) == data
    assert encode_views(np.asfortranarray(sheet)) == data


@pytest.mark.parametrize(("size", "chroma"), [(64, "444"), (240, "444"), (256, "420"), (512, "420")])
def test_small_views_keep_their_full_colour(size: int, chroma: str) -> None:
    _, _, _, subsampling = simplejpeg.decode_jpeg_header(encode_views(compose_sheet(views(1, size))))
    assert subsampling == chroma


def test_decoding_into_given_memory_copies_nothing() -> None:
    data = encode_views(compose_sheet(views(2, 32)))
    place = np.full((2, 32, 32, 3), 9, np.uint8)
    assert decode_views(data, 2, 32, out=place) is place
    assert np.array_equal(place, decode_views(data, 2, 32))


def test_a_checksum_catches_what_a_decoder_would_not() -> None:
    """One changed byte in the middle of a JPEG mostly decodes without complaint, to other pixels."""
    data = bytearray(encode_views(compose_sheet(views(2, 64))))
    crc = zlib.crc32(bytes(data))
    assert decode_views(bytes(data), 2, 64, crc=crc).shape == (2, 64, 64, 3)
    data[-40] ^= 0x10
    with pytest.raises(Unreadable, match=r"differ from those that were indexed \(CRC-32\)"):
        decode_views(bytes(data), 2, 64, crc=crc)


@pytest.mark.parametrize(("number", "size"), [(1, 32), (3, 32), (2, 16), (4, 16)])
def test_a_sheet_of_another_shape_is_named(number: int, size: int) -> None:
    data = encode_views(compose_sheet(views(2, 32)))
    with pytest.raises(Unreadable, match=f"a sheet of {number} views of {size} px has 32x64 pixels"):
        decode_views(data, number, size)


@pytest.mark.parametrize("keep", [0, 2, 60, 300])
def test_a_cut_sheet_does_not_decode(keep: int) -> None:
    with pytest.raises(Unreadable, match="does not decode"):
        decode_views(encode_views(compose_sheet(views(2, 64)))[:keep], 2, 64)


@settings(max_examples=40)
@given(st.integers(1, 12), st.sampled_from([4, 8, 16]), st.integers(0, 99))
def test_masks_come_back_exactly(number: int, size: int, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 64, (number, size, size), dtype=np.uint8)
    assert np.array_equal(decode_masks(encode_masks(compose_sheet(bits)), number, size), bits)


def test_masks_of_noise_are_coarser_and_fit() -> None:
    """Twelve views of pure noise: no object needs that, and a shard must not grow for it."""
    bits = np.random.default_rng(0).integers(0, 64, (12, 128, 128), dtype=np.uint8)
    data = encode_masks(compose_sheet(bits))
    assert len(data) <= MAX_MASK_BYTES
    read = decode_masks(data, 12, 128)
    assert read.shape == bits.shape and len(np.unique(read)) > 10
    blocks = read.reshape(12, 32, 4, 32, 4)
    assert (blocks == blocks[:, :, :1, :, :1]).all(), "what is dropped is detail, in blocks, within each view"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "does not decode"),
        (b"no png", "does not decode"),
        (cv2.imencode(".png", np.zeros((16, 8), np.uint8))[1].tobytes(), r"a mask sheet of 3 views of 8 px is uint8"),
        (cv2.imencode(".png", np.zeros((24, 8, 3), np.uint8))[1].tobytes(), "a mask sheet of 3 views"),
        (cv2.imencode(".png", np.zeros((24, 8), np.uint16))[1].tobytes(), "uint16"),
    ],
)
def test_bytes_that_are_no_masks_of_these_views_are_named(data: bytes, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        decode_masks(data, 3, 8)


def test_bits_are_unpacked_class_by_class() -> None:
    bits = np.array([[[0, 1], [32, 63]]], np.uint8)
    planes = unpack_masks(bits)
    assert planes.shape == (1, NUM_CLASSES, 2, 2) and planes.dtype == np.uint8
    assert planes[0, :, 0, 1].tolist() == [1, 0, 0, 0, 0, 0]
    assert planes[0, :, 1, 0].tolist() == [0, 0, 0, 0, 0, 1]
    assert planes[0, :, 1, 1].tolist() == [1] * 6 and not planes[0, :, 0, 0].any()
    place = np.full((1, 6, 2, 2), 7, np.uint8)
    assert unpack_masks(bits, out=place) is place and np.array_equal(place, planes)


def test_views_do_not_change_when_their_neighbours_do() -> None:
    """A black and a white view on one sheet: no pixel of one may know of the other."""
    first = views(1, 256)
    for other in (0, 255):
        sheet = compose_sheet(np.concatenate([first, np.full_like(first, other)]))
        decoded = decode_views(encode_views(sheet), 2, 256)[0]
        alone = decode_views(encode_views(compose_sheet(first)), 1, 256)[0]
        assert np.array_equal(decoded, alone)


def test_a_sheet_shares_memory_with_its_views() -> None:
    given_views = views(3, 16)
    sheet = compose_sheet(given_views)
    assert np.shares_memory(sheet, given_views) and np.shares_memory(split_sheet(sheet, 3, 16), sheet)
    with pytest.raises(ValueError, match="views are"):
        compose_sheet(np.zeros((3, 16, 8, 3), np.uint8))
