"""Removal by the distribution of opacity instead of a fixed threshold (after 6DOPE-GS).

At a fixed cadence the splats below the 5th percentile go, for as long as the 95th percentile of
opacity is under a set value; growth is that of the default policy (Jin, Prasad, Jauhri et al.,
ICCV 2025). So an event removes a bounded share, N 0.95^k is left after k events without growth,
and removal ends by itself. The paper leaves open the value, the cadence and what follows a reset:
those rules are ours.

What it cannot do: opacity says nothing of coverage, so faint splats that make up hair, haze or
glass erode, and redundant opaque ones stay; and a few opaque splats satisfy the stop test while a
long faint tail survives. It keeps a run steady rather than compressing it most; the statistics
other than opacity are there for that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gencompress.core.allocate import ROUNDING
from gencompress.core.ranking import top_flat
from gencompress.core.schedule import cubic
from gencompress.splat.density.common import (
    CADENCE,
    RECOVERY,
    RESET,
    check,
    clear_sums,
    is_reset,
    log,
    logit,
    rescaled,
    reset_opacities,
    since_reset,
    whole_cadences,
)
from gencompress.splat.density.growth import grow
from gencompress.splat.state import State, keep_rows

INVISIBLE = logit(1 / 255)  # the rasterizer skips what is fainter, so it can never come back
FLOORS = {
    "grow_from": 0, "grow_until": 0, "grow_every": CADENCE, "prune_from": 0, "prune_until": 0,
    "prune_every": CADENCE, "newborn": CADENCE, "reset_every": RESET, "reset_pause": RECOVERY,
}  # fmt: skip
Weights = Callable[[], Tensor]


@dataclass(frozen=True)
class Percentile:
    """Step counts are for a run of 30,000."""

    prune_from: int = 500  # steps; removals come from this one on
    prune_until: int = 15_000  # steps; and before this one
    prune_every: int = 100  # steps between removals
    prune_offset: int = 50  # steps after a multiple of prune_every: growth has the multiples
    statistic: str = "opacity"  # a name of `STATISTICS`; what goes is lowest in it
    low: float = 0.05  # 0 to 1, rank of the statistic below which a splat may go
    fraction: float = 0.05  # 0 to 1, largest share that goes at once
    high: float = 0.95  # 0 to 1, rank of the opacity that decides whether any goes
    theta: float = 0.9  # 0 to 1, opacity at that rank from which on none goes
    theta_resets: float = 0.7  # the same where opacities are reset
    visible_only: bool = False  # ranks are among splats seen since the last refinement
    newborn: int = 100  # steps; younger splats stay, else clones of faint parents die at once
    min_count: int = 1000  # splats; no removal leaves fewer
    max_fraction: float = 0.5  # 0 to 1, largest share that goes within a window
    window: int = 10  # removals
    target: int = 0  # splats at the last removal, approached on a cubic schedule; 0: no budget
    grow_from: int = 500  # steps; growth comes after this one
    grow_until: int = 15_000  # steps; growth and resets come before this one; 0: none
    grow_every: int = 100  # steps
    gradient: float = 2e-4  # mean norm per view in normalised units above which a splat grows
    absgrad: bool = False  # the gradient note sums absolute values over pixels (AbsGS)
    gradient_abs: float = 8e-4  # the same threshold where `absgrad` is on (gsplat)
    small: float = 0.01  # of the extent; larger splats are split, others cloned
    shrink: float = 1.6  # > 0, the scales of children are divided by it
    revised_opacity: bool = False  # two splats from one share its opacity
    reset_every: int = 0  # steps; 0: never
    reset_opacity: float = 0.01  # in (0, 1)
    reset_pause: int = 500  # steps without removal by rank after a reset, at least a quarter period

    def __post_init__(self) -> None:
        check(
            self,
            steps=("prune_every", "grow_every", "window"),
            shares=("low", "fraction", "high", "theta", "theta_resets", "max_fraction"),
            opacities=("reset_opacity",),
        )
        if self.statistic not in STATISTICS:
            raise ValueError(f"unknown statistic {self.statistic!r}; known: {list(STATISTICS)}")
        if 0 < self.target < self.min_count:
            raise ValueError(
                f"target is {self.target}, fewer than min_count ({self.min_count}): lower both"
            )


def opacity(state: State, weights: Weights) -> Tensor:
    """As logit: the same order, and no two values round to the same opacity of 1."""
    return state.parameters["opacities"]


def opacity_visibility(state: State, weights: Weights) -> Tensor:
    """Opacity times how often the splat was visible since the last refinement."""
    return state.parameters["opacities"].double().sigmoid() * state.notes["seen"]


def blend_weight(state: State, weights: Weights) -> Tensor:
    """Sum of alpha times transmittance over the training views."""
    found = weights()
    if tuple(found.shape) != (len(state),):
        raise ValueError(f"weights are {tuple(found.shape)}, expected ({len(state)},)")
    return found


def volume(state: State, weights: Weights) -> Tensor:
    """Product of the scales, as logarithm; an area for surfels."""
    return state.parameters["scales"].double().sum(1)


STATISTICS: dict[str, Callable[[State, Weights], Tensor]] = {
    "opacity": opacity,
    "opacity_visibility": opacity_visibility,
    "blend_weight": blend_weight,
    "volume": volume,
}


def scaled(policy: Percentile, steps: int) -> Percentile:
    """The policy for a run of `steps`."""
    shorter = rescaled(policy, steps, FLOORS)
    return replace(
        shorter,
        prune_offset=policy.prune_offset * shorter.prune_every // policy.prune_every,
        reset_every=whole_cadences(shorter.reset_every, shorter.grow_every),
    )


def removals(policy: Percentile) -> range:
    """The steps after which splats are removed."""
    first = max(policy.prune_from, 1)
    first += (policy.prune_offset - first) % policy.prune_every
    return range(first, policy.prune_until, policy.prune_every)


def after_step(
    policy: Percentile, state: State, generator: torch.Generator, weights: Weights
) -> None:
    """Removes, grows and resets, each where it is time."""
    step, times = state.step, removals(policy)
    if step in times:
        _remove(policy, state, weights)
    if step > policy.grow_from and step % policy.grow_every == 0:
        # what grew after the last removal would be over the budget
        in_time = not policy.target or not times or step < times[-1]
        if step < policy.grow_until and in_time:
            grow(
                state,
                generator,
                gradient=policy.gradient_abs if policy.absgrad else policy.gradient,
                small=policy.small,
                shrink=policy.shrink,
                revised_opacity=policy.revised_opacity,
            )
        clear_sums(state)
    if is_reset(step, policy.reset_every, policy.grow_until):
        reset_opacities(state, policy.reset_opacity)


def lowest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """bool [N]: the `count` smallest of `values` [N] where `among` [N], or all of those.

    By float32 value; of equal values the lower index stays, as everywhere in `core.allocate`.
    """
    rows = among.nonzero().squeeze(1)
    stays = top_flat(values[rows].float(), max(len(rows) - count, 0))
    chosen = torch.zeros_like(among)
    chosen[rows[~stays]] = True
    return chosen


def _remove(policy: Percentile, state: State, weights: Weights) -> None:
    """What cannot be seen goes at every event; the rest by budget or by percentile."""
    room = max(len(state) - policy.min_count, 0)
    logits = state.parameters["opacities"]
    gone = lowest(logits, logits < INVISIBLE, room)
    room -= int(gone.sum())
    choose = _over_budget if policy.target else _low_percentile
    gone = choose(policy, state, weights, gone, room)
    count = int(gone.sum())
    if count:
        keep_rows(state, ~gone)
        log(state, "prune", count)


def _low_percentile(
    policy: Percentile, state: State, weights: Weights, gone: Tensor, room: int
) -> Tensor:
    """`gone` and the splats below the low rank, while the high one is under theta. What is gone
    already counts towards the share that may go."""
    pool = _pool(policy, state)
    logits, num = state.parameters["opacities"][pool], int(pool.sum())
    if _paused(policy, state) or not num:
        return gone
    highest = logits.kthvalue(int(policy.high * (num - 1)) + 1).values
    theta = policy.theta_resets if policy.reset_every else policy.theta
    if highest.double().sigmoid() >= theta:
        return gone
    values = STATISTICS[policy.statistic](state, weights)
    low = lowest(values, pool, _share(policy.low, num)) & _grown(policy, state) & ~gone
    allowed = min(_share(policy.fraction, num), _window_room(policy, state)) - int(gone.sum())
    return gone | lowest(values, low, max(min(allowed, room), 0))


def _over_budget(
    policy: Percentile, state: State, weights: Weights, gone: Tensor, room: int
) -> Tensor:
    """`gone` and as many more as the cubic schedule asks for.

    Newborns stay and a reset's pause holds, but not at the last event: it meets the target.
    """
    first, last = removals(policy)[0], removals(policy)[-1]
    goal, start = policy.target, _start_count(policy, state)
    if state.step < last:
        goal = max(goal, math.ceil(cubic(state.step, first, last, policy.target, start)))
    count = min(len(state) - int(gone.sum()) - goal, room)
    if count <= 0 or (_paused(policy, state) and state.step != last):
        return gone
    values = STATISTICS[policy.statistic](state, weights)
    first_choice = lowest(values, _pool(policy, state) & _grown(policy, state) & ~gone, count)
    gone = gone | first_choice
    if state.step == last:
        gone = gone | lowest(values, ~gone, count - int(first_choice.sum()))
    return gone


def _share(share: float, num: int) -> int:
    return math.floor(share * num + ROUNDING)


def _pool(policy: Percentile, state: State) -> Tensor:
    """bool [N]: the splats whose ranks count."""
    seen = state.notes["seen"]
    return seen > 0 if policy.visible_only else torch.ones_like(seen, dtype=torch.bool)


def _grown(policy: Percentile, state: State) -> Tensor:
    """bool [N]: old enough to go."""
    return state.step - state.notes["born"] >= policy.newborn


def _paused(policy: Percentile, state: State) -> bool:
    """After a reset no opacity is over 0.01: the high rank is under theta whatever the scene."""
    since = since_reset(state.step, policy.reset_every, policy.grow_until)
    return since is not None and since < max(policy.reset_pause, policy.reset_every / 4)


def _window_room(policy: Percentile, state: State) -> int:
    """How many more may go within the window, which ends with this event."""
    begin = state.step - policy.window * policy.prune_every
    recent = [e for e in state.events if e["event"] == "prune" and e["step"] > begin]
    before = recent[0]["splats"] + recent[0]["count"] if recent else len(state)
    return max(_share(policy.max_fraction, before) - sum(e["count"] for e in recent), 0)


def _start_count(policy: Percentile, state: State) -> int:
    """Splats there were at the first removal, which the log remembers."""
    for event in state.events:
        if event["event"] == "budget":
            return event["splats"]
    log(state, "budget", policy.target)
    return len(state)
