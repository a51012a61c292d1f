"""DoRA adapters on the detector through peft: attach, save, and read back as the few weights that they change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from roadwork.config import FoldsConfig
from roadwork.errors import UserError
from roadwork.models.detector import RoadworkDetector

Overrides = dict[str, torch.Tensor]
"""Merged weights by parameter name: what an adapter changes, and nothing else."""


def lora_config(config: FoldsConfig) -> LoraConfig:
    """peft's configuration: DoRA (Liu et al. 2024, arXiv 2402.09353), no dropout (it would cost a matmul per layer)."""
    return LoraConfig(
        use_dora=True,
        r=config.r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # any number: it is only divided by r
        use_rslora=config.rslora,
        lora_dropout=0.0,
        target_modules=list(config.target_modules),
        modules_to_save=list(config.modules_to_save) or None,
    )


def attach(model: nn.Module, config: FoldsConfig) -> PeftModel:
    """Put fresh fp32 adapters on `model` IN PLACE and freeze the rest.

    Raises UserError, before anything is changed, where a target is not there, not of a kind that DoRA can adapt, or has
    an all-zero row of weights.
    """
    names = [name for name, _ in model.named_modules()]
    for target in [*config.target_modules, *config.modules_to_save]:
        if not any(_is_called(name, target) for name in names):
            linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
            raise UserError(
                f"folds: no module of the model ends with {target!r}; linear layers are, among others, "
                f"{', '.join(linear[-8:])}; set folds.target_modules or folds.modules_to_save"
            )
    _refuse_zero_rows(model, config.target_modules)
    try:
        return get_peft_model(model, lora_config(config))
    except (ValueError, TypeError) as error:
        raise UserError(f"folds: peft refuses these targets: {' '.join(str(error).split())[:300]}") from None


def _is_called(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _refuse_zero_rows(model: nn.Module, targets: Iterable[str]) -> None:
    """DoRA divides by the norm of each output's weights, as peft computes it: a zero would make every answer nan."""
    targets = list(targets)
    for name, part in model.named_modules():
        weight = getattr(part, "weight", None)
        if not (isinstance(weight, torch.Tensor) and weight.ndim >= 2 and any(_is_called(name, t) for t in targets)):
            continue
        zero = int((torch.linalg.vector_norm(weight.detach().flatten(1), dim=1) == 0).sum())
        if zero:
            raise UserError(
                f"folds: {zero} of the {len(weight)} outputs of {name} have weights that are all zero, by which DoRA "
                "would divide; take it out of folds.target_modules"
            )


def changed_names(model: nn.Module, folder: Path) -> list[str]:
    """Parameters of the plain `model` that the adapter in `folder` changes."""
    settings = LoraConfig.from_pretrained(str(folder))
    return _parameters_of(model, [*(settings.target_modules or []), *(settings.modules_to_save or [])])


def _parameters_of(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of the parameters in modules that are called so, or end so."""
    suffixes = tuple(f".{module.strip('.')}." for module in modules)
    return [name for name, _ in model.named_parameters() if any(suffix in f".{name}" for suffix in suffixes)]


def shared_units(model: RoadworkDetector, modules: Iterable[str]) -> int | None:
    """Backbone units that no adapted module (names or suffixes) changes; None: the whole encoder is left as it is."""
    units = [unit for name in _parameters_of(model, modules) if (unit := model.unit_of(name)) is not None]
    return min(units, default=None)


def merged_overrides(model: nn.Module, folder: Path) -> Overrides:
    """Weights of `model` with the adapter in `folder` merged, only the changed ones; `model` itself ends as it began.

    The merge is peft's own, and each weight is shaped like the model's. Raises UserError where the adapter does not fit
    the model.
    """
    original = dict(model.named_modules())
    names = set(changed_names(model, folder))
    before = {name: value.detach().clone() for name, value in model.named_parameters() if name in names}
    flags = {name: value.requires_grad for name, value in model.named_parameters()}
    try:
        merged = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
        found = {name: value.detach().clone() for name, value in merged.named_parameters() if name in names}
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} does not fit the model: {' '.join(str(error).split())[:300]}") from None
    finally:
        _restore(model, original, before, flags)
    return found


def _restore(
    model: nn.Module, modules: Mapping[str, nn.Module], values: Mapping[str, torch.Tensor], flags: Mapping[str, bool]
) -> None:
    """Undo what peft did in place: wrapped modules, merged weights, requires_grad."""
    for name, part in modules.items():
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], leaf, part)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
            parameter.requires_grad_(flags[name])


class _Call(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.model, method)(*args)


def call_with(model: nn.Module, overrides: Overrides, method: str, *args: Any) -> Any:
    """`model.method(*args)` with some weights, shaped like the model's, replaced for this call; nothing is copied."""
    if not overrides:
        return getattr(model, method)(*args)
    named = {f"model.{name}": value for name, value in overrides.items()}
    return functional_call(_Call(model), named, (method, *args), tie_weights=False)


def average(members: list[Overrides], base: Mapping[str, torch.Tensor]) -> Overrides:
    """Uniform average of the members' weights; a member that does not change a weight counts with the base's.

    Model soup, Wortsman et al. 2022, arXiv 2203.05482. Tensors are shaped like the base's, and keep its dtype.
    """
    names = sorted({name for member in members for name in member})
    return {
        name: torch.stack([member.get(name, base[name]).double() for member in members]).mean(0).to(base[name].dtype)
        for name in names
    }


@contextmanager
def replaced(model: nn.Module, overrides: Overrides) -> Iterator[nn.Module]:
    """The model with some weights, shaped like its own, replaced inside the block, and put back after it."""
    parameters = dict(model.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in overrides}
    with torch.no_grad():
        for name, value in overrides.items():
            parameters[name].copy_(value)
    try:
        yield model
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                parameters[name].copy_(value)


def file_digest(path: Path) -> str:
    """BLAKE2b of a file, hexadecimal: the identity of saved weights."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def state_digest(model: nn.Module) -> str:
    """BLAKE2b over every parameter and buffer of a model, by name, shape and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()
