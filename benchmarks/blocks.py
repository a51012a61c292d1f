"""The detector's own blocks beside transformers': `python -m benchmarks.blocks [--json] [--photos N] [--views N]`.

Forward and backward of the gated attention beside Qwen3-Next's and of the mixture of experts beside Qwen3-MoE's, with the
same weights, at the detector's default sizes: in bf16 on a GPU, in fp32 on a CPU (`gpu: false`). Of a reference the quickest
of its own backends counts. All take turns within each round; times are medians, and a speed-up above 1 says that ours is
quicker. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.references import qwen3_moe, qwen3_next_attention
from benchmarks.results import tell
from benchmarks.vit_block import milliseconds
from roadwork.config import ModelConfig

Step = Callable[[], list[Tensor]]
ATTENTION_BACKENDS = ("eager", "sdpa")
EXPERT_BACKENDS = ("eager", "grouped_mm")
STD = 0.02
"""Of the weights: about what a model begins with."""


def main() -> int:
    """Measure and print; the last line is one JSON object."""
    arguments = command_line().parse_args()
    tell(measure(arguments), arguments.json)
    return 0


def command_line() -> argparse.ArgumentParser:
    """The benchmark's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--views", type=int, default=12, help="views of a photo")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a turn")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    return parser


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    gpu = torch.cuda.is_available()
    figures: dict[str, Any] = {"gpu": gpu, "photos": arguments.photos, "views": arguments.views}
    dtype = torch.bfloat16 if gpu else torch.float32
    for name, steps in (("attention", attention(arguments, dtype)), ("moe", experts(arguments, dtype))):
        figures |= {f"{name}_{key}": value for key, value in turns(dict(steps), arguments).items()}
    return figures


def attention(arguments: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """Ours and Qwen3-Next's, without rotation, each a pass over [photos, views, hidden]."""
    c, x = ModelConfig(), tokens(arguments, dtype)
    shape = (arguments.photos, arguments.views, c.hidden_dim // c.num_heads)
    rotation = torch.ones(shape, dtype=dtype, device=x.device), torch.zeros(shape, dtype=dtype, device=x.device)
    for backend in ATTENTION_BACKENDS:
        torch.manual_seed(0)
        pair = qwen3_next_attention(c.hidden_dim, c.num_heads, c.num_kv_heads, backend, STD)
        reference, own = (block.to(x.device, dtype) for block in pair)
        yield backend, step(reference, partial(first, reference, position_embeddings=rotation, attention_mask=None), x)
    yield "ours", step(own, own, x)


def experts(arguments: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, Step]]:
    """Ours and Qwen3-MoE's, each a pass over [photos, views, hidden]."""
    c, x = ModelConfig(), tokens(arguments, dtype)
    for backend in EXPERT_BACKENDS:
        torch.manual_seed(0)
        pair = qwen3_moe(c.hidden_dim, c.expert_dim, c.num_experts, c.top_k, backend, STD)
        reference, own = (block.to(x.device, dtype) for block in pair)
        yield backend, step(reference, reference, x)
    yield "ours", step(own, partial(first, own), x)


def first(block: nn.Module, x: Tensor, **more: Any) -> Tensor:
    """The first of the several things that a block returns, shaped like x."""
    return cast("Tensor", block(x, **more)[0])


def tokens(arguments: argparse.Namespace, dtype: torch.dtype) -> Tensor:
    """[photos, views, hidden] on the device that is measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(1)
    return torch.randn(arguments.photos, arguments.views, ModelConfig().hidden_dim, dtype=dtype, device=device)


def step(block: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Step:
    """A forward and backward pass; returns the output and the gradient of the input, both shaped like x."""
    x = x.detach().requires_grad_()

    def run() -> list[Tensor]:
        out = call(x)
        block.zero_grad(set_to_none=True)
        x.grad = None
        out.backward(torch.ones_like(out))
        assert x.grad is not None
        return [out.detach(), x.grad]

    return run


def turns(steps: dict[str, Step], arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of each, how much quicker ours is than the quickest reference, and how far the answers differ."""
    answers = {name: run() for name, run in steps.items()}
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds):
        for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            spent[name].append(milliseconds(steps[name], arguments.steps))
    made = {f"{name}_ms": round(statistics.median(times), 3) for name, times in spent.items()}
    best = min((name for name in steps if name != "ours"), key=lambda name: statistics.median(spent[name]))
    ratios = [a / b for a, b in zip(spent[best], spent["ours"], strict=True)]
    apart = [(a - b).abs().max() / b.abs().max() for a, b in zip(answers["ours"], answers["eager"], strict=True)]
    return {**made, "speedup": round(statistics.median(ratios), 3), "difference": float(torch.stack(apart).max())}


if __name__ == "__main__":
    raise SystemExit(main())
