"""Things in a street that are not roadwork, many of them in roadwork's colours, stripes and sizes."""

import numpy as np

from roadwork.data.street_objects import DARK_BLUE, LIME, ORANGE, RED, SKIN, YELLOW, Kind
from roadwork.data.street_pen import BLACK, STEEL, WHITE, Colour, Pen, pick, vary

GREEN: Colour = (62, 104, 48)
WARM: tuple[Colour, ...] = (ORANGE, ORANGE, ORANGE, RED, YELLOW, DARK_BLUE)
CLOTH: tuple[Colour, ...] = (RED, GREEN, DARK_BLUE, YELLOW, ORANGE)
WOOD: Colour = (150, 100, 56)
GLASS: Colour = (66, 84, 100)


def bollard(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, WARM, 10)
    pen.rect(0.06, 0.12, 0.30, 1.0, body)
    pen.ellipse(0.18, 0.12, 0.12, 0.10, body)
    pen.rect(0.06, 0.20, 0.30, 0.31, WHITE)
    if rng.random() < 0.5:
        pen.rect(0.06, 0.40, 0.30, 0.50, WHITE)
    pen.shade(rng)


def hydrant(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body, cap = pick(rng, WARM, 10), pick(rng, [WHITE, STEEL, RED, YELLOW], 8)
    pen.rect(0.10, 0.92, 0.60, 1.0, body)
    pen.rect(0.18, 0.28, 0.52, 0.94, body)
    pen.ellipse(0.35, 0.26, 0.21, 0.16, cap)
    pen.rect(0.30, 0.02, 0.40, 0.14, cap)
    for x in (0.10, 0.60):
        pen.disc(x, 0.48, 0.10, cap)
    pen.disc(0.35, 0.52, 0.11, cap)
    pen.shade(rng)


def postbox(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [*WARM, DARK_BLUE], 10)
    pen.rect(0.12, 0.70, 0.44, 1.0, STEEL)
    pen.rect(0.02, 0.10, 0.54, 0.82, body)
    pen.ellipse(0.28, 0.12, 0.26, 0.12, body)
    pen.rect(0.10, 0.24, 0.46, 0.29, BLACK)
    pen.rect(0.14, 0.42, 0.42, 0.60, WHITE)
    pen.shade(rng)


def flower_pot(pen: Pen, rng: np.random.Generator, family: str) -> None:
    pot = pick(rng, [ORANGE, (196, 98, 56), RED, WHITE], 10)
    for _ in range(22):
        colour = GREEN if rng.random() < 0.55 else pick(rng, [ORANGE, YELLOW, RED, WHITE])
        pen.disc(float(rng.uniform(0.16, 0.74)), float(rng.uniform(0.08, 0.44)), 0.085, vary(rng, colour, 14))
    pen.poly([(0.14, 0.48), (0.76, 0.48), (0.64, 1.0), (0.26, 1.0)], pot)
    pen.rect(0.10, 0.44, 0.80, 0.55, pot)
    if rng.random() < 0.5:
        pen.poly([(0.20, 0.66), (0.70, 0.66), (0.68, 0.78), (0.22, 0.78)], WHITE)
    pen.shade(rng)


def pumpkins(pen: Pen, rng: np.random.Generator, family: str) -> None:
    for x, y, r in ((0.36, 0.70, 0.30), (1.0, 0.74, 0.26), (0.68, 0.46, 0.28)):
        for shift in (-0.5, 0.5, 0.0):
            pen.ellipse(x + shift * r, y, r * 0.62, r * 0.85, vary(rng, ORANGE, 16))
        pen.rect(x - 0.03, y - r - 0.06, x + 0.03, y - r * 0.7, GREEN)
    pen.shade(rng)


def parasol(pen: Pen, rng: np.random.Generator, family: str) -> None:
    first, second = pick(rng, CLOTH, 10), pick(rng, [WHITE, WHITE, YELLOW], 6)
    pen.line([(0.6, 0.1), (0.6, 0.98)], 0.025, STEEL)
    edge = np.linspace(0.04, 1.16, 9)
    for i in range(8):
        colour = first if i % 2 else second
        pen.poly([(0.6, 0.02), (float(edge[i]), 0.30), (float(edge[i + 1]), 0.30)], colour)
        pen.rect(float(edge[i]), 0.29, float(edge[i + 1]), 0.34, colour)
    pen.ellipse(0.6, 0.68, 0.30, 0.04, vary(rng, (170, 150, 120)))
    for x in (0.24, 0.96):
        pen.rect(x - 0.08, 0.72, x + 0.08, 1.0, vary(rng, (120, 96, 70)))
    pen.shade(rng, 0.1)


def market_stall(pen: Pen, rng: np.random.Generator, family: str) -> None:
    first, second = pick(rng, CLOTH, 10), WHITE
    for x in (0.1, 1.46):
        pen.line([(x, 0.2), (x, 1.0)], 0.03, STEEL)
    pen.stripes([(0.16, 0.0), (1.40, 0.0), (1.56, 0.26), (0.0, 0.26)], first, second, 0.26, 0.0)
    pen.rect(0.1, 0.58, 1.46, 0.98, vary(rng, (136, 104, 70)))
    for x in np.linspace(0.18, 1.38, 9):
        pen.disc(float(x), 0.55, 0.07, pick(rng, [ORANGE, YELLOW, RED, GREEN], 14))
    pen.shade(rng, 0.1)


def traffic_sign(pen: Pen, rng: np.random.Generator, family: str) -> None:
    pen.line([(0.3, 0.3), (0.3, 1.0)], 0.035, STEEL)
    style = int(rng.integers(6))
    if style == 0:
        octagon = [(0.3 + 0.28 * np.cos(a), 0.29 + 0.28 * np.sin(a)) for a in np.arange(8) * np.pi / 4 + np.pi / 8]
        pen.poly(octagon, RED)
        pen.stripes([(0.12, 0.24), (0.48, 0.24), (0.48, 0.34), (0.12, 0.34)], RED, WHITE, 0.08, 0.0)
    elif style == 1:
        pen.disc(0.3, 0.29, 0.28, RED)
        pen.disc(0.3, 0.29, 0.20, WHITE)
        pen.rect(0.2, 0.22, 0.27, 0.36, BLACK)
        pen.rect(0.33, 0.22, 0.40, 0.36, BLACK)
    elif style == 2:
        pen.poly([(0.3, 0.0), (0.6, 0.3), (0.3, 0.6), (0.0, 0.3)], BLACK)
        pen.poly([(0.3, 0.03), (0.57, 0.3), (0.3, 0.57), (0.03, 0.3)], vary(rng, YELLOW, 6))
        pen.line([(0.3, 0.46), (0.3, 0.28), (0.40, 0.18)], 0.05, BLACK)
    elif style == 3:
        pen.disc(0.3, 0.29, 0.28, (28, 80, 170))
        pen.poly([(0.3, 0.10), (0.44, 0.28), (0.16, 0.28)], WHITE)
        pen.rect(0.26, 0.27, 0.34, 0.47, WHITE)
    elif style == 4:
        pen.poly([(0.0, 0.04), (0.6, 0.04), (0.3, 0.54)], RED)
        pen.poly([(0.11, 0.1), (0.49, 0.1), (0.3, 0.42)], WHITE)
    else:
        pen.rect(0.02, 0.02, 0.58, 0.56, pick(rng, [WHITE, WHITE, RED, (28, 80, 170)], 8))
        pen.disc(0.3, 0.24, 0.14, pick(rng, [WHITE, YELLOW, BLACK]))
        pen.rect(0.1, 0.44, 0.5, 0.49, BLACK)
    pen.shade(rng, 0.08)


def pedestrian(pen: Pen, rng: np.random.Generator, family: str) -> None:
    shirt = pick(rng, [ORANGE, ORANGE, YELLOW, RED, LIME, DARK_BLUE, DARK_BLUE, WHITE, STEEL], 10)
    skin, trousers, hair = (
        pick(rng, SKIN),
        pick(rng, [DARK_BLUE, BLACK, (130, 110, 84)]),
        pick(rng, [BLACK, (96, 62, 34)]),
    )
    pen.line([(0.22, 0.54), (0.16, 0.96)], 0.08, trousers)
    pen.line([(0.27, 0.54), (0.34, 0.96)], 0.08, trousers)
    if rng.random() < 0.35:
        pen.poly([(0.15, 0.48), (0.35, 0.48), (0.42, 0.78), (0.08, 0.78)], pick(rng, [shirt, RED, DARK_BLUE]))
    pen.line([(0.16, 0.24), (0.10, 0.40), (0.13, 0.52)], 0.055, shirt)
    pen.line([(0.34, 0.24), (0.40, 0.40), (0.37, 0.52)], 0.055, skin)
    pen.poly([(0.14, 0.19), (0.36, 0.19), (0.34, 0.56), (0.16, 0.56)], shirt)
    pen.ellipse(0.25, 0.10, 0.075, 0.085, hair)
    pen.ellipse(0.26, 0.12, 0.052, 0.065, skin)
    if rng.random() < 0.4:
        pen.rect(0.34, 0.50, 0.46, 0.66, pick(rng, [ORANGE, BLACK, WHITE]))
    pen.shade(rng, 0.15)


def box_truck(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """An ordinary lorry from behind."""
    body = pick(rng, [ORANGE, YELLOW, WHITE, RED], 10)
    pen.rect(0.12, 0.82, 0.28, 1.0, BLACK)
    pen.rect(0.72, 0.82, 0.88, 1.0, BLACK)
    pen.rect(0.06, 0.04, 0.94, 0.88, body)
    pen.line([(0.5, 0.06), (0.5, 0.86)], 0.012, BLACK)
    pen.rect(0.2, 0.22, 0.8, 0.46, pick(rng, [WHITE, ORANGE, DARK_BLUE, RED], 8))
    pen.ellipse(0.5, 0.34, 0.2, 0.08, pick(rng, [YELLOW, WHITE, RED]))
    for x in (0.08, 0.82):
        pen.rect(x, 0.80, x + 0.10, 0.86, (190, 24, 20))
    pen.shade(rng, 0.1)


def lorry_side(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """A delivery lorry from the side."""
    body, cab = (pick(rng, [ORANGE, YELLOW, WHITE, RED], 10), pick(rng, [ORANGE, WHITE, DARK_BLUE]))
    pen.rect(0.1, 0.76, 2.1, 0.84, (50, 50, 52))
    pen.rect(0.04, 0.08, 1.46, 0.78, body)
    pen.rect(0.2, 0.24, 1.3, 0.56, pick(rng, [WHITE, ORANGE, YELLOW], 6))
    pen.ellipse(0.5, 0.40, 0.16, 0.12, pick(rng, [RED, DARK_BLUE, GREEN]))
    pen.poly([(1.52, 0.26), (1.94, 0.26), (2.12, 0.52), (2.12, 0.80), (1.52, 0.80)], cab)
    pen.poly([(1.62, 0.31), (1.9, 0.31), (2.02, 0.50), (1.62, 0.50)], GLASS)
    for x in (0.4, 1.1, 1.8):
        pen.disc(x, 0.87, 0.13, BLACK)
        pen.disc(x, 0.87, 0.06, STEEL)
    pen.shade(rng, 0.1)


def bus(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [YELLOW, ORANGE, RED, WHITE], 10)
    pen.rect(0.04, 0.06, 2.76, 0.90, body)
    pen.rect(0.14, 0.18, 2.66, 0.48, GLASS)
    for x in np.linspace(0.5, 2.3, 6):
        pen.rect(float(x) - 0.02, 0.18, float(x) + 0.02, 0.48, body)
    pen.rect(0.04, 0.62, 2.76, 0.68, pick(rng, [BLACK, WHITE, ORANGE]))
    for x in (0.6, 2.1):
        pen.disc(x, 0.88, 0.12, BLACK)
        pen.disc(x, 0.88, 0.06, STEEL)
    pen.shade(rng, 0.1)


def tractor(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [YELLOW, ORANGE, RED, GREEN], 10)
    pen.poly([(0.2, 0.44), (0.9, 0.46), (0.9, 0.74), (0.2, 0.74)], body)
    pen.rect(0.86, 0.08, 1.34, 0.72, body)
    pen.rect(0.92, 0.14, 1.28, 0.46, GLASS)
    pen.rect(0.34, 0.24, 0.39, 0.46, BLACK)
    pen.disc(1.12, 0.70, 0.30, BLACK)
    pen.disc(1.12, 0.70, 0.14, pick(rng, [YELLOW, WHITE]))
    pen.disc(0.36, 0.82, 0.18, BLACK)
    pen.disc(0.36, 0.82, 0.08, pick(rng, [YELLOW, WHITE]))
    pen.shade(rng, 0.12)


def car_behind(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [(40, 42, 46), (160, 164, 168), (226, 226, 224), (34, 52, 92), (120, 24, 26), YELLOW, ORANGE], 10)
    for x in (0.16, 1.02):
        pen.rect(x, 0.74, x + 0.18, 1.0, BLACK)
    pen.poly([(0.30, 0.06), (1.06, 0.06), (1.24, 0.44), (0.12, 0.44)], body)
    pen.poly([(0.36, 0.12), (1.00, 0.12), (1.12, 0.40), (0.24, 0.40)], GLASS)
    pen.rect(0.06, 0.42, 1.30, 0.88, body)
    for x in (0.08, 1.06):
        pen.rect(x, 0.48, x + 0.22, 0.62, (222, 30, 24))
    pen.rect(0.5, 0.60, 0.86, 0.72, WHITE)
    pen.shade(rng, 0.1)


def car_side(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [(40, 42, 46), (160, 164, 168), (226, 226, 224), (34, 52, 92), (120, 24, 26), YELLOW, ORANGE], 10)
    pen.poly(
        [(0.06, 0.52), (0.62, 0.42), (0.98, 0.06), (2.06, 0.06), (2.46, 0.44), (2.86, 0.52), (2.9, 0.84), (0.04, 0.84)],
        body,
    )
    pen.poly([(0.80, 0.42), (1.06, 0.13), (1.48, 0.13), (1.48, 0.42)], GLASS)
    pen.poly([(1.56, 0.13), (2.02, 0.13), (2.30, 0.42), (1.56, 0.42)], GLASS)
    for x in (0.62, 2.3):
        pen.disc(x, 0.80, 0.20, BLACK)
        pen.disc(x, 0.80, 0.11, STEEL)
    pen.rect(2.78, 0.54, 2.9, 0.64, (200, 30, 24))
    pen.shade(rng, 0.1)


def barber_pole(pen: Pen, rng: np.random.Generator, family: str) -> None:
    pen.rect(0.08, 0.60, 0.16, 1.0, STEEL)
    pen.stripes([(0.02, 0.10), (0.22, 0.10), (0.22, 0.62), (0.02, 0.62)], pick(rng, [RED, ORANGE], 8), WHITE, 0.2, 1.0)
    pen.rect(0.0, 0.04, 0.24, 0.11, STEEL)
    pen.rect(0.0, 0.61, 0.24, 0.67, STEEL)
    pen.shade(rng)


def gate_arm(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """The arm of a car park."""
    box = pick(rng, [YELLOW, ORANGE, WHITE, STEEL], 8)
    pen.stripes([(0.3, 0.20), (2.9, 0.26), (2.9, 0.34), (0.3, 0.32)], pick(rng, [RED, ORANGE], 8), WHITE, 0.5, 0.0)
    pen.rect(0.1, 0.08, 0.5, 1.0, box)
    pen.rect(0.18, 0.2, 0.42, 0.4, BLACK)
    pen.shade(rng, 0.1)


def banner(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """An advertising flag."""
    colour = pick(rng, WARM, 12)
    pen.line([(0.08, 0.02), (0.08, 1.0)], 0.025, STEEL)
    pen.poly([(0.08, 0.02), (0.30, 0.08), (0.34, 0.80), (0.08, 0.82)], colour)
    for y in (0.2, 0.34, 0.5):
        pen.rect(0.12, y, 0.28, y + 0.06, pick(rng, [WHITE, BLACK]))
    pen.rect(0.0, 0.96, 0.2, 1.0, BLACK)
    pen.shade(rng, 0.1)


def ice_cream(pen: Pen, rng: np.random.Generator, family: str) -> None:
    """A kiosk's giant ice cream: an orange cone, upside down."""
    pen.poly([(0.1, 0.36), (0.6, 0.36), (0.37, 0.98), (0.33, 0.98)], vary(rng, (232, 140, 52), 12))
    for y in (0.5, 0.66, 0.82):
        half = 0.25 * (0.98 - y) / 0.62
        pen.line([(0.35 - half, y), (0.35 + half, y)], 0.02, (180, 96, 32))
    for x in (0.22, 0.48, 0.35):
        pen.disc(x, 0.28 if x != 0.35 else 0.16, 0.15, pick(rng, [WHITE, (250, 170, 160), ORANGE], 8))
    pen.rect(0.2, 0.95, 0.5, 1.0, BLACK)
    pen.shade(rng)


def bench(pen: Pen, rng: np.random.Generator, family: str) -> None:
    seat = pick(rng, [ORANGE, WOOD, WOOD, (120, 84, 52), GREEN], 12)
    for y in (0.06, 0.24, 0.52):
        pen.rect(0.04, y, 1.76, y + 0.13, seat)
    for x in (0.2, 1.5):
        pen.rect(x, 0.04, x + 0.08, 1.0, BLACK)
    pen.shade(rng, 0.1)


def litter_bin(pen: Pen, rng: np.random.Generator, family: str) -> None:
    body = pick(rng, [ORANGE, ORANGE, YELLOW, GREEN], 12)
    pen.poly([(0.04, 0.14), (0.60, 0.14), (0.54, 1.0), (0.10, 1.0)], body)
    pen.rect(0.0, 0.06, 0.64, 0.18, vary(rng, body, 12))
    pen.rect(0.2, 0.26, 0.44, 0.34, BLACK)
    if rng.random() < 0.5:
        pen.rect(0.14, 0.5, 0.5, 0.72, WHITE)
    pen.shade(rng)


def autumn_bush(pen: Pen, rng: np.random.Generator, family: str) -> None:
    base = pick(rng, [ORANGE, (214, 120, 40), YELLOW, RED, GREEN], 10)
    for _ in range(46):
        x, y = rng.normal(0.5, 0.19), rng.normal(0.55, 0.18)
        pen.disc(min(max(x, 0.1), 0.9), min(max(y, 0.1), 0.92), 0.085, vary(rng, base, 22))
    pen.rect(0.46, 0.86, 0.54, 1.0, (84, 62, 44))


LOOKALIKES: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("bollard", bollard, (0.8, 1.1), 0.36),
        Kind("hydrant", hydrant, (0.7, 0.9), 0.70),
        Kind("postbox", postbox, (1.1, 1.4), 0.56),
        Kind("flower_pot", flower_pot, (0.8, 1.1), 0.90),
        Kind("pumpkins", pumpkins, (0.6, 0.9), 1.36),
        Kind("parasol", parasol, (2.1, 2.5), 1.20),
        Kind("market_stall", market_stall, (2.0, 2.4), 1.56),
        Kind("traffic_sign", traffic_sign, (1.8, 2.4), 0.60),
        Kind("pedestrian", pedestrian, (1.6, 1.9), 0.50),
        Kind("box_truck", box_truck, (2.6, 3.1), 1.0),
        Kind("lorry_side", lorry_side, (2.4, 2.8), 2.2),
        Kind("bus", bus, (2.6, 2.9), 2.8),
        Kind("tractor", tractor, (2.1, 2.5), 1.45),
        Kind("barber_pole", barber_pole, (1.2, 1.8), 0.24),
        Kind("gate_arm", gate_arm, (1.0, 1.2), 2.95),
        Kind("banner", banner, (2.0, 2.8), 0.36),
        Kind("ice_cream", ice_cream, (0.9, 1.3), 0.70),
        Kind("bench", bench, (0.8, 0.95), 1.80),
        Kind("litter_bin", litter_bin, (0.8, 1.0), 0.64),
        Kind("autumn_bush", autumn_bush, (1.0, 2.0), 1.0),
    )
}
"""Not roadwork, in roadwork's colours or shapes."""

TRAFFIC: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("car_behind", car_behind, (1.4, 1.6), 1.36, None, (255, 40, 30)),
        Kind("car_side", car_side, (1.4, 1.55), 2.94),
    )
}
