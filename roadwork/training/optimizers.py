"""AdamW, Sophia-G whose curvature lives beside the moments on whatever shard the engine hands out, and Sophia-H."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from roadwork.config import Config
from roadwork.errors import UserError

STATES = {"adamw": 2, "sophia": 4, "sophia_h": 3}
"""Tensors that each optimizer keeps per weight, in fp32."""


def build_optimizer(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over parameter groups that carry `lr`, `lr_scale` and `weight_decay`."""
    options = config.optimizer
    if options.name == "sophia_h":
        return sophia_h(config, groups)
    if options.name == "sophia":
        return Sophia(
            groups,
            lr=config.training.learning_rate,
            betas=options.sophia_betas,
            rho=options.sophia_rho,
            adam_betas=options.betas,
            eps=options.eps,
        )
    return torch.optim.AdamW(groups, lr=config.training.learning_rate, betas=options.betas, eps=options.eps, fused=True)


def sophia_h(config: Config, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Sophia-H of the package pytorch_optimizer, with the paper's step (Liu et al. 2023, arXiv 2305.14342, algorithm 3).

    The package steps by `lr * clip(m / max(h, eps), p)`. With p = rho, its eps = eps / rho and rates over rho that is
    `lr * clip(m / max(rho * h, eps), 1)`: a learning rate means what it means to Sophia-G. Decay is scaled to match.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from pytorch_optimizer import SophiaH
    except ImportError:
        raise UserError(
            "optimizer.name sophia_h needs the package pytorch_optimizer; install the extra `sophia` "
            '(pip install -e ".[sophia]"), or give --optimizer.name sophia'
        ) from None
    options, rho = config.optimizer, config.optimizer.sophia_rho
    scaled = [
        {**g, "lr": g["lr"] / rho, "lr_scale": g.get("lr_scale", 1.0) / rho, "weight_decay": g["weight_decay"] * rho}
        for g in groups
    ]
    return SophiaH(
        scaled,
        lr=config.training.learning_rate / rho,
        betas=options.sophia_betas,
        p=rho,
        eps=options.eps / rho,
        update_period=options.hessian_every,
    )


def step_sophia_h(optimizer: Any, step: int, hessian: list[Tensor] | None) -> None:
    """Optimizer step `step` of Sophia-H, counted from 0.

    The package counts steps in its groups, and estimates the Hessian itself when its period is over and none is given.
    The count is written each time: neither a skipped step nor a relaunch shifts the period.

    Args:
        hessian: estimates shaped like the parameters, in the order of the groups, at the steps that `hessian_every`
            divides, else None.
    """
    for group in optimizer.param_groups:
        group["step"] = step
    optimizer.step(hessian=hessian)


class Sophia(torch.optim.Optimizer):
    """Sophia with the Gauss-Newton-Bartlett curvature (Liu et al. 2023, arXiv 2305.14342, algorithms 2 and 3).

    `theta -= lr * clip(m / max(rho * h, eps), 1)` where there is curvature; where h is 0, AdamW's step: dividing by a
    zero curvature would turn Sophia into sign descent. `update_curvature` feeds h; state is element-wise, so ZeRO may
    hand in flat shards.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, rho=rho, adam_betas=adam_betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # closures are not taken
        """One update; gradients must be there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, parameter.grad)

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state, made at first use: `step` fp32 [], and four tensors shaped like it."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for key in ("exp_avg", "exp_avg_sq", "adam_avg", "hessian"):
                state[key] = torch.zeros_like(parameter)
        return state

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state_of(parameter)
        state["step"] += 1
        count = int(state["step"])
        beta1, _ = group["betas"]
        adam1, adam2 = group["adam_betas"]
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["adam_avg"].lerp_(gradient, 1 - adam1)
        state["exp_avg_sq"].mul_(adam2).addcmul_(gradient, gradient, value=1 - adam2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        curvature = state["hessian"].mul(group["rho"])
        newton = (state["exp_avg"] / curvature.clamp_min(group["eps"])).clamp_(-1, 1)
        scale = state["exp_avg_sq"].div(1 - adam2**count).sqrt_().add_(group["eps"])
        adam = state["adam_avg"].div(1 - adam1**count).div_(scale)
        parameter.sub_(torch.where(curvature > group["eps"], newton, adam), alpha=group["lr"])

    @torch.no_grad()
    def update_curvature(self, parameter: Tensor, gradient: Tensor, batch: float) -> None:
        """`h = beta2 * h + (1 - beta2) * batch * g^2` with g the mean gradient on sampled labels (equation 15).

        Args:
            parameter: a member of the parameter groups.
            gradient: mean gradient over the batch, unclipped, shaped like the parameter.
            batch: photos in that mean.
        """
        beta2 = next(g["betas"][1] for g in self.param_groups if any(p is parameter for p in g["params"]))
        self.state_of(parameter)["hessian"].mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * batch)
