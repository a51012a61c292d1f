"""Views of one photo: where they are cut, how they are resized, how they lie in one sheet."""

from __future__ import annotations

import math

import cv2
import numpy as np
import numpy.typing as npt

from roadwork.errors import UserError

MAX_VIEWS = 12
VIEW_MULTIPLE = 16
"""A view's side is a multiple of this: the patch of the backbones and the largest JPEG block (4:2:0)."""
MASK_STRIDE = 4
"""Masks are kept at this fraction of the view's side."""
THUMBNAIL = 256
"""A photo whose longer side is at most this many pixels is one view whatever the view size."""

Array = npt.NDArray[np.uint8]


def check_view_size(view_size: int) -> int:
    """The view size itself, or a UserError that names the nearest sizes that work."""
    size = int(view_size)
    if size < VIEW_MULTIPLE or size % VIEW_MULTIPLE:
        below = max(size // VIEW_MULTIPLE, 1) * VIEW_MULTIPLE
        raise UserError(
            f"view size {size} is not a multiple of {VIEW_MULTIPLE} (the patch of the backbones and the JPEG block, "
            f"so that views neither lose a rim nor bleed into each other); use {below} or {below + VIEW_MULTIPLE}"
        )
    return size


def mask_size(view_size: int) -> int:
    """Side of one view's mask in pixels."""
    return check_view_size(view_size) // MASK_STRIDE


def view_boxes(width: int, height: int, view_size: int, max_views: int = MAX_VIEWS) -> npt.NDArray[np.float32]:
    """Cut 1 to `max_views` views: the whole photo, squares of its short side along the long side, a grid of tiles.

    The tiles are squares of the smallest side (at least half the view size: more enlargement shows nothing new) with
    which a grid within the budget still covers the photo. A photo that fits into one view gives one.

    Args:
        width, height: the photo's size in pixels.
        view_size: side of a view in pixels, a multiple of 16.

    Returns:
        float32 [V, 4]: (x0, y0, x1, y1) in whole pixels, inside the photo; the union covers every pixel.

    Raises:
        ValueError: a side or `max_views` below 1.
        UserError: a view size that is no such multiple.
    """
    size = check_view_size(view_size)
    if min(width, height) < 1 or max_views < 1:
        raise ValueError(f"a photo of {width}x{height} pixels in {max_views} views: all must be at least 1")
    boxes: list[tuple[int, int, int, int]] = [(0, 0, width, height)]
    if max(width, height) <= max(size, THUMBNAIL):
        return np.asarray(boxes, dtype=np.float32)
    short, long = min(width, height), max(width, height)
    squares = 0 if short == long else min(math.ceil(long / short), max_views - 1)
    columns, rows, side = _tile_grid(width, height, max_views - 1 - squares, math.ceil(size / 2))
    # Views that the grid leaves over become squares, while neighbours still differ by a third of their side.
    spare = max_views - 1 - squares - columns * rows
    squares = max(squares, min(squares + spare, (long - short) * 3 // short + 1)) if squares else 0
    for offset in _spread(long, short, squares):
        left, top = (offset, 0) if width >= height else (0, offset)
        boxes.append((left, top, left + short, top + short))
    for top in _spread(height, side, rows):
        boxes.extend((left, top, left + side, top + side) for left in _spread(width, side, columns))
    return np.asarray(boxes, dtype=np.float32)


def _tile_grid(width: int, height: int, budget: int, smallest: int) -> tuple[int, int, int]:
    """(columns, rows, side) of the covering grid with the smallest side, then the fewest tiles; (0, 0, 0) for none."""
    grids = []
    for rows in range(1, budget + 1):
        for columns in range(1, budget // rows + 1):
            side = max(math.ceil(width / columns), math.ceil(height / rows))
            if smallest <= side < min(width, height):
                grids.append((side, columns * rows, columns, rows))
    if not grids:
        return 0, 0, 0
    side, _, columns, rows = min(grids)
    return columns, rows, side


def _spread(length: int, side: int, count: int) -> list[int]:
    """Offsets of `count` intervals of `side` that cover `length`, evenly spread, first at 0 and last at the end."""
    if count < 2:
        return [0] * count
    return [round(i * (length - side) / (count - 1)) for i in range(count)]


def make_views(rgb: Array, boxes: npt.NDArray[np.float32], view_size: int) -> Array:
    """Cut and resize: uint8 [H, W, 3] and boxes [V, 4] in pixels -> uint8 [V, S, S, 3].

    Views are cut from copies of the photo that are halved until less than a factor of two is left (a pyramid, as for
    textures: Williams 1983), which all views share; an area average of its own for each view would read the photo again.
    """
    size = check_view_size(view_size)
    return _cut(_photo(rgb), boxes, size)


def make_view_planes(rgb: Array, boxes: npt.NDArray[np.float32], view_size: int) -> tuple[Array, Array, Array]:
    """The views of `make_views` as JPEG keeps them at 4:2:0 (JFIF): Y [V, S, S], Cb and Cr [V, S / 2, S / 2].

    Half as many values are cut and resized as of RGB, and the encoder has nothing left to convert. Chroma is averaged
    over 2x2 pixels of the photo first, as most cameras' JPEGs have it anyway, unless views enlarge it more than twice; a
    box on an odd pixel then lies half a pixel of chroma off.
    """
    size = check_view_size(view_size)
    rgb = _photo(rgb)
    height, width = rgb.shape[:2]
    luma = np.asarray(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    coarse = rgb  # made last: what follows reads it from the processor's cache
    if (boxes[:, 2:] - boxes[:, :2]).min() >= size // 2:
        coarse = _resized(rgb, width // 2, height // 2, cv2.INTER_AREA)
    _, red, blue = cv2.split(cv2.cvtColor(coarse, cv2.COLOR_RGB2YCrCb))
    chroma_boxes = scaled_boxes(boxes, (width, height), blue.shape)
    cb, cr = (_cut(np.asarray(plane, dtype=np.uint8), chroma_boxes, size // 2) for plane in (blue, red))
    return _cut(luma, boxes, size), cb, cr


def _photo(rgb: Array) -> Array:
    """The photo with its pixels one after the other. Raises ValueError for anything but uint8 [H, W, 3]."""
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"a photo is uint8 [H, W, 3]; got {rgb.dtype} {rgb.shape}")
    return np.ascontiguousarray(rgb)


def _cut(image: Array, boxes: npt.NDArray[np.float32], size: int) -> Array:
    """[H, W(, C)] -> [V, size, size(, C)], each box from the smallest copy that still has its pixels."""
    halved = [image]
    views = np.empty((len(boxes), size, size, *image.shape[2:]), dtype=np.uint8)
    for view, box, (x0, y0, x1, y1) in zip(views, boxes, _corners(image, boxes), strict=True):
        level = max(min(x1 - x0, y1 - y0) // size, 1).bit_length() - 1
        while len(halved) <= level:
            height, width = halved[-1].shape[:2]
            halved.append(_resized(halved[-1], width // 2, height // 2, cv2.INTER_AREA))
        if level:
            smaller = scaled_boxes(box[None], image.shape[1::-1], halved[level].shape)
            ((x0, y0, x1, y1),) = _corners(halved[level], smaller)
        _draw(halved[level][y0:y1, x0:x1], view)
    return views


def _draw(crop: Array, view: Array) -> None:
    """Fill a view [S, S(, C)] from a crop whose shorter side is less than twice as long.

    Linear interpolation then leaves no pixel out. The longer side is halved, which averages its pixels by pairs, until
    it is not twice as long either.
    """
    size = len(view)
    while max(crop.shape[:2]) >= 2 * size:
        height, width = crop.shape[:2]
        smaller = (width // 2, height) if width >= height else (width, height // 2)
        crop = _resized(crop, *smaller, cv2.INTER_LINEAR)
    cv2.resize(crop, (size, size), dst=view, interpolation=cv2.INTER_LINEAR)


def scaled_boxes(
    boxes: npt.NDArray[np.float32], photo: tuple[int, int], plane: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    """Boxes in pixels of the photo (width, height) to whole pixels of a copy of it [h, w, ...], never empty."""
    scale = np.array([plane[1] / photo[0], plane[0] / photo[1]] * 2)
    scaled: npt.NDArray[np.float64] = np.rint(boxes * scale)
    limit = np.array([plane[1], plane[0]])
    scaled[:, :2] = np.minimum(scaled[:, :2], limit - 1)
    scaled[:, 2:] = np.clip(scaled[:, 2:], scaled[:, :2] + 1, limit)
    return scaled.astype(np.float32)


def _resized(image: Array, width: int, height: int, interpolation: int) -> Array:
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), dtype=np.uint8)


def make_mask_views(bits: Array, boxes: npt.NDArray[np.float32], view_size: int, classes: int = 6) -> Array:
    """Cut masks of class bits like the views: uint8 [H, W] (bit k = class k) -> uint8 [V, S/4, S/4].

    A class is set where it covers at least half of the pixel. Masks may have another resolution than the boxes' photo
    only if the boxes [V, 4] were scaled with them. ValueError for another shape or type.
    """
    size = mask_size(view_size)
    if bits.ndim != 2 or bits.dtype != np.uint8:
        raise ValueError(f"masks are uint8 [H, W] of class bits; got {bits.dtype} {bits.shape}")
    views, corners = np.zeros((len(boxes), size, size), dtype=np.uint8), _corners(bits, boxes)
    for k in range(classes):
        plane = np.asarray((bits >> k & 1) * 255, dtype=np.uint8)
        if plane.any():
            for view, (x0, y0, x1, y1) in zip(views, corners, strict=True):
                view |= (_resize_plane(plane[y0:y1, x0:x1], size) >= 128).astype(np.uint8) << k
    return views


def _corners(image: Array, boxes: npt.NDArray[np.float32]) -> list[tuple[int, int, int, int]]:
    """Boxes [V, 4] in whole pixels, as (x0, y0, x1, y1). Raises ValueError for one that leaves the image or is empty."""
    height, width = image.shape[:2]
    found = [(x0, y0, x1, y1) for x0, y0, x1, y1 in np.rint(boxes).astype(int).tolist()]
    for x0, y0, x1, y1 in found:
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"view box {(x0, y0, x1, y1)} leaves the photo of {width}x{height} pixels or is empty")
    return found


def _resize_plane(crop: Array, size: int) -> Array:
    """Area average where the crop shrinks, then linear where it grows: OpenCV's area mode alone does not average
    one axis while the other grows."""
    height, width = crop.shape[:2]
    inner = (min(width, size), min(height, size))
    if inner != (width, height):
        crop = np.asarray(cv2.resize(crop, inner, interpolation=cv2.INTER_AREA), dtype=np.uint8)
    if inner != (size, size):
        crop = np.asarray(cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    return np.ascontiguousarray(crop)


def compose_sheet(views: Array) -> Array:
    """Views [V, S, S, 3] -> one sheet [V * S, S, 3], view 0 on top; planes [V, S, S] -> [V * S, S].

    One column: a decoded sheet then IS the views in memory order, so a loader decodes straight into its batch, and a
    reader without this package needs only `sheet.reshape(V, S, S, 3)`. ValueError for views of another shape.
    """
    if views.ndim not in (3, 4) or views.shape[1] != views.shape[2]:
        raise ValueError(f"views are [V, S, S] or [V, S, S, 3]; got {views.shape}")
    return views.reshape(views.shape[0] * views.shape[1], *views.shape[2:])


def split_sheet(sheet: Array, num_views: int, size: int) -> Array:
    """The inverse of `compose_sheet`, no copy: [V * S, S, ...] -> [V, S, S, ...]; ValueError for another size."""
    if sheet.shape[:2] != (num_views * size, size):
        raise ValueError(
            f"a sheet of {num_views} views of {size} px is {num_views * size}x{size}; got {sheet.shape[:2]}"
        )
    return sheet.reshape(num_views, size, size, *sheet.shape[2:])
