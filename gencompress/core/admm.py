"""A budget as a constraint on a soft mask: the mean of values in [0, 1] is held at or below it.

Two ways. Dual ascent is the method of multipliers for the one inequality mean <= budget, which
HollowNeRF (Xie et al. 2023, arXiv 2308.10122) calls ADMM: no copy of the mask, no projection.
Two-block ADMM keeps a copy Z that obeys the budget exactly and pulls the mask P towards it, so Z
says which units go without a threshold.

A step of training is: the gradient step on loss + penalty with the state held still, then (two
blocks: every few steps) the update of the state from what the step left. States are numbers and
plain tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Multipliers settle at about ten times the loss L0 (least squares, budget 0.04), while the fall of
# a fresh mask alone winds them up to a hundred times rho. Toy of 32^3 independent cells.
RHO_PER_LOSS, LEAST_RHO, MOST_RHO = 0.1, 1e-5, 1e-2
CAP_PER_LOSS = 20.0
HALVINGS = 60  # of an interval; float64 has 53 bits


@dataclass(frozen=True)
class Dual:
    """The multiplier of mean <= budget. With `rho` 0 nothing is pulled and nothing moves."""

    budget: float
    rho: float = 0.0  # weight of the penalty and step of the ascent; 0: not measured yet
    gamma: float = 0.0  # the multiplier, >= 0
    cap: float = math.inf  # of gamma, against wind-up while the mask falls
    capped: int = 0  # how often the cap was hit

    def __post_init__(self) -> None:
        _check(self.budget)


def measured(dual: Dual, loss: float, scale: float = 1.0) -> Dual:
    """With rho = 0.1 loss (times `scale`, to try others), within 1e-5 to 1e-2, and the cap at
    20 loss, where `loss` is the mean of the fit before pruning.

    Raises ValueError for a loss that is negative or not finite.
    """
    if not 0 <= loss < math.inf:
        raise ValueError(f"loss {loss}: the multiplier needs a finite one of at least 0")
    rho = min(max(RHO_PER_LOSS * loss, LEAST_RHO), MOST_RHO) * scale
    return replace(dual, rho=rho, cap=CAP_PER_LOSS * loss)


def penalty(dual: Dual, mean: Tensor) -> Tensor:
    """rho/2 max(0, mean - budget)^2 + gamma (mean - budget), to add to the loss.

    `mean` is a scalar tensor, that of the mask, and takes all of the gradient.
    """
    over = mean - dual.budget
    return dual.rho / 2 * over.clamp_min(0).square() + dual.gamma * over


def ascend(dual: Dual, mean: float) -> Dual:
    """gamma + rho (mean - budget), within 0 and the cap; `mean` is that after the gradient step."""
    gamma = max(dual.gamma + dual.rho * (mean - dual.budget), 0.0)
    return replace(
        dual, gamma=min(gamma, dual.cap), capped=dual.capped + int(gamma > dual.cap)
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Blocks:
    """The state of two-block ADMM for a mask P; both tensors have its shape and dtype."""

    z: Tensor  # a copy of P that obeys the budget; exact zeros are what may go
    u: Tensor  # scaled multipliers of P = Z


def admm_start(mask: Tensor, budget: float) -> Blocks:
    """Z is the projection of `mask`, the multipliers are 0."""
    return Blocks(project(mask.detach(), budget), torch.zeros_like(mask.detach()))


def admm_penalty(blocks: Blocks, mask: Tensor, rho: float) -> Tensor:
    """rho/2 mean (P - Z + U)^2, to add to the loss. The mean in place of a sum puts rho on the
    scale of the loss, whatever the size of the mask."""
    return rho / 2 * (mask - blocks.z + blocks.u).square().mean()


def admm_update(blocks: Blocks, mask: Tensor, budget: float) -> Blocks:
    """Z = project(P + U), then U + P - Z; `mask` is P after the gradient step.

    In the toy above, with rho = L0 and an update every 16 steps, P never falls below where it
    settles; updated every step it is first crushed, as by a dual with too large a rho.
    """
    mask = mask.detach()
    z = project(mask + blocks.u, budget)
    return Blocks(z, blocks.u + mask - z)


@torch.no_grad()
def project(values: Tensor, budget: float) -> Tensor:
    """The nearest point of {0 <= z <= 1, mean(z) <= budget}, in the shape and dtype of `values`.

    It is clip(values - tau, 0, 1) with the least tau >= 0 that keeps the budget (one rounding
    step of the dtype may be over it), found by bisection in float64. What obeys already comes
    back unchanged. Values are finite, at least one.

    Raises ValueError for a budget outside [0, 1].
    """
    _check(budget)
    wide = values.double()
    limit = budget * values.numel()
    low = torch.zeros((), dtype=torch.float64, device=values.device)
    high = wide.amax().clamp_min(0)
    # rounding to the dtype may have put a projection that far over
    fits = wide.clamp(0, 1).sum() <= limit * (1 + torch.finfo(values.dtype).eps)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        over = (wide - middle).clamp_(0, 1).sum() > limit
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    tau = torch.where(fits, torch.zeros_like(high), high)
    return (wide - tau).clamp_(0, 1).to(values.dtype)


def _check(budget: float) -> None:
    if not 0 <= budget <= 1:
        raise ValueError(f"budget {budget}: the mean of a mask is between 0 and 1")
