"""Photos that strangers made: every colour space, EXIF, damaged files, bombs."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from roadwork.data.images import Photo, decode_masks, decode_photo
from roadwork.data.record import Rejected
from roadwork.data.views import view_boxes
from tests.data.photos import encode, scene


def _close(a: np.ndarray, b: np.ndarray, mean: float = 4.0) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).mean()) < mean


def test_a_plain_jpeg_needs_no_repair() -> None:
    rgb = scene(1)
    decoded, notes = decode_photo(encode(rgb))
    assert _close(decoded, rgb) and notes == () and decoded.dtype == np.uint8


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_greyscale(kind: str) -> None:
    grey = np.asarray(Image.fromarray(scene(2)).convert("L"))
    decoded, notes = decode_photo(encode(grey, kind))
    assert _close(decoded, np.repeat(grey[..., None], 3, axis=2))
    assert notes == (("image_greyscale",) if kind != "WEBP" else ())


def test_cmyk_jpeg_has_its_colours() -> None:
    rgb = np.zeros((32, 48, 3), np.uint8)
    rgb[:, :24] = (200, 30, 30)
    rgb[:, 24:] = (20, 60, 220)
    decoded, notes = decode_photo(encode(Image.fromarray(rgb).convert("CMYK")))
    assert notes == ("image_cmyk",) and _close(decoded, rgb, 12)


def test_palette() -> None:
    image = Image.fromarray(scene(3)).quantize(64)
    decoded, notes = decode_photo(encode(image, "PNG"))
    assert notes == ("image_palette",) and np.array_equal(decoded, np.asarray(image.convert("RGB")))


def test_transparent_pixels_are_white() -> None:
    rgba = np.dstack([scene(4), np.full((64, 96), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    decoded, notes = decode_photo(encode(Image.fromarray(rgba), "PNG"))
    assert notes == ("image_transparency",)
    assert (decoded[:10] == 255).all() and np.array_equal(decoded[10:], rgba[10:, :, :3])


def test_16_bit_png_is_scaled_not_clipped() -> None:
    values = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    decoded, notes = decode_photo(encode(Image.fromarray(values), "PNG"))
    assert notes == ("image_16_bit",)
    assert np.array_equal(decoded[..., 0], (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    rgb = scene(5)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    stored = Image.fromarray(rgb)
    if back is not None:
        stored = stored.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded, notes = decode_photo(encode(stored, exif=exif.tobytes()))
    assert _close(decoded, rgb, 6)
    assert notes == (() if orientation == 1 else ("image_exif_rotated",))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_rejected(kind: str, share: float) -> None:
    data = encode(scene(6, 320, 240), kind)
    with pytest.raises(Rejected, match="truncated_image|damaged_image"):
        decode_photo(data[: int(len(data) * share)])


def test_a_truncated_jpeg_with_a_new_end_is_rejected() -> None:
    data = encode(scene(6, 320, 240))
    with pytest.raises(Rejected, match="truncated_image|damaged_image"):
        decode_photo(data[: len(data) // 2] + b"\xff\xd9")


def test_a_greyscale_truncated_jpeg_is_rejected() -> None:
    data = encode(np.asarray(Image.fromarray(scene(6, 320, 240)).convert("L")))
    with pytest.raises(Rejected, match="truncated_image|damaged_image"):
        decode_photo(data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"not a photo at all", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_what_is_no_photo_is_rejected(data: bytes) -> None:
    with pytest.raises(Rejected, match="not_an_image"):
        decode_photo(data)


def test_no_bytes() -> None:
    with pytest.raises(Rejected, match="no_image"):
        decode_photo(b"")


def _png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [13_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    with pytest.raises(Rejected, match="too_many_pixels"):
        decode_photo(_png_header(side, side))


def test_a_bomb_of_jpeg_is_refused() -> None:
    data = bytearray(encode(scene(1, 64, 64)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 50_000, 50_000)
    with pytest.raises(Rejected, match="too_many_pixels"):
        decode_photo(bytes(data))


def test_tiny_photos_are_refused() -> None:
    with pytest.raises(Rejected, match="too_small"):
        decode_photo(encode(np.zeros((8, 300, 3), np.uint8)))


@pytest.mark.parametrize(
    ("width", "height", "views"), [(224, 224, 1), (480, 854, None), (4032, 3024, 12), (3024, 4032, 12)]
)
def test_sizes_from_the_service_to_a_telephone(width: int, height: int, views: int | None) -> None:
    decoded, notes = decode_photo(encode(np.full((height, width, 3), 90, np.uint8)))
    assert decoded.shape == (height, width, 3) and notes == ()
    found = len(view_boxes(width, height, 512))
    assert found == views if views else 1 <= found <= 12


def test_broken_exif_does_not_cost_the_photo() -> None:
    decoded, _ = decode_photo(encode(scene(7), exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\xff"))
    assert decoded.shape == (64, 96, 3)


def test_masks_of_another_picture_are_refused() -> None:
    def png(bits: np.ndarray) -> bytes:
        stream = io.BytesIO()
        Image.fromarray(bits).save(stream, "PNG")
        return stream.getvalue()

    bits = np.zeros((180, 320), np.uint8)
    bits[10:20, 30:60] = 0b100001
    assert np.array_equal(decode_masks(png(bits), 1280, 720), bits)
    with pytest.raises(Rejected, match="masks_wrong_shape"):
        decode_masks(png(bits), 720, 1280)
    with pytest.raises(Rejected, match="masks_wrong_mode"):
        decode_masks(png(np.zeros((180, 320, 3), np.uint8)), 1280, 720)
    with pytest.raises(Rejected, match="masks_unknown_class"):
        decode_masks(png(bits | 64), 1280, 720)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("kind", ["RGB", "L"])
def test_a_jpeg_may_come_smaller_and_shows_the_same(orientation: int, kind: str) -> None:
    stored = Image.fromarray(scene(8, 643, 481)).convert(kind)
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Photo(encode(stored, exif=exif.tobytes()))
    whole, notes = photo.decode()
    assert whole.shape[:2] == (photo.height, photo.width)
    for factor in (2, 4):
        small, same = photo.decode(factor)
        assert small.shape[:2] == (-(-photo.height // factor), -(-photo.width // factor)) and same == notes
        reference = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert _close(small, reference, 3)
    with pytest.raises(Rejected, match="truncated_image|damaged_image"):
        Photo(encode(stored)[:9000]).decode(4)


def test_damaged_masks_are_named_as_masks() -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 63, (180, 320), dtype=np.uint8)).save(stream, "PNG")
    for data in (stream.getvalue()[:4000], b"no png"):
        with pytest.raises(Rejected, match="masks_damaged"):
            decode_masks(data, 1280, 720)
