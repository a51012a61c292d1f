"""Sophia-H: the Hessian's diagonal against known ones, the step against the paper's, and a run that goes on as it was."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_optimizer import SophiaH
from safetensors.torch import load_file
from torch import Tensor

from roadwork.config import Config
from roadwork.errors import UserError
from roadwork.training.curvature import hessian_diagonal, update_hessian
from roadwork.training.optimizers import build_optimizer, step_sophia_h
from tests.training.small_trainer import Make, make_trainer, sheets  # noqa: F401 - fixtures

CURVED = torch.tensor([1.0, 4.0, 0.0, -2.0, 1e4])
"""Diagonal of a quadratic's Hessian: flat and downward bends included."""


def settings(**more: Any) -> Config:
    config = Config()
    config.optimizer = replace(config.optimizer, name="sophia_h", **more)
    return config


def optimizer_over(config: Config, weight: Tensor) -> Any:
    rate = config.training.learning_rate
    return build_optimizer(config, [{"params": [weight], "lr": rate, "lr_scale": 1.0, "weight_decay": 0.1}])


def test_the_estimate_is_exact_where_the_hessian_is_diagonal() -> None:
    weight, unused = torch.nn.Parameter(torch.randn(5)), torch.nn.Parameter(torch.ones(2))
    line = torch.nn.Parameter(torch.ones(3))
    found = hessian_diagonal(
        [weight, unused, line], lambda: (CURVED * weight.square()).sum() / 2 + weight.sum() + line.sum()
    )
    torch.testing.assert_close(found, [CURVED, torch.zeros(2), torch.zeros(3)])
    assert weight.grad is None


def test_the_estimate_is_right_on_average_where_weights_interact() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6)
    hessian = root @ root.T
    one, other = torch.nn.Parameter(torch.randn(2)), torch.nn.Parameter(torch.randn(4))

    def loss() -> Tensor:
        both = torch.cat([one, other])
        return both @ hessian @ both / 2

    draws = torch.stack([torch.cat(hessian_diagonal([one, other], loss)) for _ in range(1500)])
    off = (draws.mean(0) - hessian.diagonal()).abs()
    assert (off < 5 * draws.std(0) / len(draws) ** 0.5).all() and (draws.std(0) > 0.1).all()


def test_the_step_is_the_papers_and_means_the_same_learning_rate_as_sophia_g() -> None:
    config = settings(sophia_betas=(0.9, 0.8), sophia_rho=0.04, hessian_every=2)
    rate, rho, eps = config.training.learning_rate, 0.04, config.optimizer.eps
    weight = torch.nn.Parameter(torch.ones(5))
    optimizer = optimizer_over(config, weight)
    expected, mean, curvature = torch.ones(5), torch.zeros(5), torch.zeros(5)
    for step in range(4):
        gradient = torch.tensor([0.5, -3.0, 1e-3, 2.0, -1.0]) * (step + 1)
        weight.grad = gradient.clone()
        step_sophia_h(optimizer, step, [CURVED.clone()] if step % 2 == 0 else None)
        mean = 0.9 * mean + 0.1 * gradient
        if step % 2 == 0:
            curvature = 0.8 * curvature + 0.2 * CURVED
        expected = expected * (1 - rate * 0.1) - rate * (mean / (rho * curvature).clamp_min(eps)).clamp(-1, 1)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=1e-9)


def test_what_is_fed_is_what_the_package_would_have_estimated() -> None:
    """On a diagonal quadratic random signs leave nothing to chance, so its own route ends at the same state, bit for bit."""
    config = settings()
    weights = [torch.nn.Parameter(torch.arange(5.0)) for _ in range(2)]
    ours = optimizer_over(config, weights[0])
    group = {k: v for k, v in ours.param_groups[0].items() if k != "params"}
    theirs = SophiaH(
        [{**group, "params": [weights[1]]}], p=config.optimizer.sophia_rho, hessian_distribution="rademacher"
    )

    def loss(weight: Tensor) -> Tensor:
        return (CURVED * weight.square()).sum() / 2

    for step in range(12):  # the package's period of ten begins anew at step 10
        loss(weights[0]).backward()
        due = step % config.optimizer.hessian_every == 0
        estimate = hessian_diagonal([weights[0]], lambda: loss(weights[0])) if due else None
        step_sophia_h(ours, step, estimate)
        loss(weights[1]).backward(create_graph=True)
        theirs.step()
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            optimizer.zero_grad()
            assert not weight.grad
        assert torch.equal(*weights)
        for name in ("momentum", "hessian", "hessian_moment"):
            assert torch.equal(ours.state[weights[0]][name], theirs.state[weights[1]][name]), name


def test_training_lowers_the_loss_on_the_photos_that_it_repeats(trainer: Make) -> None:
    made = trainer("--optimizer.name=sophia_h", "--training.warmup_steps=0", "--training.learning_rate=3e-3")
    source = iter(made.data.train_loader(made.engine, made.config, 0))
    batches = [replace(next(source), wait_s=0.0) for _ in range(made.micro_steps)]
    losses = [made.optimizer_step(0, iter(batches))[0]["loss"] for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0], losses
    moments = [state["hessian_moment"] for state in made.masters.states() if state]
    assert max(float(h.abs().max()) for h in moments) > 0, "no curvature was estimated"


def test_a_run_goes_on_with_the_same_weights_and_in_the_same_period(trainer: Make, tmp_path: Path) -> None:
    """Stopped after three steps of a period of four: the relaunch estimates the Hessian in the fifth, as it would have been."""
    common = [
        "--optimizer.name=sophia_h",
        "--optimizer.hessian_every=4",
        "--checkpoint.every_steps=3",
    ]
    whole, torn = tmp_path / "run", tmp_path / "torn"
    first = trainer(*common)
    first.run()
    shutil.copytree(whole / "checkpoints" / "step-00000003", torn / "checkpoints" / "step-00000003")
    again = trainer(*common, run=torn)
    assert again.counters.step == 3
    again.run()
    for file in ("master", "average", "momentum", "hessian", "hessian_moment"):
        one, other = (load_file(run / "checkpoints" / "step-00000006" / f"{file}.safetensors") for run in (whole, torn))
        assert all(torch.equal(one[name], other[name]) for name in one), file


def test_an_estimate_that_is_not_finite_leaves_the_average_as_it_is(trainer: Make) -> None:
    made = trainer("--optimizer.name=sophia_h")
    weights = [p for group in made.masters.groups() for p in group["params"]]

    def broken() -> Tensor:
        return weights[0].square().sum() * torch.inf

    assert all(not h.any() for h in update_hessian(made.engine, made.masters, broken))
    made.optimizer_step(0, iter(made.data.train_loader(made.engine, made.config, 0)))
    before = [made.masters.optimizer.state[p].get("hessian_moment", torch.zeros_like(p)).clone() for p in weights]
    kept = update_hessian(made.engine, made.masters, broken)
    assert all(torch.equal(h, b) for h, b in zip(kept, before, strict=True)) and any(h.any() for h in kept)
    for parameter in weights:
        parameter.grad = torch.zeros_like(parameter)
    step_sophia_h(made.masters.optimizer, 10, kept)
    assert all(
        torch.equal(made.masters.optimizer.state[p]["hessian_moment"], b) for p, b in zip(weights, before, strict=True)
    )


def test_without_the_package_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match="extra `sophia`") as refused:
        optimizer_over(settings(), torch.nn.Parameter(torch.ones(1)))
    assert "\n" not in str(refused.value)
