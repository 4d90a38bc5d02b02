"""Splats as samples of a distribution: dead ones move to where opaque ones are, noise explores.

3D Gaussian Splatting as Markov Chain Monte Carlo (Kheradmand et al. 2024); numbers as in gsplat.
Nothing is removed, so the count is exact. Meant to start from `initial.MCMC` and to be trained with
0.01 mean(opacity) + 0.01 mean(scale) added to the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from gencompress_kernels.rasterize_splats.reference import rotation_matrices
from torch import Tensor

from gencompress.splat.density.common import (
    CADENCE,
    check,
    clear_sums,
    log,
    logit,
    rescaled,
    shared_logits,
)
from gencompress.splat.state import State, add_rows, forget

FLOORS = {"start": 0, "stop": 0, "every": CADENCE, "rate_steps": 1}
MOST_COPIES = 51  # at one site; the sums below hold that many terms, more copies count as so many
HIGHEST = logit(1 - torch.finfo(torch.float32).eps)
SHARPNESS = 100.0  # how fast noise fades where opacity exceeds `dead`
UNFELT = 1e-9  # noise of a smaller weight is under the rounding of a position


@dataclass(frozen=True)
class Mcmc:
    """Step counts are for a run of 30,000."""

    start: int = 500  # steps; refinements come after this one
    stop: int = 25_000  # steps; refinements come before this one
    every: int = 100  # steps between refinements
    dead: float = 0.005  # in (0, 1), opacity up to which a splat is moved; no copy gets less
    growth: float = 0.05  # share of the splats added by a refinement
    cap: int = 1_000_000  # splats
    noise: float = 5e5  # times the learning rate of the means: noise per variance; 0: none
    rate: float = 1.6e-4  # of the extent, learning rate of the means at first,
    last_rate: float = 1.6e-6  # and at the end; it falls exponentially
    rate_steps: int = 30_000  # steps it takes to

    def __post_init__(self) -> None:
        check(self, steps=("every", "rate_steps"), opacities=("dead",))


def scaled(policy: Mcmc, steps: int) -> Mcmc:
    """The policy for a run of `steps`."""
    return rescaled(policy, steps, FLOORS)


def after_step(
    policy: Mcmc,
    state: State,
    generator: torch.Generator,
    weights: Callable[[], Tensor],
) -> None:
    """Moves and adds splats where it is time; then noise, each step. `weights` is not called."""
    if policy.start < state.step < policy.stop and state.step % policy.every == 0:
        _relocate(policy, state, generator)
        _grow(policy, state, generator)
        clear_sums(state)
    if policy.noise:
        _explore(policy, state, generator)


def draw(shares: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """int64 [count]: rows drawn with replacement, as often as their share (>= 0, [N]) says.

    Any number of rows: torch.multinomial ends at 2^24.
    """
    bounds = shares.double().cumsum(0)
    at = torch.rand(count, generator=generator, dtype=torch.float64) * bounds[-1]
    return torch.searchsorted(bounds, at, right=True).clamp_max(len(shares) - 1)


def share_site(logits: Tensor, scales: Tensor, copies: Tensor) -> tuple[Tensor, Tensor]:
    """What each of n copies at one site becomes, so that together they look as one did.

    Opacity o' = 1 - (1 - o)^(1/n); scale s' = s o / D with D = sum_j C(n, j) (-1)^(j+1) o'^j /
    sqrt(j), j = 1..n, which keeps the integral of 1 - (1 - o' G)^n along a line through the centre
    (equation 9 of the paper, whose inner sum of binomials is C(n, j)).

    Args:
        logits: [M] of opacity. scales: [M, 2 or 3], log. copies: int64 [M], at least 1.

    Returns:
        float64 logits [M] and log scales, both not clamped.
    """
    copies = copies.clamp_max(MOST_COPIES)
    most = int(copies.max()) if len(copies) else 0
    ways = torch.tensor(
        [[math.comb(n, j) for j in range(most + 1)] for n in range(most + 1)], dtype=torch.float64
    )
    shared = shared_logits(logits, copies)
    opacity = shared.sigmoid()
    total, power = torch.zeros_like(opacity), torch.ones_like(opacity)
    for j in range(1, most + 1):  # a loop: [M, 51] would be large
        power = power * opacity
        total += ways[copies, j] * power * (1 if j % 2 else -1) / math.sqrt(j)
    wider = torch.nn.functional.logsigmoid(logits.double()) - total.log()
    return shared, scales.double() + wider[:, None]


def _thin(policy: Mcmc, state: State, drawn: Tensor) -> None:
    """Every row drawn k times becomes one of k + 1 copies; its moments are forgotten."""
    times = torch.bincount(drawn, minlength=len(state))
    rows = times.nonzero().squeeze(1)
    opacities, scales = (state.parameters[name].clone() for name in ("opacities", "scales"))
    logits, wider = share_site(opacities[rows], scales[rows], times[rows] + 1)
    opacities[rows] = logits.clamp(logit(policy.dead), HIGHEST).float()
    scales[rows] = wider.float()
    state.parameters |= {"opacities": opacities, "scales": scales}
    forget(state, rows)


def _relocate(policy: Mcmc, state: State, generator: torch.Generator) -> None:
    opacity = state.parameters["opacities"].double().sigmoid()
    dead = opacity <= policy.dead
    rows, alive = dead.nonzero().squeeze(1), (~dead).nonzero().squeeze(1)
    if not len(rows) or not len(alive):
        return
    drawn = alive[draw(opacity[alive], len(rows), generator)]
    _thin(policy, state, drawn)
    for name, value in state.parameters.items():
        state.parameters[name] = value.index_copy(0, rows, value[drawn])
    forget(state, rows)
    state.notes["born"] = state.notes["born"].index_fill(0, rows, state.step)
    log(state, "relocate", len(rows))


def _grow(policy: Mcmc, state: State, generator: torch.Generator) -> None:
    # 1e-9: a share of a count such as 1.15 * 100 = 114.99999999999999 is 115
    goal = min(policy.cap, int((1 + policy.growth) * len(state) + 1e-9))
    count = goal - len(state)
    if count <= 0:
        return
    drawn = draw(state.parameters["opacities"].double().sigmoid(), count, generator)
    _thin(policy, state, drawn)
    add_rows(state, {name: value[drawn] for name, value in state.parameters.items()})
    log(state, "grow", count)


def _explore(policy: Mcmc, state: State, generator: torch.Generator) -> None:
    """Adds covariance times normal noise to the means, next to none where a splat is opaque."""
    opacity = state.parameters["opacities"].double().sigmoid()
    felt = torch.sigmoid(-SHARPNESS * (opacity - policy.dead))
    rows = (felt > UNFELT).nonzero().squeeze(1)
    scales = state.parameters["scales"][rows]
    frames = rotation_matrices(state.parameters["quats"][rows])[:, :, : scales.shape[1]]
    step = torch.randn(len(rows), 3, generator=generator)
    step = step * (felt[rows] * policy.noise * _rate(policy, state)).float()[:, None]
    along = (frames * step[:, :, None]).sum(1) * (2 * scales).exp()
    moved = (frames * along[:, None]).sum(-1)
    means = state.parameters["means"]
    state.parameters["means"] = means.index_copy(0, rows, means[rows] + moved)


def _rate(policy: Mcmc, state: State) -> float:
    """Learning rate of the means at this step, world units."""
    done = min((state.step - 1) / policy.rate_steps, 1.0)
    return state.extent * policy.rate * (policy.last_rate / policy.rate) ** done
