"""timm backbones in stages, so that views can be pruned on the way."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from roadwork.errors import UserError
from roadwork.models.cpu_units import CpuUnits, compute_dtype
from roadwork.models.depthwise import use_fast_depthwise
from roadwork.models.fixed_norm import fix_statistics
from roadwork.models.weights import Recipe, create, is_vit


@dataclass
class State:
    """Activations between two stages, and what later stages need."""

    x: Tensor
    """ViT: tokens [N, prefix + h * w, D]; convolutional: map [N, C, h, w]."""
    rope: Tensor | None = None
    grid: tuple[int, int] = (0, 0)
    patches: Tensor | None = None
    """Convolutional: the stride-16 map, once passed."""

    def rows(self, index: Tensor) -> State:
        """The same for some of the views."""
        patches = None if self.patches is None else self.patches[index]
        return State(self.x[index], self.rope, self.grid, patches)


@functools.lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device) -> Tensor:
    """fp32 [1, C, 1, 1]. Not a buffer: casting the module to bf16 would round it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def compile_block(block: nn.Module, *dims: int, **options: Any) -> None:
    """torch.compile a module in place, for tensors whose sizes `dims` vary from call to call (1 stays a size of its own).

    The sizes are marked on whatever the module is called with: also within a stage of a convolutional net, where the
    tensors are timm's. It must happen outside of the compiled call, so a hook (which is compiled too) comes too late.
    """
    block.compile(**options)
    compiled = block._compiled_call_impl
    assert compiled is not None  # compile() has just set it

    @functools.wraps(compiled)
    def call(*tensors: Any, **more: Any) -> Any:
        for tensor in tensors:
            for dim in dims:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)
        return compiled(*tensors, **more)

    block._compiled_call_impl = call


class Backbone(nn.Module):
    """A timm ViT (VisionTransformer, Eva with DINOv3) or convolutional net.

    Convolutional families: EfficientNet, MobileNetV3, ConvNeXt, ResNet, RegNet. ViT: the view's vector is the
    normalised class token (mean of the patch tokens where there is none), its patch tokens are the normalised ones.
    Convolutional: the vector is what the classifier would get, the patch tokens are the last map of stride 16 or less.
    A unit is a block of a ViT, a stage of a convolutional net.

    Frozen parts have no gradients and stay in eval mode under `.train()`. Batch norms ALWAYS stay in eval mode, also in
    full training: batches are small and differ between processes, and the engine averages no buffers.

    Args:
        recipe: name, normalisation and arguments of the net.
        view_size: side of the views in pixels.
        trainable: `frozen`, `last-N` units (with the final norm or convolution) or `full`.
        checkpointing: recompute each unit in the backward pass.
    """

    net: Any

    def __init__(self, recipe: Recipe, view_size: int, trainable: str = "full", checkpointing: bool = False) -> None:
        super().__init__()
        self.recipe, self.compiled = recipe, False
        self._cpu_units = CpuUnits()
        self.net = create(recipe, view_size)
        fix_statistics(self.net)
        self.vit = is_vit(recipe.name)
        self.checkpointing = checkpointing
        use_fast_depthwise(self.net)
        self._measure(view_size)
        self.trainable_units = self._trainable_units(trainable)
        self.full = trainable == "full"
        trained = {id(p) for module in self._trained() for p in module.parameters()}
        for parameter in self.net.parameters():
            parameter.requires_grad_(self.full or id(parameter) in trained)

    # ----- structure

    def units(self) -> list[nn.Module]:
        """Blocks of a ViT, stages of a convolutional net, in order; UserError for a net that has neither."""
        for names in (("blocks",), ("stages",), ("layer1", "layer2", "layer3", "layer4"), ("s1", "s2", "s3", "s4")):
            if all(hasattr(self.net, name) for name in names):
                found = [getattr(self.net, name) for name in names]
                return list(found[0].children()) if len(found) == 1 else found
        raise self._unsupported()

    def _unsupported(self) -> UserError:
        return UserError(
            f"model.backbone {self.recipe.name!r} is of an unsupported family; use a ViT (vision_transformer, eva) "
            f"or an EfficientNet, MobileNetV3, ConvNeXt, ResNet or RegNet"
        )

    def blocks(self) -> list[nn.Module]:
        """The modules worth compiling one by one: a ViT's blocks, the blocks within a convolutional net's stages."""
        if self.vit:
            return self.units()
        found: list[nn.Module] = []
        for unit in self.units():
            inner = getattr(unit, "blocks", unit)
            found += list(inner.children()) or [unit]
        return found

    def _stem(self) -> list[nn.Module]:
        names = [("conv_stem", "bn1"), ("stem",), ("conv1", "bn1", "act1", "maxpool")]
        for group in names:
            if all(hasattr(self.net, name) for name in group):
                return [getattr(self.net, name) for name in group]
        raise self._unsupported()

    def _tail(self) -> list[nn.Module]:
        """Modules after the last unit."""
        names = ("norm", "fc_norm") if self.vit else ("norm_pre", "final_conv", "conv_head", "bn2", "norm_head", "head")
        return [m for name in names if isinstance(m := getattr(self.net, name, None), nn.Module)]

    @property
    def depth(self) -> int:
        """Number of units."""
        return len(self.units())

    def unit_of(self, name: str) -> int:
        """Units that are done when a module or parameter (by its name in here) is first used: 0 for the stem."""
        places = {id(module): number for number, module in enumerate(self.units())}
        places |= {id(module): self.depth for module in self._tail()}
        for path, module in self.named_modules():
            if id(module) in places and f"{name}.".startswith(f"{path}."):
                return places[id(module)]
        return 0

    def _measure(self, view_size: int) -> None:
        """Widths per unit and strides: by name for a ViT, by a small forward pass for a convolutional net (which also
        proves that its stages, put together here, are what timm computes)."""
        self.unit_dims: list[int]
        if self.vit:
            patch = self.net.patch_embed.patch_size
            self.stride = int(patch[0])
            self.check_size(view_size, view_size)
            self.dim = self.patch_dim = int(self.net.embed_dim)
            self.unit_dims = [self.dim] * self.depth
            self.patch_unit = self.depth - 1
            return
        self.stride, side = 1, max(64, min(view_size, 128))
        self.unit_dims, strides = [], []
        was = self.net.training
        self.net.eval()
        with torch.no_grad():
            x = pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
            for module in self._stem():
                x = module(x)
            for unit in self.units():
                x = unit(x)
                self.unit_dims.append(int(x.shape[1]))
                strides.append(side // x.shape[-1])
            x = self._head_map(x)
            if not torch.equal(x, self.net.forward_features(pixels)):
                raise self._unsupported()
            self.dim = int(self._pool(x).shape[1])
        self.net.train(was)
        self.patch_unit = max((i for i, s in enumerate(strides) if s <= 16), default=0)
        self.patch_dim = self.unit_dims[self.patch_unit]

    def check_size(self, height: int, width: int) -> None:
        """UserError for a view that the net cannot take."""
        if height % self.stride or width % self.stride or min(height, width) < self.stride:
            below = max(height // self.stride, 1) * self.stride
            raise UserError(
                f"views of {height}x{width} px do not suit {self.recipe.name}: its patches have {self.stride} px; "
                f"use a multiple such as {below} or {below + self.stride}"
            )

    def attention_shape(self, view_size: int) -> tuple[int, int, int] | None:
        """Heads, tokens and width of a head in a ViT's blocks; None where torch's attention is not called."""
        attn: Any = getattr(self.units()[0], "attn", None)
        if not self.vit or not getattr(attn, "fused_attn", False):
            return None
        return attn.num_heads, self.net.num_prefix_tokens + (view_size // self.stride) ** 2, attn.head_dim

    # ----- training and freezing

    def _trainable_units(self, trainable: str) -> int:
        if trainable == "full":
            return self.depth
        if trainable == "frozen":
            return 0
        match = re.fullmatch(r"last-(\d+)", trainable)
        if not match or not 1 <= int(match[1]) <= self.depth:
            raise UserError(f"model.trainable is {trainable!r}; give frozen, full, or last-1 to last-{self.depth}")
        return int(match[1])

    def _trained(self) -> list[nn.Module]:
        if not self.trainable_units:
            return []
        return [*self.units()[self.depth - self.trainable_units :], *self._tail()]

    def train(self, mode: bool = True) -> Backbone:
        """Frozen parts and batch norms stay in eval mode."""
        super().train(mode)
        if mode:
            if not self.full:
                self.net.eval()
                for module in self._trained():
                    module.train()
            for module in self.net.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    # ----- forward, in stages

    def begin(self, views: Tensor) -> State:
        """Views [N, 3, S, S] in [0, 1] (or uint8) -> state before the first unit."""
        self.check_size(views.shape[-2], views.shape[-1])
        parameter = next(self.net.parameters())
        scale = 255.0 if views.dtype == torch.uint8 else 1.0
        mean, std = (_constant(v, views.device) for v in (self.recipe.mean, self.recipe.std))
        x = (views.float() / scale - mean) / std
        if not self.vit:
            x = x.to(self._compute_dtype(x) or parameter.dtype)
            return State(self._through(self._stem(), x.contiguous(memory_format=torch.channels_last)))
        x = x.to(parameter.dtype)
        grid = (views.shape[-2] // self.stride, views.shape[-1] // self.stride)
        net = self.net
        embedded = net._pos_embed(net.patch_embed(x))
        rope = None
        if isinstance(embedded, tuple):
            embedded, rope = embedded
        if isinstance(getattr(net, "norm_pre", None), nn.Module):
            embedded = net.norm_pre(embedded)
        return State(embedded, rope, grid)

    @torch.no_grad()
    def state_of(self, x: Tensor, view_size: int) -> State:
        """The state between two units of which only the activations are known: the rest depends on the size of the views.

        x: as `State.x`, [N, ...]; view_size: pixels.
        """
        if not self.vit:
            return State(x)
        return dataclasses.replace(self.begin(x.new_zeros(1, 3, view_size, view_size)), x=x)

    def _compute_dtype(self, x: Tensor) -> torch.dtype | None:
        return None if self.vit or self.compiled else compute_dtype(next(self.net.parameters()), x.device)

    def _through(self, modules: Sequence[nn.Module], x: Tensor) -> Tensor:
        """A map through parts of a convolutional net, in the dtype that it came in."""
        dtype = self._compute_dtype(x)
        if dtype is not None:
            return self._cpu_units(modules, x, dtype)
        for module in modules:
            x = module(x)
        return x

    def run(self, state: State, start: int, stop: int) -> State:
        """Units start to stop - 1."""
        x, patches = state.x, state.patches
        remember = self.checkpointing and self.training and torch.is_grad_enabled()
        mixed = bool(getattr(self.net, "rope_mixed", False))
        for i, unit in enumerate(self.units()[start:stop], start):
            arguments: dict[str, Any] = {}
            if state.rope is not None:
                arguments["rope"] = state.rope[i] if mixed else state.rope
            through: Callable[..., Tensor] = unit if self.vit else functools.partial(self._through, [unit])
            if remember and any(p.requires_grad for p in unit.parameters()):
                x = checkpoint(through, x, use_reentrant=False, **arguments)
            else:
                x = through(x, **arguments)
            if not self.vit and i == self.patch_unit:
                patches = x
        return State(x, state.rope, state.grid, patches)

    def vectors(self, state: State) -> Tensor:
        """One vector per view between two units: class token or mean, [N, D]."""
        if self.vit:
            return state.x[:, 0] if self._has_class_token() else state.x.mean(1)
        return state.x.mean((2, 3)).to(self._dtype)

    def finish(self, state: State, with_patches: bool = True) -> tuple[Tensor, Tensor | None]:
        """State after the last unit -> view vectors [N, D] and patch tokens as a map [N, C, h, w]."""
        if not self.vit:
            vector, map_ = self._pool(self._head_map(state.x)), state.patches if with_patches else None
            return vector.to(self._dtype), None if map_ is None else map_.to(self._dtype)
        prefix = self.net.num_prefix_tokens
        if not with_patches and self._has_class_token():
            return self.net.norm(state.x[:, :1])[:, 0], None
        x = self.net.norm(state.x)
        patches, late = x[:, prefix:], self.net.fc_norm  # some nets without a class token normalise behind the mean
        vector = x[:, 0] if self._has_class_token() else late(patches.mean(1))
        if not with_patches:
            return vector, None
        return vector, late(patches).transpose(1, 2).unflatten(2, state.grid)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor | None]:
        """Views [N, 3, S, S] -> vectors [N, D] and patch map [N, C, h, w], without pruning."""
        return self.finish(self.run(self.begin(views), 0, self.depth))

    @property
    def _dtype(self) -> torch.dtype:
        """Of the weights, and of what leaves the backbone."""
        dtype: torch.dtype = next(self.net.parameters()).dtype
        return dtype

    def _has_class_token(self) -> bool:
        return getattr(self.net, "cls_token", None) is not None

    def _head_map(self, x: Tensor) -> Tensor:
        names: Sequence[str] = ("norm_pre", "final_conv")
        if type(self.net).__name__ == "EfficientNet":
            names = ("conv_head", "bn2")
        return self._through([m for name in names if isinstance(m := getattr(self.net, name, None), nn.Module)], x)

    def _pool(self, x: Tensor) -> Tensor:
        vector: Tensor = self.net.forward_head(x, pre_logits=True)
        return vector.flatten(1)
