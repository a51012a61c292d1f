"""What lies beside the weights of a saved detector: its configuration and calibration, read with every field judged."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from roadwork.config import ModelConfig
from roadwork.data.views import MAX_VIEWS
from roadwork.errors import UserError
from roadwork.models.weights import Recipe

WEIGHTS, CONFIG, CALIBRATION = "model.safetensors", "config.json", "calibration.json"
ARCHITECTURE, FORMAT = "RoadworkDetector", 1
T = TypeVar("T")


@dataclass
class SavedConfig:
    """All that is needed to build a saved detector again, without its weights."""

    view_size: int
    max_views: int
    backbone: Recipe
    model: ModelConfig


def read_config(folder: Path) -> SavedConfig:
    """A saved model's configuration; UserError that names the file, and the field that is missing or wrong."""
    path = folder / CONFIG
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{folder} holds no saved model ({CONFIG} and {WEIGHTS}); give a folder such as runs/NAME/model"
        )
    content = _read(path)
    if not isinstance(content, dict) or content.get("architecture") != ARCHITECTURE:
        named = content.get("architecture") if isinstance(content, dict) else None
        raise UserError(f"{path} describes {named or 'another architecture'}, not a {ARCHITECTURE}")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}; this version reads format {FORMAT}")
    for name in ("view_size", "backbone", "model"):
        if name not in content:
            raise UserError(f"{path} lacks the field {name}; save the model again")
    if not _fits(content["view_size"], int):
        raise _wrong(path, "view_size", content["view_size"], int)
    max_views = content.get("max_views", MAX_VIEWS)  # of a version that did not keep it: cut as that version did
    if not (_fits(max_views, int) and 1 <= max_views <= MAX_VIEWS):
        raise UserError(f"{path}: max_views is {max_views!r:.80}; expected an int from 1 to {MAX_VIEWS}")
    model = content["model"]
    if isinstance(model, dict):  # fields of later versions are left out; how to compute is a matter of the machine
        known = {field.name for field in dataclasses.fields(ModelConfig)}
        model = {key: value for key, value in model.items() if key in known} | {"attention": "auto"}
    recipe = _made(Recipe, content["backbone"], path, "backbone")
    if min(recipe.std) <= 0:
        raise UserError(f"{path}: backbone.std is {list(recipe.std)}; expected three numbers above 0")
    return SavedConfig(content["view_size"], max_views, recipe, _made(ModelConfig, model, path, "model"))


def read_calibration(folder: Path) -> dict[str, float] | None:
    """A saved model's calibration, if any; UserError that names the file where it is not usable."""
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    calibration = _read(path)
    if not isinstance(calibration, dict):
        raise _wrong(path, "calibration", calibration, dict[str, float])
    scale_bias(calibration, f"{path}: ")
    prior = calibration.get("prior", 0.5)
    if not (_fits(prior, float) and 0 < prior < 1):
        raise UserError(f"{path}: prior is {prior!r:.80}; expected a number between 0 and 1, or no prior")
    return calibration


def scale_bias(calibration: dict[str, float], where: str = "") -> tuple[float, float]:
    """`scale` (or 1 / `temperature`) and `bias`, checked."""
    try:
        scale = float(calibration["scale"]) if "scale" in calibration else 1.0 / float(calibration["temperature"])
        bias = float(calibration.get("bias", 0.0))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        scale = bias = math.nan
    if not (math.isfinite(scale) and scale > 0 and math.isfinite(bias)):
        raise UserError(
            f"{where}calibration {calibration} is not usable; it needs a positive temperature (or scale) and a bias"
        )
    return scale, bias


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}); save the model again") from error


def _made(kind: type[T], values: Any, path: Path, section: str) -> T:
    """A dataclass of a section of the file."""
    if not isinstance(values, dict):
        raise _wrong(path, section, values, dict[str, Any])
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise UserError(f"{path}: {section}.{name} is unknown; allowed: {', '.join(hints)}")
        if not _fits(value, hints[name]):
            raise _wrong(path, f"{section}.{name}", value, hints[name])
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise UserError(f"{path} lacks the field {section}.{field.name}; save the model again")
    tuples = {name: tuple(value) for name, value in values.items() if get_origin(hints[name]) is tuple}
    return kind(**{**values, **tuples})


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a JSON file is of a dataclass's type."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in inside
    if origin is list:
        return isinstance(value, list) and all(_fits(one, inside[0]) for one in value)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(inside) and all(map(_fits, value, inside))
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (origin or hint)


def _wrong(path: Path, name: str, value: Any, hint: Any) -> UserError:
    expected = str(hint).removeprefix("typing.") if get_args(hint) else hint.__name__
    return UserError(f"{path}: {name} is {value!r:.80}; expected {expected}")
