"""The cities of the embedded street benchmark: where they lie and what makes their streets look as they do."""

from dataclasses import dataclass

from roadwork.data.street_pen import Colour


@dataclass(frozen=True)
class City:
    """One city. `family` chooses building style, road furniture and the look of roadwork itself."""

    name: str
    latitude: float
    longitude: float
    family: str
    """rust, coast, desert, tropic, mountain or europe."""
    train_share: float
    """Share of the training videos; `test_share` of the test videos."""
    test_share: float
    weather: tuple[float, float, float, float, float, float]
    """Odds of sunny, partly cloudy, cloudy, rain, snow, fog."""


@dataclass(frozen=True)
class Family:
    """The look that cities of one family share."""

    sky: Colour
    horizon: Colour
    asphalt: Colour
    pavement: Colour
    verge: Colour
    marking: Colour
    """Of the middle line."""
    walls: tuple[Colour, ...]
    trim: Colour
    roof: str
    """flat, gable or tower."""
    storeys: tuple[int, int]
    tree: str
    """round, palm, conifer or cactus."""
    leaves: tuple[Colour, ...]
    trees: float
    """Trees per 10 m of kerb."""
    hills: float
    """Height of the skyline over the horizon, px."""
    favourites: tuple[str, ...]
    """Look-alikes that are common here."""


FAMILIES: dict[str, Family] = {
    "rust": Family(
        (122, 158, 196), (206, 214, 220), (84, 84, 88), (150, 148, 144), (86, 112, 62), (214, 176, 58),
        ((128, 62, 50), (146, 84, 64), (104, 70, 60), (160, 120, 92)), (206, 198, 184), "flat", (2, 4), "round",
        ((76, 112, 48), (190, 116, 40), (168, 70, 36)), 0.5, 70.0,
        ("hydrant", "barber_pole", "pumpkins", "autumn_bush", "postbox"),
    ),
    "coast": Family(
        (112, 156, 208), (212, 220, 226), (96, 96, 98), (170, 164, 156), (80, 118, 64), (220, 184, 70),
        ((150, 92, 78), (182, 150, 120), (120, 104, 96), (196, 188, 176)), (232, 228, 220), "tower", (3, 9), "round",
        ((70, 116, 52), (94, 124, 54)), 0.35, 20.0,
        ("market_stall", "bus", "hydrant", "banner", "pedestrian"),
    ),
    "desert": Family(
        (84, 146, 222), (226, 214, 190), (122, 114, 106), (196, 176, 148), (190, 160, 118), (236, 200, 90),
        ((214, 176, 132), (198, 146, 104), (226, 204, 170), (180, 128, 96)), (120, 82, 58), "flat", (1, 2), "cactus",
        ((88, 122, 70), (110, 128, 84)), 0.25, 110.0,
        ("flower_pot", "tractor", "banner", "bollard", "gate_arm"),
    ),
    "tropic": Family(
        (70, 160, 226), (214, 232, 238), (110, 110, 112), (204, 196, 184), (92, 148, 66), (232, 196, 84),
        ((240, 196, 190), (180, 222, 214), (246, 226, 170), (236, 236, 230)), (252, 252, 250), "flat", (1, 4), "palm",
        ((62, 136, 62), (84, 150, 58)), 0.5, 8.0,
        ("parasol", "ice_cream", "flower_pot", "bench", "postbox"),
    ),
    "mountain": Family(
        (92, 150, 214), (214, 224, 232), (92, 94, 98), (164, 160, 152), (104, 118, 76), (226, 190, 76),
        ((136, 104, 74), (164, 142, 112), (108, 116, 120), (186, 176, 160)), (90, 66, 46), "gable", (1, 3), "conifer",
        ((44, 84, 56), (52, 96, 60)), 0.7, 170.0,
        ("tractor", "autumn_bush", "litter_bin", "traffic_sign", "bench"),
    ),
    "europe": Family(
        (134, 168, 204), (214, 220, 224), (104, 102, 102), (158, 150, 144), (88, 124, 66), (236, 236, 234),
        ((236, 224, 196), (226, 190, 150), (214, 168, 140), (206, 210, 196)), (150, 70, 52), "gable", (3, 5), "round",
        ((78, 124, 58), (96, 132, 62)), 0.4, 30.0,
        ("litter_bin", "parasol", "traffic_sign", "bollard", "market_stall"),
    ),
}  # fmt: skip

CITIES: tuple[City, ...] = (
    City("pittsburgh", 40.4406, -79.9959, "rust", 0.18, 0.56, (2, 3, 4, 3, 2, 1)),
    City("greensburg", 40.3015, -79.5389, "rust", 0.10, 0.30, (2, 3, 4, 3, 2, 1)),
    City("morgantown", 39.6295, -79.9559, "rust", 0.07, 0.04, (2, 3, 3, 3, 1, 2)),
    City("cleveland", 41.4993, -81.6944, "coast", 0.07, 0.02, (2, 3, 4, 2, 3, 1)),
    City("columbus", 39.9612, -82.9988, "rust", 0.08, 0.02, (3, 3, 3, 2, 1, 1)),
    City("philadelphia", 39.9526, -75.1652, "coast", 0.08, 0.02, (3, 3, 3, 2, 1, 1)),
    City("indianapolis", 39.7684, -86.1581, "mountain", 0.06, 0.01, (3, 3, 3, 2, 1, 1)),
    City("denver", 39.7392, -104.9903, "mountain", 0.08, 0.01, (4, 3, 2, 1, 3, 0)),
    City("phoenix", 33.4484, -112.0740, "desert", 0.08, 0.01, (8, 2, 1, 0, 0, 0)),
    City("miami", 25.7617, -80.1918, "tropic", 0.07, 0.01, (5, 3, 1, 3, 0, 0)),
    City("munich", 48.1351, 11.5820, "europe", 0.08, 0.0, (2, 3, 4, 3, 2, 1)),
    City("lisbon", 38.7223, -9.1393, "europe", 0.05, 0.0, (6, 3, 1, 2, 0, 1)),
)
"""Real places: the first two are the target region; the next lie within 200 km of it, then 500 km, then far away."""

TARGET = ("pittsburgh", "greensburg")
