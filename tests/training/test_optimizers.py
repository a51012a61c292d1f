"""Sophia against its formula, and AdamW where there is no curvature."""

import torch

from roadwork.training.optimizers import Sophia


def test_without_curvature_it_takes_adamws_step_not_a_sign_step() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(64)) for _ in range(2))
    sophia = Sophia([ours], lr=0.01, adam_betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    adamw = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(64) * 10
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        sophia.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_with_curvature_it_takes_the_clipped_newton_step() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    sophia = Sophia([weight], lr=0.1, betas=(0.5, 0.5), rho=0.1)
    sophia.update_curvature(weight, torch.tensor([1.0, 2.0, 10.0]), batch=4)
    torch.testing.assert_close(sophia.state[weight]["hessian"], 0.5 * 4 * torch.tensor([1.0, 4.0, 100.0]))
    weight.grad = torch.tensor([1.0, 1.0, -1.0])
    sophia.step()
    # m = g / 2; rho * h = 0.2, 0.8, 20
    expected = -0.1 * torch.tensor([0.5 / 0.2, 0.5 / 0.8, -0.5 / 20]).clamp(-1, 1)
    torch.testing.assert_close(weight.detach(), expected)


def test_curvature_decays_by_its_own_beta() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    sophia = Sophia([weight], lr=0.1, betas=(0.9, 0.75))
    for gradient in (2.0, 4.0):
        sophia.update_curvature(weight, torch.tensor([gradient]), batch=1)
    assert float(sophia.state[weight]["hessian"]) == 0.75 * (0.25 * 4) + 0.25 * 16
