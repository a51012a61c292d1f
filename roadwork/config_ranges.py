"""Numbers that an option may hold: one table for the command line and for the classes that are used from Python."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from roadwork.errors import UserError

if TYPE_CHECKING:
    from roadwork.config import AugmentConfig, LossConfig, ModelConfig


class Range(NamedTuple):
    """Finite numbers from `low` (where `above`, beyond it) to `high`."""

    words: str
    low: float = 0.0
    high: float = math.inf
    above: bool = False

    def check(self, name: str, value: Any) -> None:
        """UserError that names the option, what it holds and what is allowed."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"{name} is {value!r}; give {self.words}") from None
        enough = self.low < number if self.above else self.low <= number
        if not (enough and number <= self.high and math.isfinite(number)):
            raise UserError(f"{name} is {value}; give {self.words}")


PROBABILITY = Range("a probability in [0, 1]", high=1)
SHARE = Range("a share in [0, 1]", high=1)
SOME = Range("a share in (0, 1]", high=1, above=True)
FACTOR = Range("a factor >= 0")
WEIGHT = Range("a weight >= 0")
FOCUS = Range("a number >= 0 (0 is cross entropy)")
BELOW_ONE = Range("a number in [0, 1)", high=math.nextafter(1, 0))
ABOVE_ZERO = Range("a number > 0", above=True)
SEED = Range("a whole number from 0 to 4294967295", high=2**32 - 1)
_COUNT = Range("at least 1", low=1)
_STEPS = Range("optimizer steps >= 0")
_NONE_OR_MORE = Range("0 or more")
_DEGREES = Range("degrees in [0, 180]", high=180)
_STRENGTH = Range("a strength in [0, 10]", high=10)
_PIXELS = Range("pixels of a 512 px view in [0, 512]", high=512)
WIDEST_SIGMA = 128.0
"""Of Gaussian blur, pixels of a 512 px view: three of them fit into a view of any size."""

MODEL = {
    **dict.fromkeys(("dropout", "metadata_dropout"), PROBABILITY),
    **dict.fromkeys(("hidden_dim", "num_heads", "num_kv_heads"), _COUNT),
    "layer_decay": SOME,
    "backbone_lr_factor": FACTOR,
}
LOSS = {
    **dict.fromkeys(("focal", "consistency", "weather", "segmentation", "view_labels", "balance", "alpha"), WEIGHT),
    "gamma": FOCUS,
    "label_smoothing": BELOW_ONE,
    "temperature": ABOVE_ZERO,
    "view_supervision": SHARE,
    "consistency_ramp_steps": _STEPS,
}
OPTIMIZER = {
    **dict.fromkeys(("betas", "sophia_betas"), BELOW_ONE),
    **dict.fromkeys(("eps", "hessian_every", "sophia_rho"), ABOVE_ZERO),
    "weight_decay": FACTOR,
}
TRAINING = {
    **dict.fromkeys(("global_batch", "micro_batch", "learning_rate", "validate_every_epochs"), ABOVE_ZERO),
    **dict.fromkeys(("max_steps", "epochs", "validate_every_steps", "gc_every_steps"), _NONE_OR_MORE),
    **dict.fromkeys(("spike_factor", "patience"), _NONE_OR_MORE),
    "min_lr_ratio": SHARE,
    "warmup_steps": _STEPS,
    "grad_clip": Range("a norm >= 0 (0: no clipping)"),
    "ema_decay": BELOW_ONE,
    "image_every_steps": _STEPS,
}
DATA = {
    "workers": _NONE_OR_MORE,
    "prefetch": _COUNT,
    "window": ABOVE_ZERO,
    "bad_sample_budget": SHARE,
    "cache_gib": ABOVE_ZERO,
}
SECTIONS = {
    "data": DATA,
    "optimizer": OPTIMIZER,
    "training": TRAINING,
    "checkpoint": dict.fromkeys(("every_steps", "keep_every"), _NONE_OR_MORE),
    "folds": {
        **dict.fromkeys(("r", "copies", "epochs", "batch"), _COUNT),
        **dict.fromkeys(("lora_alpha", "learning_rate"), ABOVE_ZERO),
        **dict.fromkeys(("patience", "cache_gib"), _NONE_OR_MORE),
        **dict.fromkeys(("weight_decay", "augment_scale"), FACTOR),
    },
    "engine": {"timeout_s": ABOVE_ZERO, "threads": _NONE_OR_MORE},
    "lr_finder": {
        **dict.fromkeys(("start", "end", "divergence"), ABOVE_ZERO),
        "steps": _COUNT,
        "smoothing": BELOW_ONE,
    },
    "monitoring": {"ceiling_tflops": _NONE_OR_MORE},
    "predict": dict.fromkeys(("batch", "bootstrap", "max_train_features"), _COUNT),
    "pipeline": {"processes": _NONE_OR_MORE},
}
"""Of the options that no class checks by itself."""
AUGMENT = {
    "probability_scale": FACTOR,
    "magnitude_scale": Range("a factor in [0, 10]", high=10),
    "rotation_degrees": _DEGREES,
    "hue_degrees": _DEGREES,
    "perspective_scale": SHARE,
    "zoom_range": Range("factors in [0.05, 20]", low=0.05, high=20),
    **dict.fromkeys(("brightness", "contrast", "saturation"), _STRENGTH),
    **dict.fromkeys(("fog_density", "shadow_strength", "glare_strength", "noise_std"), SHARE),
    "motion_blur_pixels": _PIXELS,
    "gaussian_blur_sigma": Range("pixels of a 512 px view in [0, 128]", high=WIDEST_SIGMA),
}


def check_model(config: ModelConfig) -> None:
    """UserError for numbers and choices that no detector can be built or trained with."""
    check_section("model", config, MODEL)


def check_loss(config: LossConfig) -> None:
    """UserError for weights and shapes of the terms that are no loss."""
    check_section("loss", config, LOSS)
    if len(config.alpha) != 2:
        raise UserError(f"loss.alpha is {list(config.alpha)}; give two weights, of the negative and the positive class")


def check_augment(config: AugmentConfig) -> None:
    """UserError for probabilities and magnitudes that give no picture in [0, 1]."""
    chances = {name: PROBABILITY for name in vars(config) if name.endswith("_p")}
    check_section("augment", config, chances | AUGMENT)
    low, high = config.zoom_range
    if low > high:
        raise UserError(f"augment.zoom_range is {low}, {high}; give smallest <= largest")
    for name, widest in (("gaussian_blur_sigma", WIDEST_SIGMA), ("motion_blur_pixels", 512)):
        scaled = getattr(config, name) * config.magnitude_scale
        if scaled > widest:
            raise UserError(
                f"augment.{name} {getattr(config, name)} times augment.magnitude_scale {config.magnitude_scale} is "
                f"{scaled:g}; it must be at most {widest:g} pixels of a 512 px view"
            )


def check_section(section: str, config: object, ranges: dict[str, Range]) -> None:
    """UserError for the first option of a section that is no number, none of its choices, or out of its range."""
    for name, allowed in ranges.items():
        for value in _flat(getattr(config, name)):
            allowed.check(f"{section}.{name}", value)
    check_values(config, section)


def check_values(config: object, section: str = "") -> None:
    """UserError for the first NaN, or word that is none of a choice's, in a tree of options."""
    for name, hint, value in _leaves(config, section):
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{name} is {value!r}; allowed: {', '.join(map(str, get_args(hint)))}")
        if any(isinstance(number, float) and math.isnan(number) for number in _flat(value)):
            raise UserError(f"{name} is {value}; give a number")


def _leaves(config: Any, section: str) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = f"{section}.{field.name}".lstrip("."), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, name)
        else:
            yield name, hints[field.name], value


def _flat(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)
