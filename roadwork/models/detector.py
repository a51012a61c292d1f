"""The detector: views, their boxes and metadata in, decisions out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from roadwork.config import ModelConfig
from roadwork.config_ranges import check_model
from roadwork.data.views import MAX_VIEWS, check_view_size
from roadwork.errors import UserError
from roadwork.models.backbone import Backbone, compile_block
from roadwork.models.fusion import GatedFusion, Pyramid
from roadwork.models.layer import Layer
from roadwork.models.metadata import METADATA_DIM, MetadataEncoder
from roadwork.models.moe import MoE, balance_loss
from roadwork.models.norm import RMSNorm
from roadwork.models.outputs import Choice, Encoded, Outputs, Partial
from roadwork.models.pruning import ViewPruner, check_keep_ratio
from roadwork.models.saved import Saved
from roadwork.models.segmentation import SegmentationDecoder
from roadwork.models.slots import Slots
from roadwork.models.weights import Recipe, load, plan, resolve_backbone

ATTENTION_BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BOX_FREQUENCIES = 4
WEATHER_CLASSES = 8


def box_features(boxes: Tensor) -> Tensor:
    """Centre and size at several scales: fp32 [..., 4] fractions (x0, y0, x1, y1) -> fp32 [..., 4 + 8 * 4]."""
    x0, y0, x1, y1 = boxes.float().unbind(-1)
    place = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=-1)
    scales = math.pi * 2.0 ** torch.arange(BOX_FREQUENCIES, dtype=torch.float32, device=boxes.device)
    angles = (place[..., None] * scales).flatten(-2)
    return torch.cat([place, angles.sin(), angles.cos()], dim=-1)


class RoadworkDetector(Saved, nn.Module):
    """backbone -> view pruning -> projection -> layers of gated attention and experts -> pyramid -> fusion -> heads.

    Every head lives here, so that it is moved, optimised, averaged and saved with the rest. The same torch seed gives
    the same initial weights on every process.

    Args:
        config: shapes; `backbone` auto is resolved (and kept resolved in `self.config`).
        view_size: side S of the views in pixels.
        recipe: how to build the backbone, from a saved model; its weights are then NOT loaded here.
    """

    def __init__(self, config: ModelConfig, view_size: int, recipe: Recipe | None = None) -> None:
        super().__init__()
        check_model(config)
        name = resolve_backbone(config.backbone)
        self.config = config = dataclasses.replace(config, backbone=name)
        self.view_size, self.compiled = check_view_size(view_size), ""
        self.calibration: dict[str, float] | None = None
        fresh = recipe is None
        recipe = plan(name, config.weights) if recipe is None else recipe
        self.backbone = Backbone(recipe, self.view_size, config.trainable, config.activation_checkpointing)
        if fresh:
            recipe.origin = load(self.backbone.net, recipe, config.weights)
        self.prune_unit = self._prune_unit(config)
        self._build_heads(config)
        self._initialise()

    @property
    def weights_origin(self) -> str:
        """Where the backbone's weights come from."""
        return self.backbone.recipe.origin

    def _prune_unit(self, config: ModelConfig) -> int:
        depth = self.backbone.depth
        if config.prune_after != -1 and not 1 <= config.prune_after <= depth:
            raise UserError(
                f"model.prune_after is {config.prune_after}; {config.backbone} has 1 to {depth}, -1 for last"
            )
        check_keep_ratio(config.keep_ratio)
        return depth if config.prune_after == -1 else config.prune_after

    def _build_heads(self, config: ModelConfig) -> None:
        hidden, dim = config.hidden_dim, self.backbone.dim
        if hidden % 4:
            raise UserError(f"model.hidden_dim is {hidden}; give a multiple of 4 (the pyramid has H, H/2 and H/4)")
        for name in ("num_layers", "expert_dim", "segmentation_size"):
            if getattr(config, name) < 1:
                raise UserError(f"model.{name} is {getattr(config, name)}; give at least 1")
        low = self.backbone.unit_dims[self.prune_unit - 1]
        self.pruner = ViewPruner(low, config.keep_ratio) if config.keep_ratio < 1 else None
        self.view_norm = nn.LayerNorm(dim)
        self.projection = nn.Linear(dim, hidden)
        self.position = nn.Linear(4 + 8 * BOX_FREQUENCIES, hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.pyramid = Pyramid(hidden)
        self.fusion = GatedFusion(hidden, config.num_heads)
        self.metadata_encoder = (
            MetadataEncoder(config.metadata_fields, config.metadata_dropout) if config.metadata else None
        )
        width = hidden + (METADATA_DIM if config.metadata else 0)
        self.classifier = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, hidden // 2),
            nn.GELU(),
            nn.Linear(hidden // 2, 2),
        )
        self.view_norm_out = RMSNorm(hidden)
        self.view_head = nn.Linear(hidden, 2)
        self.weather_head = nn.Linear(hidden, WEATHER_CLASSES)
        self.segmentation = SegmentationDecoder(self.backbone.patch_dim, config.segmentation_size)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Variance-keeping inner layers, small residual branches, nearly even last layers; never an all-zero row."""
        residual = (2 * len(self.layers)) ** -0.5
        for name, module in self.named_modules():
            if name.startswith("backbone"):
                continue
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)
            elif isinstance(module, MoE):
                nn.init.normal_(module.gate_up_proj, std=module.gate_up_proj.shape[-1] ** -0.5)
                nn.init.normal_(module.down_proj, std=module.down_proj.shape[-1] ** -0.5 * residual)
        for layer in cast(list[Layer], list(self.layers)):
            nn.init.normal_(layer.moe.router.weight, std=0.01)
            layer.attention.out_proj.weight.mul_(residual)
            layer.attention.gate_proj.weight.mul_(0.5)
        self.position.weight.mul_(0.5)
        nn.init.normal_(self.fusion.seed, std=0.02)
        last: list[Any] = [self.classifier[-1], self.view_head, self.weather_head, self.fusion.importance_net[-1]]
        for module in last if self.pruner is None else [*last, self.pruner.net[-1]]:
            nn.init.normal_(module.weight, std=0.01)
        nn.init.normal_(self.segmentation.out.weight, std=0.01)
        bias = cast(Tensor, self.segmentation.out.bias)
        bias.fill_(-2.0)  # objects cover few pixels
        if self.metadata_encoder is not None:
            for null in self.metadata_encoder.null.values():
                nn.init.normal_(null, std=0.5)

    # ----- forward

    def forward(
        self,
        views: Tensor,
        view_mask: Tensor | None = None,
        metadata: Mapping[str, Tensor] | None = None,
        boxes: Tensor | None = None,
        segmentation: bool = True,
    ) -> Outputs:
        """Decide about a batch of photos.

        Args:
            views: [B, V, 3, S, S] in [0, 1], float; or uint8. S a multiple of the backbone's patch.
            view_mask: bool [B, V], False for padding, on the CPU or the views' device (on the CPU padding is skipped
                even where the views are on a GPU). None: all views are there. A photo without any counts view 0.
            metadata: see `MetadataEncoder`; None: image only.
            boxes: [B, V, 4] fractions of the photo (x0, y0, x1, y1); None: each view is the whole photo.
            segmentation: predict masks.

        Returns:
            Outputs; results do not depend on the padding or on the other photos of the batch.
        """
        return self.decide(self.encode(views, view_mask, boxes, segmentation), metadata, segmentation)

    def encode(
        self,
        views: Tensor,
        view_mask: Tensor | None = None,
        boxes: Tensor | None = None,
        segmentation: bool = True,
    ) -> Encoded:
        """Everything before the first layer; views [B, V, 3, S, S] and the rest as in `forward`.

        Without `segmentation`, no patch tokens.
        """
        return self.complete(self.begin(views, view_mask, boxes), segmentation)

    def begin(self, views: Tensor, view_mask: Tensor | None = None, boxes: Tensor | None = None) -> Partial:
        """What `encode` has before the backbone's first unit; views [B, V, 3, S, S] and the rest as in `forward`."""
        mask, boxes = self._check(views, view_mask, boxes)
        slots = Slots.of(mask, views.device)
        if slots.index is None and not Slots.full(mask):
            views = _zeroed(views, mask)  # what padding holds would reach the weights' gradients as 0 * NaN
        return Partial(self.backbone.begin(slots.pack(views)), 0, slots, mask, slots.pack(boxes))

    def advance(self, partial: Partial, unit: int) -> Partial:
        """The same before a later unit of the backbone; views are pruned on the way, once their depth is passed."""
        if partial.choice is None and unit > self.prune_unit:
            partial = self._prune(self._run(partial, self.prune_unit))
        return self._run(partial, unit)

    def complete(self, partial: Partial, segmentation: bool = True) -> Encoded:
        """The encoder's output from wherever `partial` stands."""
        partial = self.advance(partial, self.backbone.depth)
        partial = self._prune(partial) if partial.choice is None else partial
        choice, slots = cast(Choice, partial.choice), partial.slots
        with self._attention():
            vectors, patches = self.backbone.finish(partial.state, segmentation)
        vectors = self.view_norm(vectors)
        if self.pruner is not None:
            gate = torch.sigmoid(slots.pack(choice.scores.gather(1, choice.kept)))
            vectors = vectors * gate[:, None].to(vectors.dtype)
        tokens = self.projection(vectors) + self.position(box_features(partial.boxes).to(vectors.dtype))
        return Encoded(
            tokens=_zeroed(slots.unpack(tokens), partial.mask),
            view_mask=partial.mask.to(tokens.device),
            kept=choice.kept,
            scores=choice.scores,
            low=choice.low,
            patches=None if patches is None else slots.unpack(patches),
            boxes=slots.unpack(partial.boxes),
        )

    def _run(self, partial: Partial, unit: int) -> Partial:
        with self._attention():
            state = self.backbone.run(partial.state, partial.unit, unit)
        return dataclasses.replace(partial, state=state, unit=unit)

    def _prune(self, partial: Partial) -> Partial:
        """Keep the best views; all of them without a pruner."""
        mask, slots, device = partial.mask, partial.slots, partial.boxes.device
        low = self.backbone.vectors(partial.state)
        there = mask.to(device)
        weights = (there / there.sum(1, keepdim=True)).to(low.dtype)
        mean = torch.einsum("bv,bvd->bd", weights, _zeroed(slots.unpack(low), mask))
        if self.pruner is None:
            kept = torch.arange(mask.shape[1], device=device).expand(mask.shape)
            scores = torch.zeros(mask.shape, device=device)
            return dataclasses.replace(partial, choice=Choice(kept, scores, mean))
        scores = slots.unpack(self.pruner.score(low, partial.boxes))
        kept, kept_mask = self.pruner.choose(scores, mask)
        kept_slots = Slots.of(kept_mask, device)
        rows = slots.rows(kept, kept_slots)
        state, boxes = partial.state.rows(rows), partial.boxes[rows]
        return Partial(state, partial.unit, kept_slots, kept_mask, boxes, Choice(kept, scores, mean))

    def unit_of(self, name: str) -> int | None:
        """Backbone units that are done when a module or parameter of this name is first used; None: after `encode`."""
        part, _, rest = name.partition(".")
        if part == "backbone":
            return self.backbone.unit_of(rest)
        if part == "pruner":
            return self.prune_unit
        return self.backbone.depth if part in ("view_norm", "projection", "position") else None

    def decide(
        self, encoded: Encoded, metadata: Mapping[str, Tensor] | None = None, segmentation: bool = True
    ) -> Outputs:
        """Everything from the first layer on, of B photos; without `segmentation` (or patch tokens) no masks.

        metadata: tensors [B, ...], see `MetadataEncoder`; None: image only.
        """
        mask, x = encoded.view_mask, encoded.tokens.to(self.projection.weight.dtype)
        stats = []
        with self._attention():
            for layer in self.layers:
                x, layer_stats = layer(x, mask)
                stats.append(layer_stats)
        balance, load = balance_loss(torch.stack(stats), self.config.num_experts, everywhere=self.training)
        x = _zeroed(self.pyramid(x), mask)
        fused, attention = self.fusion(x, mask)
        joined = fused
        if self.metadata_encoder is not None:
            joined = torch.cat([fused, self.metadata_encoder(metadata, fused.shape[0])], dim=-1)
        middle = mask / mask.sum(1, keepdim=True)
        return Outputs(
            logits=self.classifier(joined).float(),
            view_logits=self.view_head(self.view_norm_out(x)).float(),
            view_mask=mask,
            kept=encoded.kept,
            weather_logits=self.weather_head(fused).float(),
            seg_logits=self._masks(encoded) if segmentation else None,
            features=fused,
            view_features=x,
            depth_features=(
                encoded.low,
                torch.einsum("bk,bkd->bd", middle.to(x.dtype), encoded.tokens.to(x.dtype)),
                fused,
            ),
            balance=balance,
            expert_load=load,
            scores=encoded.scores,
            attention=attention,
        )

    def _masks(self, encoded: Encoded) -> Tensor | None:
        if encoded.patches is None:
            return None
        slots = Slots.of(encoded.view_mask, encoded.patches.device)
        logits = self.segmentation(slots.pack(encoded.patches).to(self.projection.weight.dtype)).float()
        return _zeroed(slots.unpack(logits), encoded.view_mask)

    # ----- checks and options

    def _check(self, views: Tensor, mask: Tensor | None, boxes: Tensor | None) -> tuple[Tensor, Tensor]:
        """One clear ValueError for each wrong input; the mask with a view per photo, and fp32 boxes."""
        if not isinstance(views, Tensor):
            raise ValueError(f"views are {type(views).__name__}; expected a tensor [B, V, 3, S, S]")
        if views.dim() != 5 or views.shape[2] != 3 or views.shape[3] != views.shape[4] or 0 in views.shape:
            raise ValueError(f"views have shape {tuple(views.shape)}; expected [B, V, 3, S, S] with B and V at least 1")
        if views.shape[1] > MAX_VIEWS:
            raise ValueError(f"{views.shape[1]} views of a photo; at most {MAX_VIEWS} are allowed")
        if not (views.is_floating_point() or views.dtype == torch.uint8):
            raise ValueError(f"views are {views.dtype}; expected floats in [0, 1] or uint8")
        self.backbone.check_size(*views.shape[-2:])
        grid = tuple(views.shape[:2])
        if mask is None:
            mask = torch.ones(grid, dtype=torch.bool)
        if not isinstance(mask, Tensor) or tuple(mask.shape) != grid or mask.dtype != torch.bool:
            given = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"view_mask is {given}; expected bool {grid}")
        first = torch.arange(grid[1], device=mask.device) == 0
        mask = mask | (first & ~mask.any(1, keepdim=True))
        _check_range(views, mask)
        if boxes is None:
            boxes = torch.zeros(*grid, 4, device=views.device)
            boxes[..., 2:] = 1.0
        _check_boxes(boxes, mask)
        return mask, _zeroed(boxes.to(views.device, torch.float32), mask)

    def _attention(self) -> AbstractContextManager[Any]:
        backend = ATTENTION_BACKENDS[self.config.attention]
        return nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH])

    def compile_blocks(self, **options: Any) -> int:
        """torch.compile each block in place (whole-model compilation takes ten times longer and gains nothing).

        Parameter names do not change. The numbers of photos and views are marked as varying, so that batches with other
        numbers do not compile again. `options` go to torch.compile, in place of `config.compile_mode` if any is given.
        Returns the number of compiled blocks.
        """
        if not options and self.config.compile_mode != "default":
            options = {"mode": self.config.compile_mode}
        inner = self.backbone.blocks()
        for block in inner:
            compile_block(block, 0, **options)
        for layer in self.layers:
            compile_block(layer, 0, 1, **options)
        count = len(inner) + len(self.layers)
        # Blocks of one class share their code, and every width and mode counts: past the limit torch leaves them uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * count)
        self.compiled, self.backbone.compiled = str(options.get("mode") or "default"), True
        return count

    def _attention_in_use(self) -> str:
        """Kernels that torch takes on this device and in this dtype: over views, masked as `decide` does, and in a ViT."""
        weight, attention = self.projection.weight, cast(Layer, self.layers[0]).attention
        views = weight.new_empty(1, attention.num_heads, MAX_VIEWS, attention.head_dim)
        there = torch.ones(1, 1, 1, MAX_VIEWS, dtype=torch.bool, device=weight.device)
        asked: dict[str, tuple[Tensor, Tensor | None]] = {"views": (views, there)}
        if (shape := self.backbone.attention_shape(self.view_size)) is not None:
            asked["backbone"] = (weight.new_empty(1, *shape), None)
        with self._attention():
            used = {
                part: SDPBackend(torch._fused_sdp_choice(q, q, q, attn_mask=mask)) for part, (q, mask) in asked.items()
            }
        return ", ".join(f"{part} {kernel.name.removesuffix('_ATTENTION').lower()}" for part, kernel in used.items())

    def runtime(self) -> dict[str, str]:
        """The options in use, for logs: attention backend, compilation, dtype, recomputation, origin of the weights."""
        return {
            "backbone": self.config.backbone,
            "weights": self.weights_origin,
            "attention": f"{self.config.attention} ({self._attention_in_use()})",
            "compile": f"per block, {self.compiled}" if self.compiled else "off",
            "dtype": str(self.projection.weight.dtype).removeprefix("torch."),
            "activation_checkpointing": "on" if self.config.activation_checkpointing else "off",
            "trainable": self.config.trainable,
        }


def _check_range(views: Tensor, mask: Tensor) -> None:
    """ValueError for floats outside [0, 1] in views that are there; on the host only: a GPU would have to wait."""
    if views.device.type != "cpu" or not views.is_floating_point() or torch.compiler.is_exporting():
        return
    low, high = map(float, views.detach().aminmax())  # a NaN is both
    if not -0.01 <= low <= high <= 1.01:  # rarely: padding may hold anything
        low, high = map(float, views.detach()[mask.cpu()].aminmax())
    if not -0.01 <= low <= high <= 1.01:
        raise ValueError(f"views range from {low:.3g} to {high:.3g}; expected [0, 1], the model normalises itself")


def _check_boxes(boxes: Tensor, mask: Tensor) -> None:
    """ValueError for boxes that are not [B, V, 4] fractions; values of the views that are there, on the host only."""
    if not isinstance(boxes, Tensor):
        raise ValueError(f"boxes are {type(boxes).__name__}; expected a tensor of floats {(*mask.shape, 4)}")
    if tuple(boxes.shape) != (*mask.shape, 4) or not boxes.is_floating_point():
        raise ValueError(f"boxes are {boxes.dtype} {tuple(boxes.shape)}; expected floats {(*mask.shape, 4)}")
    if boxes.device.type != "cpu" or mask.device.type != "cpu" or torch.compiler.is_exporting():
        return
    there = boxes.detach()[mask]
    right = (there >= -0.01).all(1) & (there <= 1.01).all(1) & (there[:, 2:] >= there[:, :2]).all(1)
    if not bool(right.all()):  # a NaN is no fraction either
        raise ValueError(
            f"a box is {[round(float(edge), 4) for edge in there[~right][0]]}; expected fractions of the photo "
            f"(x0, y0, x1, y1) with x0 <= x1 and y0 <= y1"
        )


def _zeroed(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros in padded slots; x [B, K, ...], mask [B, K] on any device."""
    there = mask.to(x.device)
    return x.masked_fill(~there.view(*there.shape, *[1] * (x.dim() - 2)), 0.0)
