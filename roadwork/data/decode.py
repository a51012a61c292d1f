"""Bytes of a sheet -> pixels. Without torch, so that loader processes stay small."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
from isal import isal_zlib

Array = npt.NDArray[np.uint8]

JPEG_QUALITY = 90
FULL_CHROMA_BELOW = 256
NUM_CLASSES = 6
MAX_MASK_BYTES = 30_000
"""Largest PNG of a photo's masks."""


class Unreadable(ValueError):
    """The bytes of one sample are not what the index promises; the message says how."""


def encode_views(sheet: Array, quality: int = JPEG_QUALITY) -> bytes:
    """uint8 [V * S, S, 3] -> JPEG. The same input gives the same bytes.

    Small views keep their full chroma (4:4:4): at 64 px a cone is a few pixels wide, and colour is what tells it.
    """
    chroma = "420" if sheet.shape[1] >= FULL_CHROMA_BELOW else "444"
    jpeg: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(sheet), quality, "RGB", chroma, fastdct=False)
    return jpeg


def encode_view_planes(y: Array, cb: Array, cr: Array, quality: int = JPEG_QUALITY) -> bytes:
    """Sheets of planes, uint8 [V * S, S] and twice [V * S / 2, S / 2] -> JPEG at 4:2:0, as `encode_views` writes it."""
    jpeg: bytes = simplejpeg.encode_jpeg_yuv_planes(y, cb, cr, quality, fastdct=False)
    return jpeg


def decode_views(data: bytes, num_views: int, size: int, out: Array | None = None, crc: int | None = None) -> Array:
    """JPEG sheet -> uint8 [V, S, S, 3].

    Args:
        out: C-contiguous uint8 [V, S, S, 3] to decode into without a copy.
        crc: CRC-32 that the bytes must have; altered bytes often decode without complaint.

    Raises:
        Unreadable: altered or truncated bytes, or a sheet of another size.

    Upsampling of chroma does not look across blocks (`fastupsample`), so views cannot bleed into each other.
    """
    if crc is not None and isal_zlib.crc32(data) != crc:
        raise Unreadable("the JPEG's bytes differ from those that were indexed (CRC-32)")
    if out is None:
        out = np.empty((num_views, size, size, 3), dtype=np.uint8)
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        if (height, width) != (num_views * size, size):
            raise Unreadable(f"a sheet of {num_views} views of {size} px has {width}x{height} pixels")
        simplejpeg.decode_jpeg(data, "RGB", fastdct=True, fastupsample=True, buffer=out)
    except Unreadable:
        raise
    except ValueError as error:
        raise Unreadable(f"the JPEG does not decode ({error})") from error
    return out


def encode_masks(sheet: Array) -> bytes:
    """uint8 [V * s, s] of class bits -> PNG of at most MAX_MASK_BYTES.

    Objects never need that much. What looks like noise is stored in blocks of 2, 4, ... pixels until it fits.
    ValueError where OpenCV does not encode it.
    """
    side = sheet.shape[1]
    views, block = sheet.reshape(-1, side, side), 1
    while True:
        done, data = cv2.imencode(".png", sheet, [cv2.IMWRITE_PNG_COMPRESSION, 6])
        if not done:
            raise ValueError(f"OpenCV could not encode masks of shape {sheet.shape}")
        if len(data) <= MAX_MASK_BYTES or block >= side:
            return data.tobytes()
        block *= 2
        first = np.arange(side) // block * block
        sheet = views[:, first][:, :, first].reshape(sheet.shape)


def decode_masks(data: bytes, num_views: int, size: int) -> Array:
    """PNG sheet -> uint8 [V, s, s] of class bits (bit k = class k); size: s, pixels. Unreadable for anything else."""
    sheet = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if sheet is None:
        raise Unreadable("the mask PNG does not decode")
    if sheet.shape != (num_views * size, size) or sheet.dtype != np.uint8:
        raise Unreadable(f"a mask sheet of {num_views} views of {size} px is {sheet.dtype} {sheet.shape}")
    return np.asarray(sheet, dtype=np.uint8).reshape(num_views, size, size)


def unpack_masks(bits: Array, out: Array | None = None) -> Array:
    """Class bits uint8 [V, s, s] -> {0, 1} uint8 [V, 6, s, s]."""
    if out is None:
        out = np.empty((len(bits), NUM_CLASSES, *bits.shape[1:]), dtype=np.uint8)
    for k in range(NUM_CLASSES):
        np.bitwise_and(bits >> k, 1, out=out[:, k])
    return out
