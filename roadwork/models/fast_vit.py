"""timm's DINOv3 ViT with fewer bytes moved: the same parameters, names and results.

A training step of a large ViT spends its time in matrix products, in attention, and in passes over the activations. The
products run near the device's limit, so what can be saved are passes. `use_fast_vit` changes the classes of modules in
place, as `roadwork.models.depthwise` does:

- patches are embedded by a matrix product (a convolution's weight gradient is slow where the kernel is the stride);
- rotary embedding is one expression per tensor, without slices and joins around the prefix tokens, in an order of
  dimensions that attention takes and gives back without a copy;
- layer scale is applied to the weights of the layer before it, which are smaller than its output and need no gradient
  per token.

What else a pass over the activations costs is left to the compiler, which fuses it (`benchmarks/vit_block.py` counts).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, Mlp, PatchEmbed, RotaryEmbeddingDinoV3, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn


class PatchProjection(nn.Conv2d):
    """nn.Conv2d whose kernel is its stride, as a matrix product; the same parameters, names and results."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        high, wide = self.kernel_size
        if input.dim() != 4 or input.shape[2] % high or input.shape[3] % wide:
            whole: Tensor = super()._conv_forward(input, weight, bias)
            return whole
        patches = input.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3), weight.flatten(1), bias).permute(0, 3, 1, 2)


class RotaryTable(RotaryEmbeddingDinoV3):
    """DINOv3's rotary embedding as `rotate` wants it, kept for each grid. It has no parameters."""

    prefix: int
    periods: Tensor
    tables: dict[tuple[int, int, torch.device, torch.dtype], Tensor]

    def get_embed(self, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Cosine, and sine with the sign of its term: [2, prefix + height * width, head_dim], fp32 unless `dtype`.

        Prefix tokens are turned by 0, so that no tensor is cut in two and joined again around them.
        """
        grid: Any = self.feat_shape if shape is None else shape
        height, width = grid
        key = (height, width, self.periods.device, self.periods.dtype)
        if (self.training and self.aug_active) or torch.compiler.is_compiling():  # drawn anew; or a graph's own tensor
            table = self._table(height, width)
        else:
            if key not in self.tables:
                with torch.inference_mode(False), torch.no_grad():
                    self.tables[key] = self._table(height, width)
            table = self.tables[key]
        return table if dtype is None else table.to(dtype)

    def _table(self, height: int, width: int) -> Tensor:
        return rotary_table(super().get_embed([height, width]), self.prefix, self.rotate_half)


def rotary_table(rope: Tensor, prefix: int, half: bool) -> Tensor:
    """timm's sine and cosine [N, 2 D] -> cosine, and sine with the sign of its term, [2, prefix + N, D]."""
    sine, cosine = rope.chunk(2, -1)
    columns = torch.arange(sine.shape[1], device=rope.device)
    first = columns < len(columns) // 2 if half else columns % 2 == 0
    rows = (0, 0, prefix, 0)
    return torch.stack((F.pad(cosine, rows, value=1.0), F.pad(torch.where(first, -sine, sine), rows)))


def rotate(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv 2104.09864) in the wider of both dtypes, rounded once.

    Args:
        x: [B, N, heads, D].
        table: [2, N, D] of `RotaryTable`.
        half: pairs are (i, i + D / 2); else (2 i, 2 i + 1).
    """
    cosine, sine = table[:, :, None].unbind()
    pairs, place = ((2, -1), -2) if half else ((-1, 2), -1)
    partner: Tensor = x.unflatten(-1, pairs).flip(place).flatten(-2)
    return (x * cosine + partner * sine).to(x.dtype)


def scaled_linear(layer: nn.Module, x: Tensor, scale: Tensor | None) -> Tensor:
    """scale * layer(x), x [..., D_in], scale [D_out] or None.

    In training the scale goes into a copy of the weights: the gradient of the layer's output is then that of the sum
    behind it, and neither a scaled gradient nor the unscaled output has to be written for every token. bf16 has the
    exponents of fp32, so a small scale loses nothing. What is not a plain nn.Linear (an adapter) is called.
    """
    if scale is None or type(layer) is not nn.Linear or not (torch.is_grad_enabled() and layer.weight.requires_grad):
        out: Tensor = layer(x)
        return out if scale is None else scale * out
    weight, bias = scale[:, None] * layer.weight, None if layer.bias is None else scale * layer.bias
    return F.linear(x, weight, bias)


class FastBlock(EvaBlock):
    """timm's EvaBlock; the same parameters, names and results."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x [B, N, D] -> [B, N, D]. `rope` is a table of `RotaryTable`; with timm's own the block is timm's."""
        if rope is not None and rope.shape[-1] != self.attn.head_dim:
            return super().forward(x, rope, attn_mask, is_causal)
        attended = attend(self.attn, self.norm1(x), rope, attn_mask, is_causal)
        attended = self.attn.proj_drop(scaled_linear(self.attn.proj, attended, self.gamma_1))
        x = x + self.drop_path1(attended)
        mlp = self.mlp
        made: Tensor = self.drop_path2(mlp.drop2(scaled_linear(mlp.fc2, hidden(mlp, self.norm2(x)), self.gamma_2)))
        return x + made


def attend(attn: Any, x: Tensor, rope: Tensor | None, mask: Tensor | None, is_causal: bool) -> Tensor:
    """timm's EvaAttention `attn` up to its output projection: [B, N, D] -> [B, N, heads * head_dim].

    Queries, keys and values stay in the order of the product, [B, N, heads, head_dim]: attention takes it by strides and
    answers in it, so that nothing is copied on either side.
    """
    qkv = attn.qkv
    if attn.q_bias is None:
        mixed = qkv(x)
    elif type(qkv) is nn.Linear:
        mixed = F.linear(x, qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
    else:
        mixed = qkv(x) + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    q, k, v = mixed.unflatten(-1, (3, attn.num_heads, attn.head_dim)).unbind(2)
    if rope is not None:
        q, k = rotate(q, rope, attn.rotate_half), rotate(k, rope, attn.rotate_half)
    answer = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=attn.attn_drop.p if attn.training else 0.0,
        is_causal=is_causal,
    )
    attended: Tensor = attn.norm(answer.transpose(1, 2).flatten(2))
    return attended


def hidden(mlp: SwiGLU | GluMlp | Mlp, x: Tensor) -> Tensor:
    """What timm's MLPs hand to their last layer, x [B, N, D]."""
    if isinstance(mlp, SwiGLU):
        made = mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x)
    elif isinstance(mlp, GluMlp):
        first, second = mlp.fc1(x).chunk(2, -1)
        made = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        made = mlp.act(mlp.fc1(x))
    normed: Tensor = mlp.norm(mlp.drop1(made))
    return normed


def use_fast_vit(net: nn.Module) -> int:
    """Change the modules of a timm net for which there is something faster, in place; returns how many."""
    found: list[tuple[nn.Module, type[nn.Module]]] = []
    for module in net.modules():
        if isinstance(module, PatchEmbed) and _is_matrix_product(module.proj):
            found.append((module.proj, PatchProjection))
    if isinstance(net, Eva):
        blocks = [block for block in net.blocks if _is_plain(block)]
        found += [(block, FastBlock) for block in blocks]
        whole = len(blocks) == len(net.blocks) and net.patch_drop is None
        if whole and type(net.rope) is RotaryEmbeddingDinoV3:
            rope: Any = net.rope
            rope.prefix, rope.tables = net.num_prefix_tokens, {}
            found.append((rope, RotaryTable))
    for module, faster in found:
        module.__class__ = faster
    return len(found)


def _is_matrix_product(conv: nn.Module) -> bool:
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == conv.stride
        and (conv.padding, conv.dilation, conv.groups) == ((0, 0), (1, 1), 1)
    )


def _is_plain(block: nn.Module) -> bool:
    """Whether a block consists of what `FastBlock` knows."""
    if type(block) is not EvaBlock:
        return False
    attn: nn.Module = block.attn
    if type(attn) is not EvaAttention:
        return False
    simple = type(attn.q_norm) is nn.Identity and type(attn.k_norm) is nn.Identity and attn.gate is None
    return simple and attn.qkv is not None and attn.fused_attn and type(block.mlp) in (SwiGLU, GluMlp, Mlp)
