"""A budget as a constraint on a soft mask."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from gencompress.core.admm import (
    Blocks,
    Dual,
    admm_penalty,
    admm_start,
    admm_update,
    ascend,
    measured,
    penalty,
    project,
)

BUDGET = 0.04


def test_penalty_and_ascent_by_hand():
    dual = Dual(0.25, rho=0.5, gamma=2.0)
    mean = torch.tensor(0.75, dtype=torch.float64, requires_grad=True)
    cost = penalty(dual, mean)
    (slope,) = torch.autograd.grad(cost, mean)
    assert cost.item() == 0.25 * 0.5**2 + 2 * 0.5 and slope.item() == 0.5 * 0.5 + 2
    mean = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(penalty(dual, mean), mean)  # below: the multiplier alone
    assert slope.item() == 2
    assert ascend(dual, 0.75) == Dual(0.25, 0.5, 2.25)
    assert ascend(dual, 0.05).gamma == pytest.approx(1.9)
    assert ascend(Dual(0.25, 0.5, 0.01), 0.05).gamma == 0
    capped = ascend(Dual(0.25, 0.5, 2.0, cap=2.1), 0.75)
    assert (capped.gamma, capped.capped) == (2.1, 1)
    assert ascend(capped, 0.25) == capped  # at the cap, but not beyond it


def test_measured():
    dual = measured(Dual(BUDGET), 0.02)
    assert (dual.rho, dual.cap) == pytest.approx((0.002, 0.4))
    assert measured(Dual(BUDGET), 0.02, scale=10).rho == pytest.approx(0.02)
    assert measured(Dual(BUDGET), 1e-6).rho == 1e-5 and measured(Dual(BUDGET), 5.0).rho == 1e-2
    for loss in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            measured(Dual(BUDGET), loss)
    for budget in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            Dual(budget)


def test_nothing_happens_before_it_is_measured():
    mean = torch.tensor(0.7, requires_grad=True)
    cost = penalty(Dual(BUDGET), mean)
    assert cost.item() == 0 and torch.autograd.grad(cost, mean)[0].item() == 0
    assert ascend(Dual(BUDGET), 0.7) == Dual(BUDGET)


def test_the_state_survives_a_file():
    dual = ascend(measured(Dual(BUDGET), 0.3), 0.73)
    assert Dual(**json.loads(json.dumps(dataclasses.asdict(dual)))) == dual


def train(logits, dual, steps, loss=None):
    """Adam as the field trains; returns the logits, the dual and the means."""
    logits = logits.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=1e-2, betas=(0.9, 0.99), eps=1e-15)
    means = []
    for _ in range(steps):
        mask = torch.sigmoid(logits)
        cost = penalty(dual, mask.mean())
        if loss is not None:
            cost = cost + loss(mask)
        optimiser.zero_grad()
        cost.backward()
        optimiser.step()
        means.append(torch.sigmoid(logits.detach()).mean().item())
        dual = ascend(dual, means[-1])
    return logits.detach(), dual, means


@pytest.mark.parametrize("start", ["ones", "random", "high"])
@pytest.mark.parametrize("rho", [1e-4, 1e-2])
def test_without_a_loss_the_mean_reaches_the_budget(start, rho, generator):
    logits = {
        "ones": torch.ones(8, 8, 8),
        "random": torch.randn(8, 8, 8, generator=generator) * 3,
        "high": torch.full((8, 8, 8), 5.0),
    }[start]
    _, dual, means = train(logits, Dual(BUDGET, rho), 1500)
    assert min(abs(mean - BUDGET) for mean in means) < 0.05 * BUDGET
    assert means[-1] < 1.05 * BUDGET
    assert 0 <= dual.gamma < math.inf


def test_within_the_budget_nothing_moves(generator):
    logits = torch.randn(8, 8, 8, generator=generator)
    mean = torch.sigmoid(logits).mean().item()
    moved, dual, _ = train(logits, Dual(mean + 1e-6, rho=1e-2), 20)
    assert torch.equal(moved, logits) and dual.gamma == 0


# Cells of which some are seen: the loss is L0 times the mean of (1 - p)^2 over these. Where they
# are more than the budget the optimum is p = C / seen, gamma = 2 L0 (1 - C / seen) / seen.
def toy(seen, scale, steps, cap=True, size=12):
    count = size**3
    visible = round(seen * count)
    first = 1e-3
    dual = measured(Dual(BUDGET), first, scale)
    if not cap:
        dual = dataclasses.replace(dual, cap=math.inf)
    lowest = [1.0]

    def loss(mask):
        lowest[0] = min(lowest[0], mask[:visible].mean().item())
        return first * (1 - mask[:visible]).square().mean()

    logits, dual, means = train(torch.ones(count), dual, steps, loss)
    mask = torch.sigmoid(logits)
    share = visible / count
    expected = 2 * (1 - BUDGET / share) / share
    return mask[:visible], mask[visible:], means[-1], dual.gamma / first, expected, lowest[0], dual


@pytest.mark.parametrize("seen", [0.06, 0.08])
def test_the_toy_settles_at_its_multiplier(seen):
    visible, hidden, mean, gamma, expected, lowest, dual = toy(seen, 1.0, 4000)
    assert 11 < expected <= 12.5
    assert gamma == pytest.approx(expected, rel=0.05)
    assert mean == pytest.approx(BUDGET, rel=0.03)
    assert visible.amin() == pytest.approx(BUDGET / seen, rel=0.03) and hidden.amax() < 1e-6
    assert lowest > 0.97 * BUDGET / seen and dual.capped == 0


def test_the_toy_keeps_what_fits():
    visible, hidden, mean, *_ = toy(0.03, 1.0, 3000)
    assert visible.amin() > 0.85 and hidden.amax() < 1e-6 and mean < BUDGET


def test_a_large_step_winds_up_and_the_cap_bounds_it():
    *_, gamma, expected, lowest, dual = toy(0.06, 10.0, 600, cap=False)
    assert gamma > 5 * expected and lowest < 0.05 and dual.capped == 0
    *_, gamma, _, lowest, dual = toy(0.06, 10.0, 600)
    assert gamma <= 20 and dual.capped > 0 and lowest > 0.2


# two blocks


def nearest(values, budget):
    """The projection by a general solver."""
    bound = {
        "type": "ineq",
        "fun": lambda z: budget - z.mean(),
        "jac": lambda z: -1 / z.size + 0 * z,
    }
    found = minimize(
        lambda z: ((z - values) ** 2).sum(),
        np.clip(values, 0, 1) * 0.5,
        jac=lambda z: 2 * (z - values),
        bounds=[(0, 1)] * len(values),
        constraints=[bound],
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert found.status in (0, 8)  # 8: no step is better, as far as it can tell
    return found.x


@pytest.mark.parametrize("count", [1, 2, 7, 12])
@pytest.mark.parametrize("budget", [0.0, 0.04, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_projection_is_that_of_a_quadratic_program(count, budget, spread, generator):
    values = torch.randn(count, generator=generator, dtype=torch.float64) * spread + 0.4
    found = project(values, budget)
    assert np.abs(found.numpy() - nearest(values.numpy(), budget)).max() < 1e-6
    assert found.amin() >= 0 and found.amax() <= 1
    assert found.mean() <= budget + 1e-15
    # as exact as its dtype: the free entries are all shifted alike, and the budget is met
    free = (found > 0) & (found < 1)
    shift = (values - found)[free]
    assert len(shift) == 0 or shift.amax() - shift.amin() < 1e-14
    if values.clamp(0, 1).mean() > budget:
        assert found.mean() > budget - 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("budget", [0.0, 1e-6, 0.04, 0.5])
def test_projection_is_feasible_and_idempotent(dtype, budget, generator):
    eps = torch.finfo(dtype).eps
    for spread in (1e-6, 0.1, 1.0, 1e4):
        values = (torch.randn(17, 19, 23, generator=generator) * spread).to(dtype)
        found = project(values, budget)
        assert found.dtype == dtype and found.shape == values.shape
        assert found.amin() >= 0 and found.amax() <= 1
        assert found.double().mean() <= budget * (1 + eps)
        assert torch.equal(project(found, budget), found)


def test_projection_moves_nothing_that_fits_and_makes_exact_zeros(generator):
    values = torch.rand(500, generator=generator) * 0.07
    values[::5] = 0
    assert torch.equal(project(values, 0.04), values)
    values = torch.rand(500, generator=generator)
    found = project(values, 0.04)
    assert 0.6 < (found == 0).float().mean() < 0.95
    order = values.argsort(descending=True)
    kept = int((found > 0).sum())
    assert (found[order[:kept]] > 0).all() and (found[order[kept:]] == 0).all()
    with pytest.raises(ValueError, match="between 0 and 1"):
        project(values, 1.5)


def test_updates_by_hand():
    mask = torch.tensor([0.9, 0.5, 0.1, 0.1], dtype=torch.float64)
    blocks = admm_start(mask, 0.2)  # shift 0.3: 0.6, 0.2, 0, 0
    assert blocks.z.tolist() == pytest.approx([0.6, 0.2, 0, 0])
    assert blocks.u.tolist() == [0, 0, 0, 0]
    blocks = Blocks(blocks.z, blocks.u + 0.1)
    assert admm_penalty(blocks, mask, 2.0).item() == pytest.approx((0.4**2 * 2 + 0.2**2 * 2) / 4)
    after = admm_update(blocks, mask, 0.2)  # of 1, 0.6, 0.2, 0.2
    assert after.z.tolist() == pytest.approx([0.6, 0.2, 0, 0])
    assert after.u.tolist() == pytest.approx([0.4, 0.4, 0.2, 0.2])


def test_two_blocks_find_the_cells_that_are_seen():
    count, visible, first = 1000, 60, 1e-3
    logits = torch.ones(count, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=1e-2, betas=(0.9, 0.99), eps=1e-15)
    blocks = admm_start(torch.sigmoid(logits), BUDGET)
    lowest = 1.0
    for step in range(2000):
        mask = torch.sigmoid(logits)
        cost = first * (1 - mask[:visible]).square().mean()
        optimiser.zero_grad()
        (cost + admm_penalty(blocks, mask, first)).backward()
        optimiser.step()
        lowest = min(lowest, torch.sigmoid(logits.detach())[:visible].mean().item())
        if step % 16 == 0:
            blocks = admm_update(blocks, torch.sigmoid(logits), BUDGET)
    mask = torch.sigmoid(logits.detach())
    assert blocks.z.mean() <= BUDGET * (1 + 1e-6)
    assert (blocks.z[visible:] == 0).all() and (blocks.z[:visible] > 0).all()
    assert mask[:visible].mean() == pytest.approx(BUDGET * count / visible, rel=0.02)
    assert mask[visible:].amax() < 1e-3 and lowest > 0.98 * BUDGET * count / visible
