"""Scores and a budget in, a mask out.

Ranking is by float32 value and by nothing else: equal scores (0.0 and -0.0 among them) go to the
lower index, groups in the order of the dict, so every device gives the same mask. NaN is refused
with the name of its group; infinities rank as they should. Scores of more than one axis rank as
if flattened, except under `scope="row"`, where each row of the last axis ranks by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import index

import torch
from torch import Tensor

from gencompress.core.budget import Budget as Budget
from gencompress.core.budget import Scope
from gencompress.core.budget import parse_budget as parse_budget
from gencompress.core.mask import Mask
from gencompress.core.ranking import (
    blocks,
    bounds,
    check_count,
    pick,
    split,
    top_flat,
    top_rows,
    unblock,
    walk,
)
from gencompress.core.score import pq_index, standardise
from gencompress.core.units import Scores, Units

# a share of a count such as 0.29 * 100 = 28.999999999999996 is 29; far below any real cost
ROUNDING = 1e-9


def top(
    scores: Scores,
    *,
    count: int | Mapping[str, int] | None = None,
    share: float | None = None,
    scope: Scope = "global",
    floor: int = 0,
    cap: int | None = None,
) -> Mask:
    """The highest scores, as many as asked for, exactly.

    `count` units, or the whole part of `share` (0 to 1) of them: over all groups, or in each group
    (a mapping gives each its own), or in each row. Each group first reserves its best `floor`
    units (or all it has), then one ranking of the rest fills up to the count, at most `cap` a
    group: global magnitude with minimum keep (GMP-MT) without iterations.

    Raises ValueError for a count that the floors, caps or sizes do not allow.
    """
    if (count is None) == (share is None):
        raise ValueError("top needs either count or share")
    if share is not None and not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0 to 1")
    if isinstance(count, Mapping) and (scope != "group" or count.keys() != scores.keys()):
        raise ValueError('a count per group needs scope="group" and the same group names')
    values = _checked(scores)
    if scope == "global":
        assert not isinstance(count, Mapping)
        flat = [group.flatten() for group in values.values()]
        return _mask(scores, pick(flat, _wanted(count, share, sum(map(len, flat))), floor, cap))
    picked = []
    for name, group in values.items():
        own = count[name] if isinstance(count, Mapping) else count
        if scope == "group":
            picked += pick([group.flatten()], _wanted(own, share, group.numel()), floor, cap)
        else:
            rows = _rows(group, scope)
            wanted = _wanted(own, share, rows.shape[1])
            check_count(wanted, *bounds([rows.shape[1]], floor, cap))
            picked.append(top_rows(rows, wanted))
    return _mask(scores, picked)


def threshold(scores: Scores, value: float, *, floor: int = 0, cap: int | None = None) -> Mask:
    """Every score of at least `value` (rounded to float32), at least the best `floor` of each
    group and at most its best `cap`."""
    if math.isnan(value):
        raise ValueError("threshold is NaN")
    picked = []
    for group in _checked(scores).values():
        flat = group.flatten()
        keep = flat >= torch.tensor(value, dtype=torch.float32, device=flat.device)
        keep |= top_flat(flat, min(floor, len(flat)))
        if cap is not None:
            keep &= top_flat(flat, min(cap, len(flat)))
        picked.append(keep)
    return _mask(scores, picked)


def within_budget(
    scores: Scores,
    units: Sequence[Units],
    budget: Budget,
    *,
    per_cost: bool = False,
    look_ahead: int = 64,
) -> Mask:
    """The highest scores whose total cost stays within the budget; never over it.

    The cost is 1 a unit for `unit="units"`, else `Units.cost` (which must be in that currency; a
    cost per unit serves every row of its group's scores). A share is of the total cost. Where all
    costs are equal the result is exact: one unit more would be over. Else one walk down the
    ranking takes every unit that still fits and ends after `look_ahead` that did not. `per_cost`
    ranks by score / cost. With `scope` "group" or "row" each gets the same share of its own cost.
    `round_to` keeps units in blocks of that many neighbours in rank, ranked by mean score.

    Raises ValueError if the floors alone are over the budget, if units and scores do not fit, or
    for `per_cost` with negative scores.
    """
    values = _checked(scores)
    if per_cost and any(bool((group < 0).any()) for group in values.values()):
        raise ValueError("score per cost needs scores of at least 0")
    costs = _costs(values, units, budget)
    total = sum(float(cost.sum()) for cost in costs.values())
    share = budget.amount if budget.relative else budget.amount / total if total else 1.0
    if budget.scope == "global":
        limit = budget.amount * total if budget.relative else budget.amount
        pools = [([v.flatten() for v in values.values()], list(costs.values()), limit)]
    else:
        pools = []
        for name, group in values.items():
            rows = _rows(group, budget.scope)
            for row, cost in zip(rows, costs[name].view(rows.shape), strict=True):
                pools.append(([row], [cost], share * float(cost.sum())))
    picked = []
    for groups, cost, limit in pools:
        picked += _fill(groups, cost, limit, budget, per_cost, look_ahead)
    if budget.scope != "global":
        picked = _regroup(scores, picked)
    return _mask(scores, picked)


def zscore_by_cost(scores: Scores, units: Sequence[Units], budget: Budget) -> Mask:
    """Scores standardised per group, then one ranking of all units within the budget: the
    allocation of FLAP, where a head costs more than a neuron."""
    if budget.scope != "global":
        raise ValueError(f"z-scores rank over all groups; the budget has scope {budget.scope!r}")
    return within_budget(standardise(scores), units, budget)


def adaptive(
    scores: Scores,
    *,
    among: Mask | None = None,
    scope: Scope = "group",
    p: float = 0.5,
    q: float = 1.0,
    gamma: float = 1.0,
    eta: float = 0.0,
    beta: float = 0.9,
) -> Mask:
    """A budget nobody had to name: each round removes what the PQ index of `scores` (>= 0, such
    as |w|) says can go (SAP, Diao et al. 2023).

    Of the d units that survive in `among` (all, if None), at least
    m = d (1 + eta)^(-q/(q-p)) (1 - I)^(pq/(q-p)) matter; floor(d min(gamma (1 - m/d), beta)) of the
    lowest go, by group, over all groups, or by row. Units outside `among` stay out.
    """
    values = _checked(scores)
    alive = among.keep if among else {n: torch.ones_like(v).bool() for n, v in values.items()}
    shapes = {name: tuple(keep.shape) for name, keep in alive.items()}
    if shapes != {name: tuple(group.shape) for name, group in values.items()}:
        raise ValueError("`among` has other groups or shapes than the scores")
    parts: list[tuple[Tensor, Tensor]] = []
    for name, group in values.items():
        rows = _rows(group, scope)
        parts += zip(rows, alive[name].to(group.device).view(rows.shape), strict=True)
    if scope == "global" and parts:
        parts = [(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))]
    picked = []
    for part, flags in parts:
        left = part[flags]
        keep = torch.zeros_like(flags)
        keep[flags] = top_flat(left, len(left) - _removable(left, p, q, gamma, eta, beta))
        picked.append(keep)
    return _mask(scores, _regroup(scores, picked))


def proportional(
    importance: Mapping[str, float], sizes: Mapping[str, int], keep: int, max_sparsity: float
) -> dict[str, int]:
    """How many units each group keeps, `keep` in all: none loses more than `max_sparsity` of its
    units, and what is left is shared out by the groups' importance (ECoFLaP, Sung et al. 2023).

    Shares beyond a group's size go to the others. Whole units come from the largest fractional
    part, ties to the earlier group. For `top(..., count=..., scope="group")`.

    Raises ValueError where `keep` is below the floors or above the number of units.
    """
    if importance.keys() != sizes.keys():
        raise ValueError("importance and sizes name different groups")
    if not 0 <= max_sparsity <= 1 or any(not 0 <= v < math.inf for v in importance.values()):
        raise ValueError("expected max_sparsity in [0, 1] and finite importance of at least 0")
    floors = {name: size * (1 - max_sparsity) for name, size in sizes.items()}
    if not sum(floors.values()) - ROUNDING <= keep <= sum(sizes.values()):
        raise ValueError(
            f"cannot keep {keep} of {sum(sizes.values())} units: a sparsity of at most "
            f"{max_sparsity} keeps {sum(floors.values()):g}"
        )
    exact = {name: float(math.ceil(floor - ROUNDING)) for name, floor in floors.items()}
    spare = keep - sum(exact.values())
    while spare > ROUNDING:
        hungry = [name for name in sizes if exact[name] < sizes[name]]
        weight = sum(importance[name] for name in hungry)
        given = {n: importance[n] / weight if weight else 1 / len(hungry) for n in hungry}
        for name in hungry:
            exact[name] = min(exact[name] + spare * given[name], float(sizes[name]))
        spare = keep - sum(exact.values())
    return _whole(exact, sizes, floors, keep)


def _whole(
    exact: dict[str, float], sizes: Mapping[str, int], floors: dict[str, float], keep: int
) -> dict[str, int]:
    """Whole numbers near `exact` that sum to `keep`."""
    kept = {name: math.floor(value + ROUNDING) for name, value in exact.items()}
    order = list(sizes)
    while (missing := keep - sum(kept.values())) != 0:
        step = 1 if missing > 0 else -1
        # floors were rounded up, so too many is possible as well: the last to have a claim gives
        rest = {name: step * ((floors if step < 0 else exact)[name] - kept[name]) for name in order}
        open_ = [n for n in order if (kept[n] < sizes[n] if step > 0 else kept[n] > 0)]
        best = max(open_, key=lambda n: (round(rest[n], 9), -step * order.index(n)))
        kept[best] += step
    return kept


def _checked(scores: Scores) -> Scores:
    """float32 copies where they are not; NaN refused."""
    for name, values in scores.items():
        bad = int(values.isnan().sum()) if values.is_floating_point() else 0
        if bad:
            raise ValueError(
                f"scores of group {name!r} hold NaN ({bad} of {values.numel()}): cannot be ranked"
            )
    return {name: values.detach().float() for name, values in scores.items()}


def _mask(scores: Scores, picked: list[Tensor]) -> Mask:
    pairs = zip(scores.items(), picked, strict=True)
    return Mask({name: keep.view(v.shape).to(v.device) for (name, v), keep in pairs})


def _regroup(scores: Scores, parts: list[Tensor]) -> list[Tensor]:
    """Rows in order, joined and split again at the group borders."""
    joined = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
    return split(joined, [values.numel() for values in scores.values()])


def _rows(values: Tensor, scope: Scope) -> Tensor:
    """[rows, width]: what ranks by itself, one row for the whole group unless scope is "row"."""
    width = values.shape[-1] if scope == "row" else values.numel()
    return values.reshape(-1, max(width, 1))


def _wanted(count: int | None, share: float | None, num: int) -> int:
    if count is not None:
        return index(count)
    assert share is not None
    return math.floor(share * num + ROUNDING)


def _costs(values: Scores, units: Sequence[Units], budget: Budget) -> dict[str, Tensor]:
    """float64 per flattened unit, on the CPU: the walk adds them in one fixed order."""
    if budget.unit == "units":
        return {n: torch.ones(v.numel(), dtype=torch.float64) for n, v in values.items()}
    by_name = {group.name: group.cost for group in units}
    if by_name.keys() != values.keys() or len(by_name) != len(units):
        raise ValueError(f"scores of groups {sorted(values)}, units of {sorted(by_name)}")
    costs = {}
    for name, group in values.items():
        cost = by_name[name].to("cpu", torch.float64)
        if group.numel() != cost.numel() and group.shape[-1:] != cost.shape:
            raise ValueError(
                f"group {name!r} has scores {tuple(group.shape)} but costs {tuple(cost.shape)}"
            )
        if not bool(((cost >= 0) & cost.isfinite()).all()):
            raise ValueError(f"group {name!r} has costs that are negative or not finite")
        spread = cost if group.numel() == cost.numel() else cost.expand(group.shape)
        costs[name] = spread.reshape(-1)
    return costs


def _fill(
    groups: list[Tensor],
    costs: list[Tensor],
    limit: float,
    budget: Budget,
    per_cost: bool,
    look_ahead: int,
) -> list[Tensor]:
    """One ranking over `groups` within `limit`."""
    limit *= 1 + 1e-12  # rounding of share x total, not a licence
    sizes = [len(group) for group in groups]
    if sum(sizes) == 0:
        return split(torch.zeros(0, dtype=torch.bool), sizes)
    cost = torch.cat(costs)
    if budget.round_to == 1 and bool((cost == cost[0]).all()):
        each = float(cost[0])
        least, most = bounds(sizes, budget.floor, budget.cap)
        _check_floor(least * each, limit)
        count = math.floor(limit / each) if each else most
        return pick(groups, min(count, most), budget.floor, budget.cap)
    pairs = zip(groups, costs, strict=True)
    ranked = [blocks(group, price, budget.round_to, per_cost) for group, price in pairs]
    prices = torch.cat([part.prices for part in ranked])
    cap = math.inf if budget.cap is None else budget.cap
    taken = torch.cat([part.begins < budget.floor for part in ranked])
    _check_floor(float(prices[taken].sum()), limit)
    order = torch.cat([part.keys for part in ranked]).sort(descending=True, stable=True).indices
    order = order[(~taken & torch.cat([part.ends <= cap for part in ranked]))[order]]
    taken[order[walk(prices[order], limit - float(prices[taken].sum()), look_ahead)]] = True
    kept = split(taken, [len(part.keys) for part in ranked])
    return [unblock(some, part) for some, part in zip(kept, ranked, strict=True)]


def _check_floor(cost: float, limit: float) -> None:
    if cost > limit:
        raise ValueError(f"the floors alone cost {cost:g}, the budget allows {limit:g}")


def _removable(left: Tensor, p: float, q: float, gamma: float, eta: float, beta: float) -> int:
    d = len(left)
    if d == 0:
        return 0
    matter = 1 - pq_index(left, p, q)
    bound: float = d * (1 + eta) ** (-q / (q - p)) * matter ** (p * q / (q - p))
    needed = min(math.ceil(bound - ROUNDING), d)
    return math.floor(d * min(max(gamma * (1 - needed / d), 0.0), beta) + ROUNDING)
