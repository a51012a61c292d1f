"""What makes a street a work zone: cones, barriers, signs, workers, vehicles, equipment, drawn as sprites.

Every colour used here is also worn by something in `street_lookalikes`, and striped and pictured surfaces occur there
too: what tells roadwork apart is shape, pattern and context, as in the street.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from roadwork.data.street_pen import BLACK, STEEL, WHITE, Colour, Pen, pick, vary

ORANGE: Colour = (240, 98, 24)
RED: Colour = (206, 36, 34)
YELLOW: Colour = (246, 190, 24)
LIME: Colour = (204, 234, 44)
DARK_BLUE: Colour = (36, 48, 88)
SKIN: tuple[Colour, ...] = ((232, 186, 150), (190, 134, 96), (116, 78, 54))

Draw = Callable[[Pen, np.random.Generator, str], None]


@dataclass(frozen=True)
class Kind:
    """A thing that can stand in a street. `height` in metres (range), `aspect` = width / height."""

    name: str
    draw: Draw
    height: tuple[float, float]
    aspect: float
    mask_class: int | None = None
    glow: Colour | None = None
    """Colour of a lamp at its top, seen at night."""


def cone(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = vary(rng, RED if family == "europe" else ORANGE, 12)
    pen.rect(0.02, 0.92, 0.68, 1.0, BLACK if family != "rust" else vary(rng, ORANGE, 12))

    def band(top: float, bottom: float, colour: Colour) -> None:
        def half(y: float) -> float:
            return 0.045 + 0.20 * y

        pen.poly(
            [
                (0.35 - half(top), top),
                (0.35 + half(top), top),
                (0.35 + half(bottom), bottom),
                (0.35 - half(bottom), bottom),
            ],
            colour,
        )

    band(0.02, 0.93, body)
    band(0.26, 0.44, WHITE)
    band(0.58, 0.74, WHITE)
    pen.shade(rng)


def drum(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = vary(rng, ORANGE, 12)
    pen.rect(0.0, 0.93, 0.62, 1.0, BLACK)
    pen.poly([(0.08, 0.06), (0.54, 0.06), (0.58, 0.94), (0.04, 0.94)], body)
    for y in (0.14, 0.42, 0.70):
        pen.rect(0.065, y, 0.555, y + 0.13, WHITE)
    pen.rect(0.20, 0.0, 0.42, 0.07, BLACK)
    pen.shade(rng)


def _stripe_colours(family: str, rng: np.random.Generator) -> tuple[Colour, Colour]:
    if family == "desert":
        return vary(rng, YELLOW), BLACK
    return vary(rng, RED if family == "europe" or rng.random() < 0.3 else ORANGE), WHITE


def barricade(pen: Pen, rng: np.random.Generator, family: str) -> None:
    first, second = _stripe_colours(family, rng)
    for x in (0.16, 1.54):
        pen.rect(x, 0.0, x + 0.08, 0.98, STEEL)
        pen.rect(x - 0.12, 0.95, x + 0.2, 1.0, BLACK)
    slope = float(rng.choice([-1.0, 1.0]))
    for y in (0.04, 0.36, 0.68) if rng.random() < 0.6 else (0.06, 0.50):
        pen.stripes([(0.02, y), (1.76, y), (1.76, y + 0.22), (0.02, y + 0.22)], first, second, 0.42, slope)
    pen.shade(rng, 0.12)


def block_barrier(pen: Pen, rng: np.random.Generator, family: str) -> None:
    first, second = _stripe_colours(family, rng)
    for i in range(3):
        x = 0.02 + 0.66 * i
        colour = first if i % 2 else second
        pen.poly([(x + 0.12, 0.0), (x + 0.52, 0.0), (x + 0.64, 1.0), (x, 1.0)], vary(rng, colour, 6))
        pen.rect(x + 0.12, 0.86, x + 0.52, 1.0, BLACK)
        other = second if i % 2 else first
        y, wide = (0.2, [(x + 0.10, 0.2), (x + 0.54, 0.2), (x + 0.56, 0.48), (x + 0.08, 0.48)])
        pen.stripes(wide, colour, other, 0.24, 1.0)
        pen.line([(x + 0.08, y + 0.42), (x + 0.56, y + 0.42)], 0.03, STEEL)
    pen.shade(rng, 0.12)


def _digger(pen: Pen, x: float, y: float, s: float, ink: Colour = BLACK) -> None:
    """The man with the shovel, centred at (x, y), `s` tall."""
    pen.disc(x - 0.08 * s, y - 0.36 * s, 0.11 * s, ink)
    pen.line([(x - 0.06 * s, y - 0.2 * s), (x + 0.1 * s, y + 0.06 * s)], 0.15 * s, ink)
    pen.line([(x + 0.1 * s, y + 0.06 * s), (x - 0.08 * s, y + 0.22 * s), (x - 0.1 * s, y + 0.42 * s)], 0.1 * s, ink)
    pen.line([(x + 0.1 * s, y + 0.06 * s), (x + 0.18 * s, y + 0.42 * s)], 0.1 * s, ink)
    pen.line([(x - 0.04 * s, y - 0.12 * s), (x - 0.26 * s, y + 0.1 * s), (x - 0.36 * s, y + 0.4 * s)], 0.07 * s, ink)
    pen.poly([(x - 0.5 * s, y + 0.44 * s), (x - 0.24 * s, y + 0.44 * s), (x - 0.36 * s, y + 0.24 * s)], ink)


def work_sign(pen: Pen, rng: np.random.Generator, family: str) -> None:
    face = vary(rng, ORANGE if family != "desert" else (250, 142, 20), 10)
    pen.line([(0.3, 0.5), (0.3, 0.98)], 0.035, STEEL)
    pen.line([(0.3, 0.72), (0.1, 0.99)], 0.03, STEEL)
    pen.line([(0.3, 0.72), (0.5, 0.99)], 0.03, STEEL)
    if family == "europe":
        pen.poly([(0.3, 0.0), (0.6, 0.52), (0.0, 0.52)], RED)
        pen.poly([(0.3, 0.1), (0.52, 0.475), (0.08, 0.475)], YELLOW if rng.random() < 0.5 else WHITE)
        _digger(pen, 0.31, 0.36, 0.2)
    elif rng.random() < 0.75:
        pen.poly([(0.3, 0.0), (0.6, 0.3), (0.3, 0.6), (0.0, 0.3)], BLACK)
        pen.poly([(0.3, 0.025), (0.575, 0.3), (0.3, 0.575), (0.025, 0.3)], face)
        _digger(pen, 0.31, 0.31, 0.30)
    else:
        pen.rect(0.0, 0.08, 0.6, 0.5, BLACK)
        pen.rect(0.02, 0.1, 0.58, 0.48, face)
        for y in (0.17, 0.29, 0.41):
            inset = float(rng.uniform(0.06, 0.14))
            pen.stripes([(inset, y - 0.03), (0.6 - inset, y - 0.03), (0.6 - inset, y + 0.03), (inset, y + 0.03)],
                        BLACK, face, 0.07, 0.0)  # fmt: skip
    pen.shade(rng, 0.08)


def worker(pen: Pen, rng: np.random.Generator, family: str) -> None:
    vest = vary(rng, LIME if rng.random() < 0.55 else ORANGE, 8)
    skin, trousers = pick(rng, SKIN), pick(rng, [DARK_BLUE, (70, 70, 72), vest], 8)
    lean = float(rng.uniform(-0.05, 0.05))
    pen.line([(0.22, 0.54), (0.17, 0.95)], 0.085, trousers)
    pen.line([(0.28, 0.54), (0.34, 0.95)], 0.085, trousers)
    for x in (0.16, 0.35):
        pen.rect(x - 0.05, 0.94, x + 0.06, 1.0, BLACK)
    for y, x in ((0.78, 0.2), (0.78, 0.31)):
        pen.line([(x - 0.04, y), (x + 0.04, y)], 0.025, (222, 226, 222))
    reach = float(rng.uniform(0.30, 0.55))
    pen.line([(0.15 + lean, 0.24), (0.08, 0.38), (0.12, reach)], 0.06, vest)
    pen.line([(0.35 + lean, 0.24), (0.43, 0.38), (0.40, reach)], 0.06, vest)
    pen.poly([(0.13 + lean, 0.19), (0.37 + lean, 0.19), (0.36, 0.56), (0.14, 0.56)], vest)
    shine: Colour = (226, 230, 226)
    for x in (0.19, 0.31):
        pen.line([(x + lean, 0.19), (x, 0.55)], 0.032, shine)
    for y in (0.36, 0.48):
        pen.line([(0.15, y), (0.35, y)], 0.032, shine)
    pen.disc(0.25 + lean, 0.12, 0.062, skin)
    helmet = pick(rng, [YELLOW, WHITE, ORANGE], 6)
    pen.ellipse(0.25 + lean, 0.075, 0.082, 0.07, helmet)
    pen.rect(0.15 + lean, 0.078, 0.36 + lean, 0.1, helmet)
    pen.disc(0.25 + lean, 0.13, 0.05, skin)
    if rng.random() < 0.5:
        pen.line([(0.12, reach), (0.03, 0.97)], 0.022, (120, 84, 50))
        pen.poly([(0.0, 0.9), (0.07, 0.9), (0.06, 1.0), (0.0, 1.0)], STEEL)
    pen.shade(rng, 0.15)


def work_truck(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """From behind: chevrons over the tail, arrow board, beacons."""
    body = pick(rng, [ORANGE, YELLOW, WHITE], 8)
    first, second = (RED, YELLOW) if family != "europe" else (RED, WHITE)
    pen.rect(0.12, 0.80, 0.28, 1.0, BLACK)
    pen.rect(0.72, 0.80, 0.88, 1.0, BLACK)
    pen.rect(0.08, 0.34, 0.92, 0.88, body)
    pen.stripes([(0.1, 0.44), (0.5, 0.44), (0.5, 0.84), (0.1, 0.84)], first, second, 0.17, 1.0)
    pen.stripes([(0.5, 0.44), (0.9, 0.44), (0.9, 0.84), (0.5, 0.84)], first, second, 0.17, -1.0)
    for x in (0.10, 0.82):
        pen.rect(x, 0.86, x + 0.08, 0.91, (150, 20, 20))
    pen.rect(0.16, 0.08, 0.84, 0.36, BLACK)
    for x in np.linspace(0.24, 0.76, 7):
        pen.disc(float(x), 0.22, 0.03, (255, 200, 60))
    for y in (0.14, 0.30):
        pen.disc(0.32, y, 0.03, (255, 200, 60))
    for x in (0.2, 0.8):
        pen.rect(x - 0.05, 0.02, x + 0.05, 0.09, (255, 160, 20))
    pen.shade(rng, 0.1)


def work_truck_side(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """A tipper from the side: cab with beacon, open ribbed bed, striped flank."""
    body = pick(rng, [ORANGE, YELLOW, WHITE], 8)
    pen.rect(0.1, 0.72, 2.1, 0.84, (50, 50, 52))
    pen.poly([(0.05, 0.30), (1.42, 0.30), (1.34, 0.74), (0.16, 0.74)], body)
    for x in np.linspace(0.2, 1.3, 6):
        pen.line([(float(x), 0.31), (float(x), 0.73)], 0.025, vary(rng, (90, 80, 70), 5))
    first, second = _stripe_colours(family, rng)
    pen.stripes([(0.12, 0.60), (1.37, 0.60), (1.35, 0.72), (0.15, 0.72)], first, second, 0.22, 1.0)
    pen.ellipse(0.72, 0.29, 0.55, 0.10, vary(rng, (120, 98, 74), 8))
    pen.poly([(1.5, 0.22), (1.95, 0.22), (2.12, 0.50), (2.12, 0.80), (1.5, 0.80)], body)
    pen.poly([(1.6, 0.27), (1.9, 0.27), (2.02, 0.48), (1.6, 0.48)], (70, 92, 110))
    pen.rect(1.6, 0.12, 1.76, 0.22, (255, 160, 20))
    for x in (0.4, 0.72, 1.8):
        pen.disc(x, 0.86, 0.14, BLACK)
        pen.disc(x, 0.86, 0.06, STEEL)
    pen.shade(rng, 0.1)


def excavator(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [YELLOW, ORANGE, (236, 160, 20)], 8)
    pen.ellipse(1.18, 0.90, 0.46, 0.10, BLACK)
    for x in np.linspace(0.86, 1.5, 5):
        pen.disc(float(x), 0.90, 0.05, (84, 84, 84))
    pen.rect(0.92, 0.74, 1.5, 0.82, (64, 64, 66))
    pen.poly([(0.86, 0.50), (1.62, 0.50), (1.66, 0.76), (0.86, 0.76)], body)
    pen.poly([(0.86, 0.28), (1.16, 0.26), (1.22, 0.74), (0.86, 0.74)], body)
    pen.poly([(0.90, 0.32), (1.12, 0.31), (1.14, 0.54), (0.90, 0.54)], (62, 84, 98))
    bend = float(rng.uniform(-0.06, 0.06))
    pen.line([(0.92, 0.66), (0.66, 0.14 + bend), (0.50, 0.08 + bend)], 0.10, body)
    pen.line([(0.52, 0.07 + bend), (0.24, 0.62)], 0.075, body)
    pen.line([(0.78, 0.52), (0.60, 0.18 + bend)], 0.03, STEEL)
    pen.poly([(0.28, 0.58), (0.34, 0.78), (0.20, 0.92), (0.04, 0.80), (0.16, 0.64)], (58, 58, 60))
    pen.rect(1.5, 0.42, 1.56, 0.52, BLACK)
    pen.shade(rng, 0.12)


def roller(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [YELLOW, ORANGE], 8)
    pen.disc(0.34, 0.76, 0.24, (96, 98, 100))
    pen.disc(0.34, 0.76, 0.10, (60, 60, 62))
    pen.disc(1.16, 0.76, 0.24, BLACK)
    pen.disc(1.16, 0.76, 0.10, body)
    pen.poly([(0.2, 0.46), (1.4, 0.40), (1.44, 0.66), (0.2, 0.66)], body)
    for x in (0.56, 1.02):
        pen.line([(x, 0.08), (x, 0.46)], 0.04, BLACK)
    pen.rect(0.46, 0.03, 1.12, 0.10, body)
    pen.rect(0.70, 0.30, 0.86, 0.46, BLACK)
    pen.shade(rng, 0.12)


def arrow_board(pen: Pen, rng: np.random.Generator, family: str) -> None:
    frame = pick(rng, [ORANGE, YELLOW], 8)
    pen.rect(0.0, 0.0, 1.1, 0.52, frame)
    pen.rect(0.04, 0.04, 1.06, 0.48, BLACK)
    bulb: Colour = (255, 196, 50)
    flip = -1 if rng.random() < 0.5 else 1
    for x in np.linspace(-0.38, 0.38, 7):
        pen.disc(0.55 + float(x), 0.26, 0.032, bulb)
    for d in (0.1, 0.2):
        pen.disc(0.55 + flip * (0.38 - d), 0.26 - d * 0.8, 0.032, bulb)
        pen.disc(0.55 + flip * (0.38 - d), 0.26 + d * 0.8, 0.032, bulb)
    pen.line([(0.55, 0.52), (0.55, 0.84)], 0.06, STEEL)
    pen.rect(0.2, 0.76, 0.9, 0.90, frame)
    for x in (0.3, 0.8):
        pen.disc(x, 0.91, 0.085, BLACK)
    pen.shade(rng, 0.08)


ROADWORK: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("cone", cone, (0.70, 0.95), 0.70, 0),
        Kind("drum", drum, (0.95, 1.10), 0.62, 0),
        Kind("barricade", barricade, (1.0, 1.4), 1.78, 1),
        Kind("block_barrier", block_barrier, (0.8, 1.0), 2.0, 1),
        Kind("work_sign", work_sign, (1.7, 2.3), 0.60, 2),
        Kind("worker", worker, (1.65, 1.90), 0.46, 3),
        Kind("work_truck", work_truck, (2.4, 2.9), 1.0, 4, (255, 170, 40)),
        Kind("work_truck_side", work_truck_side, (2.2, 2.6), 2.2, 4, (255, 170, 40)),
        Kind("excavator", excavator, (2.6, 3.2), 1.7, 5),
        Kind("roller", roller, (1.9, 2.3), 1.5, 5),
        Kind("arrow_board", arrow_board, (2.0, 2.5), 1.1, 5, (255, 190, 60)),
    )
}
"""Everything that makes a photo positive; `mask_class` is the bit in MASK_CLASSES."""
