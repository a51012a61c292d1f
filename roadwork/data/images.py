"""Decoding of photos that strangers made: header first, then pixels, every repair named."""

from __future__ import annotations

import io
import threading
import warnings

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from roadwork.data.jpeg_markers import check_markers
from roadwork.data.record import Rejected

MAX_PIXELS = 150_000_000
"""Photos with more pixels in their header are refused before any of them is decoded."""
MIN_SIDE = 16
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
"""What Pillow may open: some of its other formats start external programs."""
_ORIENTATION = 0x0112
_FILTERS = threading.Lock()
"""Silencing warnings changes the process's filters, which threads must do one after the other."""
_DAMAGE = ("premature", "corrupt", "huffman", "truncated", "invalid", "bad ")


class Photo:
    """An encoded photo whose header has been judged; `width` and `height` are those of the upright photo.

    Raises Rejected: `no_image`, `not_an_image`, `too_many_pixels`, `too_small`, `too_many_scans`, `too_many_segments`.
    """

    def __init__(self, data: bytes, max_pixels: int = MAX_PIXELS) -> None:
        if not data:
            raise Rejected("no_image")
        self._data, self._image = data, _open(data, max_pixels)
        self._orientation = _orientation(self._image)
        size = self._image.size
        self.width, self.height = size if self._orientation < 5 else size[::-1]

    def decode(self, shrink: int = 1) -> tuple[np.ndarray, tuple[str, ...]]:
        """uint8 RGB [h, w, 3], upright, and the names of what was repaired.

        shrink 1, 2, 4 or 8: a JPEG may come smaller by this factor (h = ceil(height / shrink)): its own transform
        then averages, in a fraction of the time. Other formats always come whole.
        Raises Rejected: `truncated_image`, `damaged_image`, `unsupported_mode`.
        """
        image = self._image
        notes: list[str] = []
        rgb = None
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            rgb = _decode_jpeg(self._data, (-(-image.height // shrink), -(-image.width // shrink)), notes)
        if rgb is None:
            rgb = _decode_pillow(image, notes)
        elif image.mode == "L":
            notes.append("image_greyscale")
        if self._orientation != 1:
            rgb = upright(rgb, self._orientation)
            notes.append("image_exif_rotated")
        return np.ascontiguousarray(rgb), tuple(notes)


def decode_photo(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, tuple[str, ...]]:
    """Encoded photo to uint8 RGB [H, W, 3], upright, and the names of what was repaired. Raises Rejected as Photo."""
    return Photo(data, max_pixels).decode()


def convert_image(image: Image.Image) -> np.ndarray:
    """A Pillow picture to uint8 RGB [H, W, 3], upright, as `Photo.decode` makes it of a file. Raises Rejected."""
    return upright(_decode_pillow(image, []), _orientation(image))


def decode_masks(data: bytes, width: int, height: int) -> np.ndarray:
    """PNG of class bits to uint8 [h, w] for a photo of `width` x `height`.

    Raises Rejected where it is not 8-bit greyscale or palette, or of another shape of picture.
    """
    try:
        image = _open(data, MAX_PIXELS)
    except Rejected as error:
        raise Rejected(f"masks_damaged: {error.reason}") from None
    if image.mode not in ("L", "P"):
        raise Rejected(f"masks_wrong_mode: {image.mode}")
    try:
        bits = np.asarray(image, dtype=np.uint8)
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise Rejected(f"masks_damaged: {str(error)[:80]}") from None
    # A mask may be smaller than its photo, never of another aspect (one pixel of rounding is allowed).
    if abs(bits.shape[1] * height - bits.shape[0] * width) > max(width, height):
        raise Rejected(f"masks_wrong_shape: {bits.shape[1]}x{bits.shape[0]} for a photo of {width}x{height}")
    if bits.max(initial=0) > 63:
        raise Rejected("masks_unknown_class: bits above 5 are set")
    return bits


def upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1..8 to an array [H, W, ...]."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return rgb


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header only and refuse what should not be decoded."""
    if data.startswith(b"\xff\xd8"):
        check_markers(data)
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs (judged below) and of broken EXIF
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise Rejected(f"too_many_pixels: the header says more than the {max_pixels} that are allowed") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, TypeError, EOFError):
        raise Rejected("not_an_image") from None
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected(f"too_many_pixels: {width}x{height}, {max_pixels} are allowed")
    if min(width, height) < MIN_SIDE:
        raise Rejected(f"too_small: {width}x{height}, sides of at least {MIN_SIDE} are needed")
    return image


def _orientation(image: Image.Image) -> int:
    try:
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block must not cost the photo: Pillow raises many kinds here
        return 1
    return value if value in range(1, 9) else 1


def _decode_jpeg(data: bytes, least: tuple[int, int], notes: list[str]) -> np.ndarray | None:
    """Quick strict decode; None where only Pillow can read the file. Raises Rejected for missing data."""
    try:
        rgb: np.ndarray = simplejpeg.decode_jpeg(data, colorspace="RGB", min_height=least[0], min_width=least[1])
        return rgb
    except ValueError as error:
        message = str(error).lower()
    if any(word in message for word in _DAMAGE):
        if "premature end of jpeg file" in message:
            raise Rejected("truncated_image")
        raise Rejected(f"damaged_image: {message[:80]}")
    notes.append("image_jpeg_warning")
    return None


def _decode_pillow(image: Image.Image, notes: list[str]) -> np.ndarray:
    mode = image.mode
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, MemoryError) as error:
        kind = "truncated_image" if "truncated" in str(error).lower() else "damaged_image"
        raise Rejected(kind if kind == "truncated_image" else f"{kind}: {str(error)[:80]}") from None
    if mode == "RGB":
        return np.asarray(image)
    if mode.startswith("I"):
        notes.append("image_16_bit")
        values = np.asarray(image).astype(np.int64)
        grey = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or (mode == "P" and "transparency" in image.info):
        notes.append("image_transparency")
        rgba = (image.convert("LA") if mode == "La" else image).convert("RGBA")  # Pillow knows no direct way from La
        # Transparent pixels hold arbitrary colours: show what a viewer shows on white paper.
        paper = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.asarray(Image.alpha_composite(paper, rgba).convert("RGB"))
    names = {"L": "image_greyscale", "1": "image_greyscale", "P": "image_palette", "CMYK": "image_cmyk"}
    if mode not in names and mode not in ("YCbCr", "LAB", "HSV", "RGBX"):
        raise Rejected(f"unsupported_mode: {mode}")
    notes.append(names.get(mode, "image_colour_space"))
    return np.asarray(image.convert("RGB"))
