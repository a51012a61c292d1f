"""A block of DINOv3's ViT, timm's own and ours: `python -m benchmarks.vit_block [--json] [--dim N ...]`.

Forward and backward of one SwiGLU block with rotary embedding, eager and compiled. The two take turns within each round;
times are medians, speed-ups medians of each round's ratio. Of the compiled block it also counts the kernels that the
compiler generates and the bytes that they read and write by the compiler's own account: all but matrix products and
attention, which both blocks share. On a GPU the shape is a block of ViT-H+ on 24 views of 512 px in bf16; on a CPU a small
one in fp32, with `gpu: false`. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm, RotaryEmbeddingDinoV3
from timm.models.eva import EvaBlock
from torch import Tensor, nn
from torch._inductor import metrics

from benchmarks.results import tell
from roadwork.models.fast_vit import FastBlock, rotary_table

Step = Callable[[], list[Tensor]]
PREFIX = 5
"""Class token and registers."""


def main() -> int:
    """Measure and print; the last line is one JSON object."""
    arguments = command_line().parse_args()
    tell(measure(arguments), arguments.json)
    return 0


def command_line() -> argparse.ArgumentParser:
    """The benchmark's options."""
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=24 if gpu else 4)
    parser.add_argument("--grid", type=int, default=32 if gpu else 8, help="patches along a side of a view")
    parser.add_argument("--dim", type=int, default=1280 if gpu else 192)
    parser.add_argument("--heads", type=int, default=20 if gpu else 3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16" if gpu else "float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20 if gpu else 5, help="timed steps of a turn")
    parser.add_argument("--json", action="store_true", help="only the JSON line")
    return parser


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    steps = {name: step(block, x, rope) for name, (block, x, rope) in blocks(arguments, device).items()}
    pairs = [(a - b).abs().max() / a.abs().max() for a, b in zip(steps["timm"](), steps["fast"](), strict=True)]
    figures: dict[str, Any] = {
        "gpu": gpu,
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "dtype": arguments.dtype,
        "tokens": arguments.views * (arguments.grid**2 + PREFIX),
        "dim": arguments.dim,
        "largest_difference": float(torch.stack(pairs).max()),
        **turns("eager", steps, arguments),
    }
    compiled = {}
    for name, (block, x, rope) in blocks(arguments, device).items():
        block.compile()
        compiled[name] = step(block, x, rope)
        figures |= {f"{name}_{key}": value for key, value in generated(compiled[name]).items()}
    return figures | turns("compiled", compiled, arguments)


def blocks(arguments: argparse.Namespace, device: torch.device) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """timm's block and ours with the same weights, each with its input [views, tokens, dim] and its rotary
    table."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    timms = EvaBlock(
        arguments.dim, arguments.heads, qkv_bias=False, swiglu_mlp=True, swiglu_align_to=8, init_values=1e-5,
        rotate_half=True, num_prefix_tokens=PREFIX, norm_layer=partial(LayerNorm, eps=1e-5),
    ).to(device, dtype)  # fmt: skip
    fast = copy.deepcopy(timms)
    fast.__class__ = FastBlock
    rope = RotaryEmbeddingDinoV3(arguments.dim // arguments.heads, rotate_half=True).get_embed([arguments.grid] * 2)
    x = torch.randn(arguments.views, arguments.grid**2 + PREFIX, arguments.dim, dtype=dtype, device=device)
    # timm's as its model hands it over: rounded to the block's dtype, which moves fewer bytes
    ropes = (rope.to(device, dtype), rotary_table(rope, PREFIX, half=True).to(device))
    return {"timm": (timms, x, ropes[0]), "fast": (fast, x.clone(), ropes[1])}


def step(block: nn.Module, x: Tensor, rope: Tensor) -> Step:
    """A forward and backward pass of x [views, tokens, dim]; returns the output, shaped like x, and every gradient."""
    x.requires_grad_()
    wanted = [x, *block.parameters()]

    def run() -> list[Tensor]:
        out = block(x, rope=rope)
        return [out.detach(), *torch.autograd.grad(out, wanted, torch.ones_like(out))]

    return run


def generated(run: Step) -> dict[str, float]:
    """Compile by the first call; kernels that the compiler wrote for it, and the megabytes that they move."""
    log = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
    log.setLevel(logging.INFO)  # the compiler counts bytes where somebody listens
    log.propagate = False
    metrics.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        run()
    moved = sum(4 * number for node, number in metrics.nodes_num_elem if not node.is_extern())
    return {"kernels": metrics.generated_kernel_count, "generated_mb": round(moved / 1e6, 2)}


def turns(how: str, steps: dict[str, Step], arguments: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of both, and the median of the rounds' ratios."""
    spent: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.rounds):
        for name in list(steps) if turn % 2 == 0 else reversed(list(steps)):
            spent[name].append(milliseconds(steps[name], arguments.steps))
    ratios = [a / b for a, b in zip(spent["timm"], spent["fast"], strict=True)]
    made = {f"{name}_{how}_ms": round(statistics.median(times), 3) for name, times in spent.items()}
    return {**made, f"{how}_speedup": round(statistics.median(ratios), 3)}


def milliseconds(run: Step, steps: int) -> float:
    """Of one step, after two that do not count."""
    for _ in range(2):
        run()
    finish()
    began = time.perf_counter()
    for _ in range(steps):
        run()
    finish()
    return (time.perf_counter() - began) / steps * 1e3


def finish() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    raise SystemExit(main())
