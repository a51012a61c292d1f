"""Parameter groups: layer-wise learning rates, and no decay for what must not shrink."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from roadwork.models.backbone import Backbone

_NO_DECAY = re.compile(r"(^|\.)(null|seed|area|cls_token|reg_token|pos_embed|mask_token)(\.|$)|lora_magnitude_vector")


def no_decay(name: str, ndim: int) -> bool:
    """Norms, biases and other vectors, tokens, NULLs, seeds and DoRA magnitudes are not decayed."""
    return ndim <= 1 or _NO_DECAY.search(name) is not None


def lr_scales(model: nn.Module, layer_decay: float, backbone_factor: float) -> dict[int, float]:
    """id of each backbone parameter -> learning rate relative to the heads.

    The last unit and what follows it have `backbone_factor`, each unit before it `layer_decay` times that of the next,
    the stem one power more (Clark et al. 2020; Bao et al. 2022).
    """
    scales: dict[int, float] = {}
    for module in model.modules():
        if not isinstance(module, Backbone):
            continue
        depth = module.depth
        scales.update({id(p): backbone_factor * layer_decay**depth for p in module.parameters()})
        for i, unit in enumerate(module.units()):
            scales.update({id(p): backbone_factor * layer_decay ** (depth - 1 - i) for p in unit.parameters()})
        for tail in module._tail():
            scales.update({id(p): backbone_factor for p in tail.parameters()})
    return scales


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0, backbone_factor: float = 1.0
) -> list[dict[str, Any]]:
    """Trainable parameters, merged by (weight decay, learning-rate scale).

    Returns:
        Dicts with `params`, `weight_decay`, `lr` = learning_rate * lr_scale, `lr_scale` (for schedules) and `name`.
    """
    scales = lr_scales(model, layer_decay, backbone_factor)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if no_decay(name, parameter.ndim) else weight_decay
        scale = scales.get(id(parameter), 1.0)
        place = "heads" if id(parameter) not in scales else "backbone"
        group = groups.setdefault(
            (decay, scale),
            {
                "params": [],
                "weight_decay": decay,
                "lr": learning_rate * scale,
                "lr_scale": scale,
                "name": f"{place} x{scale:.3g}{'' if decay else ' no decay'}",
            },
        )
        group["params"].append(parameter)
    return list(groups.values())
