"""The policy of 3DGS: clone and split on the gradient, prune by a fixed opacity, reset opacities.

Kerbl et al. 2023; numbers as in the authors' code and in gsplat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gencompress.splat.density.common import (
    CADENCE,
    RESET,
    check,
    clear_sums,
    is_reset,
    log,
    rescaled,
    reset_opacities,
    since_reset,
    whole_cadences,
)
from gencompress.splat.density.growth import grow
from gencompress.splat.state import State, keep_rows

FLOORS = {
    "start": 0, "stop": 0, "every": CADENCE, "reset_every": RESET, "reset_pause": 0,
    "large_from": RESET,
}  # fmt: skip


@dataclass(frozen=True)
class Default:
    """Step counts are for a run of 30,000."""

    start: int = 500  # steps; refinements come after this one
    stop: int = 15_000  # steps; refinements and resets come before this one
    every: int = 100  # steps between refinements
    gradient: float = 2e-4  # mean norm per view in normalised units above which a splat grows
    absgrad: bool = False  # the gradient note sums absolute values over pixels (AbsGS)
    gradient_abs: float = 8e-4  # the same threshold where `absgrad` is on (gsplat)
    small: float = 0.01  # of the extent; larger splats are split, others cloned
    shrink: float = 1.6  # > 0, the scales of children are divided by it
    revised_opacity: bool = False  # two splats from one share its opacity
    prune_opacity: float = 0.005  # in (0, 1), less is removed; 0.05 for 2DGS
    prune_large: float = 0.1  # of the extent; a larger scale is removed
    large_from: int = 3000  # steps; large splats are removed after this one
    reset_every: int = 3000  # steps; 0: never. To twice `prune_opacity`
    reset_pause: int = 0  # steps without refinement after a reset

    def __post_init__(self) -> None:
        check(self, steps=("every",), opacities=("prune_opacity",))
        if self.reset_every and self.prune_opacity >= 0.5:
            raise ValueError(f"prune_opacity is {self.prune_opacity}: no reset to twice as much")


def scaled(policy: Default, steps: int) -> Default:
    """The policy for a run of `steps`."""
    shorter = rescaled(policy, steps, FLOORS)
    return replace(shorter, reset_every=whole_cadences(shorter.reset_every, shorter.every))


def after_step(
    policy: Default,
    state: State,
    generator: torch.Generator,
    weights: Callable[[], Tensor],
) -> None:
    """Refines where it is time, then resets where it is time. `weights` is not called."""
    step = state.step
    since = since_reset(step, policy.reset_every, policy.stop)
    paused = since is not None and since < policy.reset_pause
    if policy.start < step < policy.stop and step % policy.every == 0 and not paused:
        grow(
            state,
            generator,
            gradient=policy.gradient_abs if policy.absgrad else policy.gradient,
            small=policy.small,
            shrink=policy.shrink,
            revised_opacity=policy.revised_opacity,
        )
        _prune(policy, state)
        clear_sums(state)
    if is_reset(step, policy.reset_every, policy.stop):
        reset_opacities(state, 2 * policy.prune_opacity)


def _prune(policy: Default, state: State) -> None:
    gone = state.parameters["opacities"].double().sigmoid() < policy.prune_opacity
    if state.step > policy.large_from:
        scales = state.parameters["scales"].double().exp()
        gone |= (scales > policy.prune_large * state.extent).any(1)
    count = int(gone.sum())
    if count:
        keep_rows(state, ~gone)
        log(state, "prune", count)
