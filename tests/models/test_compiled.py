"""Blocks under torch.compile: the same numbers, no graph break, and no second compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    # One photo and one view are sizes of their own: four kinds of batches, then the same with other numbers.
    kinds = [[3, 2], [1], [5], [1, 1, 1]]
    others = [[4, 4, 1], [5, 2], [1], [8], [1, 1], [4, 2]]
    batches = [photos(counts) for counts in [*kinds, *others]]
    compiles = [True] * len(kinds) + [False] * len(others)
    expected = []
    for views, mask, boxes in batches:
        expected.append(model(views, mask, None, boxes))
        if training:
            _sum(expected[-1]).backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    model.zero_grad()
    names = list(model.state_dict())
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    compiled = model.compile_blocks(fullgraph=True, backend="eager")
    assert compiled > len(model.backbone.units())
    assert list(model.state_dict()) == names and model.runtime()["compile"] == "per block, default"
    for (views, mask, boxes), known, may_compile in zip(batches, expected, compiles, strict=True):
        with torch.compiler.set_stance("default" if may_compile else "fail_on_recompile"):
            outputs = model(views, mask, None, boxes)
            torch.testing.assert_close(outputs.logits, known.logits, atol=1e-5, rtol=1e-4)
            if training:
                _sum(outputs).backward()
    for key, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[key], atol=1e-4, rtol=1e-3, msg=key)
    assert graphs["unique_graphs"] <= len(kinds) * compiled


@pytest.mark.parametrize(
    ("configured", "options", "given"),
    [
        ("default", {}, {}),
        ("max-autotune-no-cudagraphs", {}, {"mode": "max-autotune-no-cudagraphs"}),
        ("max-autotune-no-cudagraphs", {"mode": "reduce-overhead"}, {"mode": "reduce-overhead"}),
        ("max-autotune-no-cudagraphs", {"fullgraph": True}, {"fullgraph": True}),
    ],
)
def test_blocks_are_compiled_in_the_mode_that_is_reported(
    build: Build, configured: str, options: dict[str, Any], given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def compile_(self: nn.Module, **asked: Any) -> None:
        seen.append(asked)
        self._compiled_call_impl = self._call_impl

    monkeypatch.setattr(nn.Module, "compile", compile_)
    model = build(compile_mode=configured)
    assert model.runtime()["compile"] == "off"
    assert seen == [] and model.compile_blocks(**options) == len(seen) > 0
    assert seen == [given] * len(seen)
    assert model.runtime()["compile"] == f"per block, {given.get('mode', 'default')}"
