"""Blocks under torch.compile: the same numbers, no graph break, and no second compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from roadwork.models import Outputs, RoadworkDetector

Build = Callable[..., RoadworkDetector]
Photos = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or left behind.

    torch gives a block's code up after eight variants, and EfficientNet-Lite0 has eleven widths: with a limit of two the
    four widths of a small net show that a detector raises it (a full graph must not be given up).
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=2):
        yield
    torch._dynamo.reset()


def _sum(outputs: Outputs) -> Tensor:
    assert outputs.seg_logits is not None
    return outputs.logits.square().sum() + outputs.seg_logits.square().mean()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])  # the latter has two blocks and more in a stage
def test_compiled_blocks_have_no_graph_break_and_do_not_compile_again(
    build: Build, photos: Photos, name: str, training: bool
) -> None:
    model = build(backbone=name, num_layers=1, dropout=0.0, metadata_dropout=0.0).train(training)
    batches = [photos([3, 2]), photos([1]), photos([4, 4, 1]), photos([5, 2]), photos([1])]
    compiles = [True, True, False, False, False]  # a batch of one is a size of its own
    expected = []
    for views, mask, boxes in batches:
        expected.append(model(views, mask, None, boxes))
        if training:
            _sum(expected[-1]).backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    model.zero_grad()
    names = list(model.state_dict())
    assert model.compile_blocks(fullgraph=True, backend="eager") > len(model.backbone.units())
    assert list(model.state_dict()) == names and model.runtime()["compile"] == "per block, default"
    for (views, mask, boxes), known, may_compile in zip(batches, expected, compiles, strict=True):
        with torch.compiler.set_stance("default" if may_compile else "fail_on_recompile"):
            outputs = model(views, mask, None, boxes)
            torch.testing.assert_close(outputs.logits, known.logits, atol=1e-5, rtol=1e-4)
            if training:
                _sum(outputs).backward()
    for key, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[key], atol=1e-4, rtol=1e-3, msg=key)
