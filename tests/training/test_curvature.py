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


PRESENT = torch.tensor([1.0, 1.0, 0.0])
VIEWS = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
"""Photo 2 is padding, so is one view."""


def outputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"logits": (3, 2), "weather_logits": (3, 6), "view_logits": (3, 4, 2), "seg_logits": (3, 4, 6, 4, 4)}
    return {name: torch.randn(shape, generator=draw).requires_grad_() for name, shape in shapes.items()}


def gauss_newton(found: dict[str, Tensor], weights: LossConfig) -> dict[str, Tensor]:
    """Its diagonal by each head's own output, for the mean over photos of the weighted likelihoods' means."""
    photos = PRESENT / PRESENT.sum()
    views = photos[:, None] * VIEWS / VIEWS.sum(1, keepdim=True)
    p = {name: value.detach().softmax(-1) for name, value in found.items() if name != "seg_logits"}
    pixel = found["seg_logits"].detach().sigmoid()
    share = {
        "logits": weights.focal * photos[:, None],
        "weather_logits": weights.weather * photos[:, None],
        "view_logits": (weights.consistency + weights.view_labels) * views[..., None],
    }
    by_pixel = weights.segmentation * views[..., None, None, None] / pixel[0, 0].numel()
    return {name: share[name] * p[name] * (1 - p[name]) for name in p} | {"seg_logits": by_pixel * pixel * (1 - pixel)}


@pytest.mark.parametrize("changed", ["none", *HEADS, "view_labels"])
def test_the_squared_gradient_is_the_gauss_newton_diagonal_of_the_weighted_loss(changed: str) -> None:
    weights = LossConfig(**({changed: 2.0} if changed != "none" else {}))
    found = outputs()
    photos, draws = 2, 1500
    squares = {name: torch.zeros_like(value) for name, value in found.items()}
    torch.manual_seed(1)
    for _ in range(draws):
        loss = sampled_loss(SimpleNamespace(**found, view_mask=VIEWS.bool()), weights, PRESENT)
        for name, gradient in zip(found, torch.autograd.grad(loss, list(found.values())), strict=True):
            squares[name] += photos * gradient.square() / draws
    for name, expected in gauss_newton(found, weights).items():
        assert squares[name].sum().item() == pytest.approx(expected.sum().item(), rel=0.1), name
        assert not squares[name][2].any() and (squares[name] > 0).equal(expected > 0), name


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
