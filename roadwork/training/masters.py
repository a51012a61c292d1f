"""fp32 master weights and optimizer state of the trainable parameters, one view for ZeRO and for a plain optimizer.

ZeRO-2 keeps one flat fp32 tensor per parameter group on each rank (its partition). Everything that is shaped like that
flat (master, moments, curvature, average) is gathered to, and scattered from, whole tensors by parameter name, so a
checkpoint made of them knows no world size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roadwork.engine import Engine

BUCKET = 2**24
"""Elements that are gathered together: tensor by tensor, small ones would take as many round trips as large ones."""


class Masters:
    """Names, partitions and optimizer state behind a prepared model.

    Args:
        engine: the running engine.
        model: what `Engine.prepare` returned.
        optimizer: what `Engine.prepare` returned.
    """

    def __init__(self, engine: Engine, model: torch.nn.Module, optimizer: Any) -> None:
        self.engine = engine
        self.module = engine.accelerator.unwrap_model(model)
        self.parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._zero = engine.accelerator.deepspeed_engine_wrapped.engine.optimizer if engine.sharded else None
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer if self._zero else _unwrapped(optimizer)
        self._index = {id(p): i for i, p in enumerate(self.parameters.values())}

    def flats(self) -> list[Tensor]:
        """The fp32 masters that this rank owns: one flat [n] per group (ZeRO) or the parameters themselves."""
        if self._zero is not None:
            return list(self._zero.single_partition_of_fp32_groups)
        return list(self.parameters.values())

    @torch.no_grad()
    def squared_norm(self) -> Tensor:
        """Squared norm of the masters, fp64 []: this rank's share, so that the sum over ranks is the whole. No sync."""
        norms = torch.stack(torch._foreach_norm([flat.detach() for flat in self.flats()])).double()
        return norms.square().sum() / (1 if self._zero is not None else self.engine.world_size)

    def states(self) -> list[dict[str, Any]]:
        """Optimizer state of each of `flats()`; empty dictionaries before the first step."""
        return [self.optimizer.state[flat] for flat in self.flats()]

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, whose `lr` is read at the next step."""
        return self.optimizer.param_groups

    def gather(self, flats: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Names and whole fp32 tensors, shaped like the parameters, from tensors shaped like `flats()`. Collective: every
        process reads to the end. Some share their memory with others."""
        if self._zero is None:
            for name, parameter in self.parameters.items():
                yield name, flats[self._index[id(parameter)]].detach().float()
            return
        for names in _buckets({name: parameter.numel() for name, parameter in self.parameters.items()}):
            parts = [self.parameters[name] for name in names]
            bucket = torch.zeros(sum(p.numel() for p in parts), dtype=torch.float32, device=self.engine.device)
            wholes = bucket.split([p.numel() for p in parts])
            for parameter, whole in zip(parts, wholes, strict=True):
                for part, owned in self._fragments(parameter, flats):
                    whole[part] = owned.detach()
            if self.engine.world_size > 1:
                dist.all_reduce(bucket, group=self._zero.dp_process_group)
            for name, parameter, whole in zip(names, parts, wholes, strict=True):
                yield name, whole.view_as(parameter)

    def scatter(self, name: str, flats: list[Tensor], whole: Tensor) -> None:
        """Write this rank's part of a whole tensor into tensors shaped like `flats()`. Not collective.

        ValueError where the whole has another shape than the parameter `name`.
        """
        parameter = self.parameters[name]
        if whole.shape != parameter.shape:
            raise ValueError(f"{name}: shape {tuple(whole.shape)} given, {tuple(parameter.shape)} expected")
        with torch.no_grad():
            if self._zero is None:
                flats[self._index[id(parameter)]].copy_(whole)
                return
            flat_whole = whole.reshape(-1).to(self.engine.device, torch.float32)
            for part, owned in self._fragments(parameter, flats):
                owned.copy_(flat_whole[part])

    def _fragments(self, parameter: Tensor, flats: list[Tensor]) -> Iterator[tuple[slice, Tensor]]:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:  # this rank owns nothing of it
            return
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        owned = flats[mapping.param_group_index].data[high.start : high.start + high.numel]
        yield slice(low.start, low.start + low.numel), owned

    def publish(self) -> None:
        """Make the model compute with the masters (ZeRO: cast and gather them). Collective."""
        if self._zero is None:
            return
        self._zero.update_lp_params()
        for index in range(len(self._zero.bit16_groups)):
            self._zero._update_model_bit16_weights(index)

    def load(self, whole: dict[str, Tensor]) -> None:
        """Set every master from whole fp32 tensors and publish. Collective.

        Needed at the start, too: DeepSpeed clones its masters from weights that are already rounded to bf16.
        ValueError where one is missing, or not shaped like its parameter.
        """
        missing = set(self.parameters) - set(whole)
        if missing:
            raise ValueError(f"weights without {sorted(missing)[:3]} and {len(missing)} in all")
        flats = self.flats()
        for name in self.parameters:
            self.scatter(name, flats, whole[name])
        self.publish()

    @contextmanager
    def showing(self, whole: dict[str, Tensor] | None) -> Iterator[None]:
        """Let the model compute with other weights, such as the average, then with the masters again. Collective.

        whole: every parameter's, shaped like it, by name; None: nothing changes.
        """
        if whole is None:
            yield
            return
        kept = None if self._zero else {name: p.detach().clone() for name, p in self.parameters.items()}
        self._put(whole)
        try:
            yield
        finally:
            if kept is None:
                self.publish()
            else:
                self._put(kept)

    @torch.no_grad()
    def _put(self, whole: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(whole[name].to(parameter.dtype))

    @property
    def skipped(self) -> bool:
        """Whether the last optimizer step was skipped because a gradient was not finite."""
        return bool(self._zero.overflow) if self._zero is not None else False

    def gradient_norm(self) -> float | Tensor | None:
        """Global gradient norm of the last step before clipping, a scalar; None where the engine knows none."""
        if self._zero is None:
            return None
        norm: float | Tensor | None = self.engine.accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()
        return norm


def _buckets(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names in their order, so many together that their elements stay within BUCKET, at least one."""
    names: list[str] = []
    held = 0
    for name, size in sizes.items():
        if names and held + size > BUCKET:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
