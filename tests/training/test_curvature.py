"""Sophia-G's curvature: every head takes part by its loss weight, and an estimate that is not finite changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from roadwork.config import LossConfig
from roadwork.training.curvature import sampled_loss, update_curvature
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures

HEADS = {
    "focal": "logits", "weather": "weather_logits", "consistency": "view_logits", "segmentation": "seg_logits",
}  # fmt: skip
"""Loss weight -> the output that it is the weight of."""


def gradients(**weights: float) -> dict[str, Tensor]:
    """Gradient of the sampled loss by each head's output; the same labels each time. Photo 2 is padding, so is one view."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"logits": (3, 2), "weather_logits": (3, 6), "view_logits": (3, 4, 2), "seg_logits": (3, 4, 6, 8, 8)}
    outputs = {name: torch.randn(shape, generator=draw).requires_grad_() for name, shape in shapes.items()}
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1, 3] = False
    torch.manual_seed(1)
    loss = sampled_loss(
        SimpleNamespace(**outputs, view_mask=mask), LossConfig(**weights), torch.tensor([1.0, 1.0, 0.0])
    )
    loss.backward()
    return {name: tensor.grad for name, tensor in outputs.items()}


@pytest.mark.parametrize("weight", HEADS)
def test_each_head_takes_part_in_proportion_to_its_loss_weight(weight: str) -> None:
    once = gradients(**{weight: 0.5})
    twice = gradients(**{weight: 1.0})
    for name, gradient in once.items():
        assert gradient[:2].any() and not gradient[2].any(), name
        torch.testing.assert_close(twice[name], gradient * (2 if name == HEADS[weight] else 1))
    assert not once["view_logits"][1, 3].any() and not once["seg_logits"][1, 3].any()


def test_an_estimate_that_is_not_finite_leaves_the_curvature_as_it_is(trainer: Make) -> None:
    made = trainer("--optimizer.name=sophia")
    made.optimizer_step(0, iter(made.data.train_loader(made.engine, made.config, 0)))

    def hessian() -> list[Tensor]:
        return [state["hessian"].clone() for state in made.masters.states() if "hessian" in state]

    before, weights = hessian(), list(made.masters.parameters.values())
    assert any(h.any() for h in before)
    one_bad = weights[0].square().sum() * torch.nan + sum(weight.square().sum() for weight in weights[1:])
    assert not update_curvature(made.engine, made.masters, one_bad, 4)
    assert all(torch.equal(h, b) for h, b in zip(hessian(), before, strict=True))
    good = sum((weight.square().sum() for weight in weights), torch.zeros(()))
    assert update_curvature(made.engine, made.masters, good, 4)
    assert any(not torch.equal(h, b) for h, b in zip(hessian(), before, strict=True))
