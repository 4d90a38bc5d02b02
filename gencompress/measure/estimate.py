"""A number measured on a sample, with the interval that the sample leaves open.

Intervals are bootstrap intervals of 95% (Efron 1979): the images are drawn again with replacement
and the number is computed anew. Drawing repeats images, and that alone raises a distance between
sets; so the draws are shifted until their mean is the measured value. An interval says how much
other images of the same model would change the number. It knows nothing of a bias that every
sample of this size has, as FID does; and where a distance is all but zero, it is up to twice as
wide as need be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
NORMAL = 1.959963984540054  # quantile of the normal distribution, both sides together
RESAMPLES = 1000  # for a mean; the ends of the interval then move by a few percent of its width

Statistic = Callable[[Tensor], "Tensor | float"]  # rows [N, ...] -> one number


@dataclass(frozen=True)
class Estimate:
    """One measured number. Compare it with others of the same name and count only."""

    name: str  # the metric and, in brackets, the encoder whose features were compared
    value: float
    low: float  # ends of the 95% interval
    high: float
    count: int  # images, or prompts, behind it


def bootstrap(
    rows: Tensor,
    name: str,
    generator: torch.Generator,
    *,
    statistic: Statistic | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A statistic of independent rows [N, ...], the mean unless another is given.

    Args:
        generator: on the CPU; advanced.

    Raises:
        ValueError: fewer than two rows, or resamples below 2.
    """
    statistic = statistic or _mean
    _check_rows(rows)
    draws = [
        float(statistic(rows[draw(len(rows), generator).to(rows.device)]))
        for _ in range(check_resamples(resamples))
    ]
    return around(float(statistic(rows)), torch.tensor(draws, dtype=torch.float64), name, len(rows))


def paired_difference(
    before: Tensor,
    after: Tensor,
    name: str,
    generator: torch.Generator,
    *,
    statistic: Statistic | None = None,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Statistic of `after` minus statistic of `before`; positive where `after` has the larger one.

    Row i of both belongs to the same prompt and seed, and both are drawn by the same indices, so
    what the two have in common cancels. Two intervals of 95% that overlap do not mean no
    difference; an interval of the difference that leaves out 0 does mean one.

    Args:
        before, after: [N, ...], numbers or features of images.
        statistic: the mean unless another is given, e.g. `lambda rows: frechet(rows, real)`.
        generator: on the CPU; advanced.

    Raises:
        ValueError: other shapes, fewer than two rows, or resamples below 2.
    """
    statistic = statistic or _mean
    if before.shape != after.shape:
        raise ValueError(
            f"rows of shape {tuple(before.shape)} and {tuple(after.shape)}, "
            "expected pairs of the same shape"
        )
    _check_rows(before)
    after = after.to(before.device)

    def difference(index: Tensor | slice) -> float:
        return float(statistic(after[index])) - float(statistic(before[index]))

    draws = [
        difference(draw(len(before), generator).to(before.device))
        for _ in range(check_resamples(resamples))
    ]
    return around(
        difference(slice(None)), torch.tensor(draws, dtype=torch.float64), name, len(before)
    )


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Ends of the 95% interval of a share (Wilson 1927), which stays within [0, 1] and has a width
    also where none or all hit. Raises ValueError for a share that cannot be."""
    if not 0 <= hits <= count or count < 1:
        raise ValueError(f"{hits} of {count}, expected 0 to all of 1 or more")
    share, square = hits / count, NORMAL**2 / count
    middle = (share + square / 2) / (1 + square)
    half = math.sqrt(square * (share * (1 - share) + square / 4)) / (1 + square)
    # at the ends rounding would leave a sliver
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == count else middle + half)


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Indices int64 [count] on the CPU of one draw with replacement out of `count`."""
    return torch.randint(count, (count,), generator=generator)


def around(value: float, draws: Tensor, name: str, count: int) -> Estimate:
    """The estimate of a value whose resampled values are `draws`, [B]."""
    outside = (1 - LEVEL) / 2
    ends = torch.tensor([outside, 1 - outside], dtype=torch.float64)
    shifted = draws.cpu().double() - draws.mean().cpu() + value
    low, high = shifted.quantile(ends).tolist()
    return Estimate(name, value, low, high, count)


def check_resamples(resamples: int) -> int:
    if resamples < 2:
        raise ValueError(f"resamples is {resamples}, expected at least 2")
    return resamples


def _mean(rows: Tensor) -> Tensor:
    return rows.double().mean()


def _check_rows(rows: Tensor) -> None:
    if rows.ndim < 1 or len(rows) < 2:
        raise ValueError(f"rows of shape {tuple(rows.shape)}, expected at least 2 for an interval")
