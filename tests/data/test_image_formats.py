"""Formats and sizes at their edges: what each becomes, which repair is named, and what is refused before decoding."""

from __future__ import annotations

import io
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from roadwork.data import images
from roadwork.data.images import MAX_PIXELS, MIN_SIDE, Photo, convert_image, decode_masks, decode_photo, upright
from roadwork.data.record import Rejected
from tests.data.photos import encode, scene


def flat(mode: str, colour: object, size: tuple[int, int] = (40, 24)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("picture", "kind", "colour", "notes"),
    [
        (flat("1", 1), "PNG", (255, 255, 255), ("image_greyscale",)),
        (flat("L", 77), "PNG", (77, 77, 77), ("image_greyscale",)),
        (flat("L", 77), "TIFF", (77, 77, 77), ("image_greyscale",)),
        (flat("LA", (77, 255)), "PNG", (77, 77, 77), ("image_transparency",)),
        (flat("LA", (77, 0)), "PNG", (255, 255, 255), ("image_transparency",)),
        (flat("RGBA", (200, 40, 10, 255)), "PNG", (200, 40, 10), ("image_transparency",)),
        (flat("RGBA", (0, 0, 0, 51)), "PNG", (204, 204, 204), ("image_transparency",)),
        (flat("RGB", (1, 2, 3)), "PNG", (1, 2, 3), ()),
        (flat("RGB", (1, 2, 3)), "BMP", (1, 2, 3), ()),
        (flat("RGB", (1, 2, 3)), "TIFF", (1, 2, 3), ()),
        (flat("CMYK", (0, 0, 0, 0)), "TIFF", (255, 255, 255), ("image_cmyk",)),
        (flat("RGB", (9, 9, 9)).quantize(4), "GIF", (9, 9, 9), ("image_palette",)),
        (flat("RGB", (240, 16, 8)).quantize(4), "PNG", (240, 16, 8), ("image_palette",)),
        (flat("I;16", 0x1234), "TIFF", (0x12, 0x12, 0x12), ("image_16_bit",)),
        (flat("I", 65535), "TIFF", (255, 255, 255), ("image_16_bit",)),
        (flat("I", -5), "TIFF", (0, 0, 0), ("image_16_bit",)),
    ],
)
def test_each_form_of_pixels_becomes_rgb(
    picture: Image.Image, kind: str, colour: tuple[int, int, int], notes: tuple[str, ...]
) -> None:
    decoded, found = decode_photo(encode(picture, kind))
    assert decoded.dtype == np.uint8 and decoded.shape == (24, 40, 3)
    assert decoded.reshape(-1, 3).tolist() == [list(colour)] * (24 * 40)
    assert found == notes


def test_a_palette_with_a_transparent_colour_is_shown_on_white() -> None:
    picture = Image.fromarray(np.zeros((20, 20), np.uint8), "P")
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.paste(1, (0, 0, 20, 10))
    decoded, notes = decode_photo(encode(picture, "PNG", transparency=0))
    assert notes == ("image_transparency",)
    assert (decoded[:10] == (200, 100, 50)).all() and (decoded[10:] == 255).all()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]
)
def test_each_mode_of_pillow_becomes_rgb(mode: str) -> None:
    rgb = convert_image(Image.new(mode, (40, 24)))
    assert rgb.dtype == np.uint8 and rgb.shape == (24, 40, 3)


def test_a_picture_of_real_numbers_is_refused_by_its_mode() -> None:
    with pytest.raises(Rejected, match="unsupported_mode: F"):
        decode_photo(encode(flat("F", 0.5), "TIFF"))


def test_the_first_picture_of_an_animation_counts() -> None:
    first, second = flat("RGB", (250, 0, 0)), flat("RGB", (0, 0, 250))
    stream = io.BytesIO()
    first.save(stream, "GIF", save_all=True, append_images=[second])
    decoded, _ = decode_photo(stream.getvalue())
    assert decoded[0, 0, 0] > 200 and decoded[0, 0, 2] < 50


def test_a_pair_of_pictures_from_a_camera_is_its_first() -> None:
    """MPO: two JPEGs in one file, as telephones write depth and panoramas."""
    stream = io.BytesIO()
    flat("RGB", (200, 30, 30)).save(stream, "MPO", save_all=True, append_images=[flat("RGB", (30, 30, 200))])
    decoded, notes = decode_photo(stream.getvalue())
    assert notes == () and abs(int(decoded[5, 5, 0]) - 200) < 5


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"subsampling": 2}, {"quality": 5}])
def test_every_way_to_write_a_jpeg_is_read(options: dict[str, object]) -> None:
    rgb = scene(3, 160, 96)
    decoded, notes = decode_photo(encode(rgb, **options))
    assert notes == () and decoded.shape == rgb.shape
    assert np.abs(decoded.astype(int) - rgb).mean() < 25


@pytest.mark.parametrize("kind", ["ICO", "PPM", "TGA", "PCX"])
def test_formats_that_no_camera_writes_are_not_opened(kind: str) -> None:
    """Pillow opens dozens of formats, some through external programs; every one is a door."""
    with pytest.raises(Rejected, match="not_an_image"):
        decode_photo(encode(flat("RGB", (1, 2, 3)), kind))


@pytest.mark.parametrize("data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n", b"<svg/>", b"\0" * 400])
def test_programs_and_text_are_no_photos(data: bytes) -> None:
    with pytest.raises(Rejected, match="not_an_image"):
        decode_photo(data)


@pytest.mark.parametrize(("width", "height"), [(MIN_SIDE - 1, 400), (400, MIN_SIDE - 1), (1, 1)])
def test_sides_below_sixteen_are_refused_with_the_size(width: int, height: int) -> None:
    with pytest.raises(Rejected, match=rf"too_small: {width}x{height}, sides of at least 16"):
        Photo(encode(flat("RGB", 0, (width, height)), "PNG"))


def test_the_smallest_photo_is_read() -> None:
    assert decode_photo(encode(flat("RGB", 0, (MIN_SIDE, MIN_SIDE)), "PNG"))[0].shape == (16, 16, 3)


def test_the_limit_of_pixels_is_inclusive_and_may_be_lowered() -> None:
    data = encode(flat("RGB", 0, (40, 25)), "PNG")
    assert Photo(data, max_pixels=1000).width == 40
    with pytest.raises(Rejected, match="too_many_pixels: 40x25, 999 are allowed"):
        Photo(data, max_pixels=999)


def test_a_bomb_costs_its_header_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither decoder is entered for a photo whose header promises too much, and no warning reaches the user."""

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("a bomb was decoded")

    data = bytearray(encode(scene(1, 64, 64)))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 12_500, 12_500)
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", decoded)
    monkeypatch.setattr(Image.Image, "load", decoded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Rejected, match="too_many_pixels: 12500x12500"):
            decode_photo(bytes(data))
    assert MAX_PIXELS < 12_500**2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extra", [(), (3,)])
def test_turning_upright_is_pillows(orientation: int, extra: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (5, 8, *extra), dtype=np.uint8)
    stored = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    stored.save(stream, "PNG", exif=exif.tobytes())
    from PIL import ImageOps

    theirs = np.asarray(ImageOps.exif_transpose(Image.open(stream)))
    assert np.array_equal(upright(values, orientation), theirs)


@pytest.mark.parametrize("value", [0, 9, 255])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    decoded, notes = decode_photo(encode(scene(5), exif=exif.tobytes()))
    assert decoded.shape == (64, 96, 3) and notes == ()


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_turned_photo_tells_its_upright_size_before_it_is_decoded(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo = Photo(encode(scene(5, 96, 64), exif=exif.tobytes()))
    assert (photo.width, photo.height) == (64, 96)
    assert photo.decode()[0].shape == (96, 64, 3)


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_only_a_jpeg_comes_smaller(kind: str, factor: int) -> None:
    photo = Photo(encode(scene(2, 129, 65), kind))
    rgb, _ = photo.decode(factor)
    wanted = (-(-65 // factor), -(-129 // factor)) if kind == "JPEG" else (65, 129)
    assert rgb.shape[:2] == wanted


@settings(max_examples=40)
@given(st.data())
def test_whatever_happens_to_the_bytes_the_photo_is_read_or_rejected(data: st.DataObject) -> None:
    """Flipped, cut and repeated bytes: an array of the stated size, or a named reason; never another exception."""
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]))
    raw = bytearray(ENCODED[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(raw)))
    try:
        photo = Photo(bytes(raw[:cut]), max_pixels=1_000_000)
        rgb, notes = photo.decode()
    except Rejected as error:
        assert error.reason.partition(":")[0] in REASONS, error.reason
        return
    assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
    assert all(note.startswith("image_") for note in notes)


ENCODED = {
    "JPEG": encode(scene(1)),
    "PNG": encode(scene(1), "PNG"),
    "WEBP": encode(scene(1), "WEBP"),
    "GIF": encode(Image.fromarray(scene(1)).quantize(32), "GIF"),
    "BMP": encode(scene(1), "BMP"),
    "TIFF": encode(scene(1), "TIFF"),
}
REASONS = {
    "no_image", "not_an_image", "too_many_pixels", "too_small", "truncated_image", "damaged_image", "unsupported_mode",
    "too_many_scans", "too_many_segments",
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "photo", "good"),
    [
        ((720, 1280), (1280, 720), True),
        ((180, 320), (1280, 720), True),
        ((181, 321), (1281, 721), True),
        ((90, 160), (1279, 720), True),
        ((720, 1281), (1280, 720), True),
        ((200, 320), (1280, 720), False),
        ((1280, 720), (1280, 720), False),
    ],
)
def test_a_mask_may_be_smaller_but_shows_the_same_picture(
    shape: tuple[int, int], photo: tuple[int, int], good: bool
) -> None:
    data = encode(np.zeros(shape, np.uint8), "PNG")
    if good:
        assert decode_masks(data, *photo).shape == shape
    else:
        with pytest.raises(Rejected, match=f"masks_wrong_shape: {shape[1]}x{shape[0]}"):
            decode_masks(data, *photo)


def test_a_palette_of_masks_keeps_its_numbers_not_its_colours() -> None:
    bits = np.zeros((40, 40), np.uint8)
    bits[10:20] = 33
    picture = Image.fromarray(bits, "P")
    picture.putpalette([255, 0, 0] * 256)
    assert np.array_equal(decode_masks(encode(picture, "PNG"), 40, 40), bits)
