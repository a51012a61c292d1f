"""The street itself: camera, sky, buildings, road, trees, and sprites put where they stand."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import cv2
import numpy as np

from roadwork.data.street_cities import Family
from roadwork.data.street_objects import Kind
from roadwork.data.street_pen import (
    BLACK,
    STEEL,
    Colour,
    Floats,
    Image,
    Pen,
    add_grey,
    pick,
    smooth_noise,
    vary,
    vary_many,
)

WIDTH, HEIGHT = 1280, 720
FOCAL = 900.0
"""Focal length in px: a lens of 71 degrees."""
EYE = 1.5
"""Height of the camera over the road, m."""


@dataclass
class Camera:
    """A pinhole `ahead` metres along the street; `horizon` row, `centre` column of the vanishing point."""

    horizon: float
    centre: float
    ahead: float

    def point(self, x: float, up: float, z: float) -> tuple[float, float]:
        """Pixel of the point `x` m right of the street's middle, `up` m over the ground, `z` m from the start."""
        depth = max(z - self.ahead, 0.8)
        return self.centre + FOCAL * x / depth, self.horizon + FOCAL * (EYE - up) / depth


@dataclass
class Building:
    side: int
    near: float
    far: float
    height: float
    texture: Image


@dataclass
class Thing:
    """Something standing at (x, z) in metres, `height` m tall; `seed` fixes its looks in every frame of its video."""

    kind: Kind
    x: float
    z: float
    height: float
    seed: int


@dataclass
class Place:
    """One stretch of street: what all frames of a video share."""

    family: Family
    look: str
    road: float
    """Half the road's width, m."""
    kerb: float
    """Width of pavement or verge, m."""
    wall: float
    """Distance of the house fronts from the middle, m."""
    green: bool
    buildings: list[Building] = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    seed: int = 0


@dataclass
class Frame:
    """A photo in the making."""

    rgb: Image
    masks: Image
    camera: Camera
    haze: Colour
    visibility: float
    """Distance at which haze hides 63 %, m."""
    lamps: list[tuple[float, float, float, Colour]] = field(default_factory=list)
    """Sources of light for the night: column, row, radius in px, colour."""

    def fade(self, distance: float) -> float:
        """Share of haze in front of something `distance` m away."""
        return 1.0 - float(np.exp(-max(distance, 0.0) / self.visibility))


def _facade(rng: np.random.Generator, family: Family, width: float, storeys: int, dark: bool) -> tuple[Image, float]:
    """The flat picture of one house front, 12 px per metre, and the house's height in metres."""
    floor, scale = float(rng.uniform(2.9, 3.5)), 12
    tall = storeys * floor + 0.6
    rows, columns = max(8, int(tall * scale)), max(8, int(width * scale))
    wall = pick(rng, family.walls, 12)
    image: Image = np.empty((rows, columns, 3), np.uint8)
    image[:] = wall
    noise = smooth_noise(rng, rows, columns, 24, 2)[..., None] * 7
    image[:] = np.clip(image + noise, 0, 255)
    if family.roof == "flat" and rng.random() < 0.6:
        image[::4] = (image[::4] * 0.9).astype(np.uint8)
    gap = int(rng.uniform(1.9, 3.0) * scale)
    glazing = vary(rng, (72, 88, 104), 14)
    for storey in range(storeys):
        top = int(rows - (storey + 1) * floor * scale + 0.7 * scale)
        for left in range(gap // 3, columns - gap // 2, gap):
            lit = dark and rng.random() < 0.4
            colour = (250, 214, 140) if lit else vary(rng, glazing, 12)
            x1, y1 = left + gap // 2, top + int(1.5 * scale)
            cv2.rectangle(image, (left - 2, top - 2), (x1 + 2, y1 + 2), family.trim, -1)
            cv2.rectangle(image, (left, top), (x1, y1), colour, -1)
            cv2.line(image, ((left + x1) // 2, top), ((left + x1) // 2, y1), family.trim, 1)
    if rng.random() < 0.5:  # a shop: glass, a sign, sometimes a striped awning
        top = int(rows - 2.7 * scale)
        cv2.rectangle(image, (6, top), (columns - 6, rows - 6), vary(rng, (58, 66, 74), 12), -1)
        board = pick(
            rng, [(200, 60, 40), (236, 150, 40), (40, 70, 110), (60, 100, 70), (230, 226, 216), (246, 196, 40)]
        )
        cv2.rectangle(image, (4, top - 9), (columns - 4, top + 3), board, -1)
        if rng.random() < 0.15:
            for k, x in enumerate(range(4, columns - 4, 6)):
                cv2.rectangle(image, (x, top + 3), (x + 5, top + 13), board if k % 2 else (236, 234, 228), -1)
    cv2.rectangle(image, (0, 0), (columns, 5), family.trim, -1)
    return image, tall


def build_place(seed: int, family: Family, look: str, scene: str, dark: bool) -> Place:
    """Lay out the street of one video. `scene`: Urban, Suburban, Highway, Rural or Other."""
    rng = np.random.default_rng([seed, 1])
    open_road = scene in ("Highway", "Rural")
    road = float(rng.uniform(6.5, 9.0) if scene == "Highway" else rng.uniform(4.2, 6.2))
    kerb = float(rng.uniform(2.4, 4.0))
    wall = road + kerb + (float(rng.uniform(4, 9)) if scene != "Urban" else float(rng.uniform(0, 1.5)))
    place = Place(family, look, road, kerb, wall, open_road or (scene == "Suburban" and rng.random() < 0.6), seed=seed)
    for side in (-1, 1):
        z = float(rng.uniform(1, 6))
        while z < 130:
            length = float(rng.uniform(7, 16))
            if not open_road or rng.random() < 0.12:
                storeys = (
                    int(rng.integers(family.storeys[0], family.storeys[1] + 1))
                    if scene == "Urban"
                    else 1 + int(rng.random() < 0.4)
                )
                texture, height = _facade(rng, family, length, storeys, dark)
                place.buildings.append(Building(side, z, z + length, height, texture))
            z += length + (float(rng.uniform(3, 10)) if scene != "Urban" else float(rng.choice([0.0, 0.0, 3.0])))
        z = float(rng.uniform(4, 14))
        density = family.trees * (1.6 if open_road else 1.0)
        while z < 90:
            if rng.random() < density:
                height = float(rng.uniform(4.0, 8.0) * (0.5 if family.tree == "cactus" else 1.0))
                x = side * (road + kerb * 0.8 + (float(rng.uniform(1, 9)) if place.green else 0.0))
                place.things.append(Thing(TREES[family.tree], x, z, height, int(rng.integers(1 << 30))))
            z += float(rng.uniform(6, 13))
        for z in np.arange(float(rng.uniform(6, 20)), 100, 24):
            if not open_road or look == "europe":
                place.things.append(Thing(LAMP, side * (road + 0.6), float(z), 7.0, int(rng.integers(1 << 30))))
    return place


def _tree_round(pen: Pen, rng: np.random.Generator, family: str) -> None:
    from roadwork.data.street_cities import FAMILIES

    leaf = pick(rng, FAMILIES[family].leaves, 10)
    pen.line([(0.36, 1.0), (0.36, 0.5)], 0.045, (82, 64, 48))
    leaves = rng.standard_normal((min(60, 14 + pen.size[1] // 5), 6))  # per leaf: place, then colour
    places = np.clip((0.36, 0.34) + 0.14 * leaves[:, :2], (0.07, 0.06), (0.65, 0.62))
    pen.discs(places, 0.055, vary_many(leaves[:, 2:], leaf, 18))


def _tree_palm(pen: Pen, rng: np.random.Generator, family: str) -> None:
    leaf = vary(rng, (66, 132, 58), 12)
    pen.line([(0.40, 1.0), (0.36, 0.6), (0.36, 0.18)], 0.03, (134, 112, 84))
    for angle in np.linspace(0, 2 * np.pi, 11):
        dx, dy = 0.32 * float(np.cos(angle)), 0.14 * float(np.sin(angle))
        pen.line([(0.36, 0.18), (0.36 + 0.6 * dx, 0.15 + 0.6 * dy), (0.36 + dx, 0.24 + dy)], 0.022, vary(rng, leaf, 12))


def _tree_conifer(pen: Pen, rng: np.random.Generator, family: str) -> None:
    leaf = vary(rng, (44, 84, 56), 12)
    pen.line([(0.36, 1.0), (0.36, 0.8)], 0.04, (82, 64, 48))
    for y in np.linspace(0.0, 0.66, 6):
        half = 0.08 + 0.26 * float(y) / 0.66
        pen.poly([(0.36, float(y)), (0.36 + half, float(y) + 0.24), (0.36 - half, float(y) + 0.24)], vary(rng, leaf, 8))


def _cactus(pen: Pen, rng: np.random.Generator, family: str) -> None:
    leaf = vary(rng, (90, 124, 72), 10)
    pen.line([(0.36, 1.0), (0.36, 0.06)], 0.12, leaf)
    pen.line([(0.36, 0.62), (0.14, 0.58), (0.14, 0.34)], 0.08, leaf)
    pen.line([(0.36, 0.50), (0.58, 0.46), (0.58, 0.26)], 0.08, leaf)
    pen.shade(rng)


def _lamp(pen: Pen, rng: np.random.Generator, family: str) -> None:
    pen.line([(0.05, 1.0), (0.05, 0.05), (0.22, 0.02)], 0.014, (92, 94, 96))
    pen.rect(0.18, 0.012, 0.26, 0.035, (70, 72, 74))


TREES: dict[str, Kind] = {
    "round": Kind("tree", _tree_round, (4, 8), 0.72),
    "palm": Kind("tree", _tree_palm, (4, 8), 0.76),
    "conifer": Kind("tree", _tree_conifer, (4, 8), 0.72),
    "cactus": Kind("tree", _cactus, (2, 4), 0.72),
}
LAMP = Kind("lamp", _lamp, (7, 7), 0.28, None, (255, 214, 150))


def _quad(frame: Frame, corners: list[tuple[float, float, float]], colour: Colour) -> None:
    """A flat polygon given by points in metres."""
    pixels = np.array([frame.camera.point(*corner) for corner in corners])
    fixed = np.round(np.clip(pixels, -20000, 20000) * 16).astype(np.int32)
    cv2.fillPoly(frame.rgb, [fixed], colour, cv2.LINE_AA, 4)


def _sky(frame: Frame, rng: np.random.Generator, family: Family, cloud: float) -> None:
    rows = int(frame.camera.horizon) + 4
    ramp = np.linspace(0, 1, rows, dtype=np.float32)[:, None, None]
    sky = np.asarray(family.sky, np.float32) * (1 - ramp) + np.asarray(family.horizon, np.float32) * ramp
    cover = smooth_noise(rng, max(2, rows // 4), WIDTH // 4, 5, 4)
    veil = np.clip((cover + 2.6 * cloud - 1.3) * 0.8, 0, 1)[..., None]
    tone = 238 - 70 * max(0.0, cloud - 0.5) - 16 * cover[..., None]
    small = cv2.resize(np.broadcast_to(sky, (rows, 8, 3)).copy(), (WIDTH // 4, max(2, rows // 4)))
    small = small * (1 - veil) + tone * veil
    frame.rgb[:rows] = np.clip(cv2.resize(small, (WIDTH, rows)), 0, 255)
    columns = np.arange(WIDTH)
    ridge = np.interp(columns, np.linspace(0, WIDTH, 14), rng.uniform(0.3, 1.0, 14)) * family.hills
    outline = np.stack([columns, frame.camera.horizon - ridge], 1)
    outline = np.concatenate([outline, [[WIDTH, rows + 4], [0, rows + 4]]]).astype(np.int32)
    green = np.asarray(family.verge) * 0.45 + np.asarray(family.horizon) * 0.5
    cv2.fillPoly(frame.rgb, [outline], tuple(int(c) for c in green))


def _ground(frame: Frame, rng: np.random.Generator, place: Place, snow: bool) -> None:
    family, road, edge = place.family, place.road, place.road + place.kerb
    far, near = 400.0, frame.camera.ahead + 1.0
    top = int(frame.camera.horizon)
    white: Colour = (226, 230, 236)
    frame.rgb[top:] = white if snow else (family.verge if place.green else family.pavement)
    if not place.green:
        for side in (-1, 1):
            corners = [
                (side * road, 0.0, near),
                (side * edge, 0.0, near),
                (side * edge, 0.0, far),
                (side * road, 0.0, far),
            ]
            _quad(frame, corners, white if snow else family.pavement)
    _quad(frame, [(-road, 0, near), (road, 0, near), (road, 0, far), (-road, 0, far)], vary(rng, family.asphalt, 8))
    for side in (-1, 1):
        x = side * road
        _quad(
            frame, [(x, 0, near), (x + side * 0.22, 0, near), (x + side * 0.22, 0, far), (x, 0, far)], (176, 174, 170)
        )
    if not snow:
        for z in np.arange(2.0, 90.0, 6.0):
            if z + 3 > near:
                start = max(float(z), near)
                _quad(frame, [(-0.08, 0, start), (0.08, 0, start), (0.08, 0, z + 3), (-0.08, 0, z + 3)], family.marking)
        if place.look != "europe":
            for x in (-road + 0.5, road - 0.5):
                _quad(
                    frame,
                    [(x - 0.06, 0, near), (x + 0.06, 0, near), (x + 0.06, 0, far), (x - 0.06, 0, far)],
                    (214, 214, 210),
                )
    grain = cv2.resize(smooth_noise(rng, 90, WIDTH // 4, 40, 3), (WIDTH, HEIGHT - top)) * np.float32(6)
    grain += cv2.resize(smooth_noise(rng, 24, 24, 6, 2), (WIDTH, HEIGHT - top)) * np.float32(5)
    frame.rgb[top:] = add_grey(frame.rgb[top:], grain)


def _veiled(colour: Iterable[float], light: float, veil: float, haze: Colour) -> Colour:
    """`colour` times `light`, seen through haze that hides the share `veil` of it."""
    red, green, blue = (int(c * light * (1 - veil) + h * veil) for c, h in zip(colour, haze, strict=True))
    return red, green, blue


def _building(frame: Frame, place: Place, house: Building) -> None:
    ahead = frame.camera.ahead
    near, far = max(house.near, ahead + 1.6), house.far
    if far <= near + 0.5:
        return
    x = house.side * place.wall
    if house.near > ahead + 3:  # the gable end that faces the camera
        deep = x + house.side * 9.0
        veil = frame.fade(near - ahead)
        wall = house.texture[house.texture.shape[0] // 2, 1]
        shade = _veiled(wall, 0.72, veil, frame.haze)
        _quad(frame, [(x, 0, near), (deep, 0, near), (deep, house.height, near), (x, house.height, near)], shade)
        if place.family.roof == "gable":
            peak = house.height + 2.6
            trim = _veiled(place.family.trim, 0.9, veil, frame.haze)
            _quad(frame, [(x, house.height, near), (deep, house.height, near), ((x + deep) / 2, peak, near)], trim)
            ridge = [
                (x, house.height, near),
                (x, house.height, far),
                ((x + deep) / 2, peak, far),
                ((x + deep) / 2, peak, near),
            ]
            _quad(frame, ridge, trim)
    outline = ((house.height, near), (house.height, far), (0.0, far), (0.0, near))
    corners = np.array([frame.camera.point(x, up, z) for up, z in outline], np.float32)
    rows, columns = house.texture.shape[:2]
    cut = columns * (near - house.near) / (house.far - house.near)
    source = np.array([[cut, 0], [columns, 0], [columns, rows], [cut, rows]], np.float32)
    x0, x1 = int(max(corners[:, 0].min(), 0)), int(min(corners[:, 0].max() + 1, WIDTH))
    y0, y1 = int(max(corners[:, 1].min(), 0)), int(min(corners[:, 1].max() + 1, HEIGHT))
    if x1 - x0 < 2 or y1 - y0 < 2:
        return
    corners = corners - np.array([x0, y0], np.float32)
    matrix = cv2.getPerspectiveTransform(source, corners)
    face = cv2.warpPerspective(house.texture, matrix, (x1 - x0, y1 - y0), flags=cv2.INTER_LINEAR)
    mask = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.fillConvexPoly(mask, np.round(corners * 16).astype(np.int32), 255, cv2.LINE_8, 4)
    haze = frame.fade((near + far) / 2 - ahead)
    face = cv2.addWeighted(face, 1 - haze, np.full_like(face, frame.haze), haze, 0)
    cv2.copyTo(face, mask, frame.rgb[y0:y1, x0:x1])


def paint_thing(frame: Frame, thing: Thing, look: str) -> int:
    """Draw one thing where it stands, its class into `frame.masks`. Returns the pixels that it covers."""
    depth = thing.z - frame.camera.ahead
    height = FOCAL * thing.height / max(depth, 0.1)
    column, foot = frame.camera.point(thing.x, 0.0, thing.z)
    half = height * thing.kind.aspect / 2
    if depth < 2.5 or height < 7 or column + half < 1 or column - half > WIDTH - 1:
        return 0
    pen = Pen(min(height, 900.0), thing.kind.aspect)
    thing.kind.draw(pen, np.random.default_rng(thing.seed), look)
    rgb, alpha = pen.finish()
    left, top = round(column - half), round(foot) - rgb.shape[0]
    _shadow(frame, column, foot, half, height)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + rgb.shape[1], WIDTH), min(top + rgb.shape[0], HEIGHT)
    if x1 <= x0 or y1 <= y0:
        return 0
    cut = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    rgb, alpha = rgb[cut], alpha[cut]
    haze = frame.fade(depth)
    cover = cv2.merge([alpha, alpha, alpha])
    rgb = rgb * np.float32(1 - haze) + cover * np.float32(haze * float(np.mean(frame.haze)))
    behind = cv2.multiply(frame.rgb[y0:y1, x0:x1], 1 - cover, dtype=cv2.CV_32F)
    frame.rgb[y0:y1, x0:x1] = cv2.add(behind, rgb, dtype=cv2.CV_8U)
    solid = alpha > 0.5
    code = 0 if thing.kind.mask_class is None else 1 << thing.kind.mask_class
    frame.masks[y0:y1, x0:x1][solid] = code
    if thing.kind.glow is not None:
        frame.lamps.append((column, foot - height * 0.94, max(3.0, height * 0.10), thing.kind.glow))
    return int(solid.sum())


def _shadow(frame: Frame, column: float, foot: float, half: float, height: float) -> None:
    """A soft dark patch under the thing, so that it stands on the ground."""
    rx, ry = half * 1.25 + 2, max(2.0, min(half * 0.22, height * 0.12))
    x0, x1 = int(max(column - rx, 0)), int(min(column + rx + 1, WIDTH))
    y0, y1 = int(max(foot - ry, 0)), int(min(foot + ry + 1, HEIGHT))
    if x1 <= x0 or y1 <= y0:
        return
    ys = ((np.arange(y0, y1, dtype=np.float32) - foot) / ry)[:, None]
    xs = ((np.arange(x0, x1, dtype=np.float32) - column) / rx)[None]
    dark = 1 - 0.5 * np.clip(1.2 - xs**2 - ys**2, 0, 1)
    frame.rgb[y0:y1, x0:x1] = (frame.rgb[y0:y1, x0:x1] * dark[..., None]).astype(np.uint8)


def paint_street(camera: Camera, place: Place, *, cloud: float, snow: bool, haze: Colour, visibility: float) -> Frame:
    """Sky, ground and houses of `place` seen by `camera`; things are painted over it, the far ones first."""
    frame = Frame(np.empty((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8), camera, haze, visibility)
    rng = np.random.default_rng([place.seed, 2])
    _sky(frame, rng, place.family, cloud)
    _ground(frame, rng, place, snow)
    veil = frame.fade(120)
    if veil > 0.05:  # haze over the far ground and the skyline, thinner towards the camera
        rows = np.arange(HEIGHT, dtype=np.float32)
        distance = FOCAL * EYE / np.maximum(rows - camera.horizon, 1.0)
        share = np.where(rows < camera.horizon, veil, 1 - np.exp(-distance / visibility))[:, None].astype(np.float32)
        rows_of_haze = np.asarray(haze, np.float32) * share  # whole rows below: numpy is slow along 3 channels
        added: Floats = np.asarray(cv2.repeat(rows_of_haze, 1, WIDTH), np.float32)
        added += frame.rgb.reshape(HEIGHT, -1) * (1 - share)
        frame.rgb[:] = added.reshape(frame.rgb.shape)
    for house in sorted(place.buildings, key=lambda house: -house.near):
        _building(frame, place, house)
    return frame


def paint_wire_and_poles(frame: Frame, place: Place) -> None:
    """Overhead wires of American streets."""
    if place.look in ("europe", "tropic"):
        return
    x = -(place.road + 1.2)
    for up in (6.4, 6.9):
        near, far = (
            frame.camera.point(x, up, frame.camera.ahead + 3),
            frame.camera.point(x, up, frame.camera.ahead + 90),
        )
        ends = [(int(np.clip(c, -4000, 4000)), int(np.clip(r, -4000, 4000))) for c, r in (near, far)]
        cv2.line(frame.rgb, ends[0], ends[1], BLACK if up > 6.5 else STEEL, 1, cv2.LINE_AA)
