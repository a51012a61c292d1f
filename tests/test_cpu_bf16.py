"""bf16 products on a CPU: rounded once from fp32 sums, forward and backward, whatever instructions it has."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from roadwork.cpu_bf16 import lacks_bf16_instructions, widen_products

MASK = torch.tensor([[0.0, -1.0, -3.0, 0.0]])
PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "matrix": (torch.matmul, [(5, 7), (7, 3)]),
    "batched": (torch.matmul, [(2, 5, 7), (2, 7, 3)]),
    "linear": (F.linear, [(5, 7), (3, 7), (3,)]),
    "grouped": (
        lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=torch.tensor([2, 2, 5], dtype=torch.int32)),
        [(5, 16), (3, 8, 16)],
    ),
    "convolution": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), [(2, 4, 9, 9), (6, 4, 3, 3), (6,)]),
    "depthwise": (lambda x, w: F.conv2d(x, w, groups=4, padding=1), [(2, 4, 9, 9), (4, 1, 3, 3)]),
    "attention": (F.scaled_dot_product_attention, [(2, 2, 4, 8)] * 3),
    "masked attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK.to(q.dtype).expand(2, 1, 4, 4)),
        [(2, 2, 4, 8)] * 3,
    ),
}


def outcome(product: Callable[..., Tensor], given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The product and its gradients with respect to all operands."""
    operands = [t.detach().to(dtype).requires_grad_() for t in given]
    out = product(*operands)
    return [out, *torch.autograd.grad(out.float().square().sum(), operands)]


@pytest.mark.parametrize("name", PRODUCTS)
def test_bf16_products_are_those_of_fp32_rounded(name: str) -> None:
    widen_products()
    product, shapes = PRODUCTS[name]
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    for low, exact in zip(outcome(product, given, torch.bfloat16), outcome(product, given, torch.float32), strict=True):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), exact, atol=0.02 * float(exact.detach().abs().max()), rtol=0.02)


def test_other_dtypes_keep_their_kernels() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 6), torch.randn(6, 2)
    before = x @ w
    widen_products()
    assert torch.equal(x @ w, before)
    assert (x.double() @ w.double()).dtype == torch.float64


def test_products_are_replaced_once_however_often_a_stage_asks() -> None:
    """Pre-training asks before it builds the model, and its engine asks again."""
    code = """
import torch
from roadwork import cpu_bf16
cpu_bf16.lacks_bf16_instructions = lambda: True  # as on a CPU below AVX-512
assert cpu_bf16.widen_products() and cpu_bf16.widen_products()
assert len(cpu_bf16._LIBRARY) == 1
assert (torch.ones(2, 3, dtype=torch.bfloat16) @ torch.ones(3, 2, dtype=torch.bfloat16) == 3).all()
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not lacks_bf16_instructions(), reason="this CPU has bf16 instructions: nothing is replaced")
def test_a_product_is_rounded_once() -> None:
    assert widen_products()
    torch.manual_seed(0)
    x, w = torch.randn(64, 300).bfloat16(), torch.randn(300, 8).bfloat16()
    assert torch.equal(x @ w, (x.float() @ w.float()).bfloat16())
