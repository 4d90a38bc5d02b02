"""How many splats a budget leaves: counts, or bytes of the file they make."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gencompress.core.allocate import Budget
from gencompress.splat import quality
from gencompress.splat.cloud import SplatCloud, rows


def count_within(cloud: SplatCloud, found: Tensor, budget: Budget, suffix: str) -> int:
    """How many splats the budget leaves, at least one.

    Bytes are those of the best-scored splats as a file with this suffix: exact for formats of a
    fixed size a splat, a first estimate for .spz and .sog.

    Raises ValueError for a unit splats do not have, and for a budget below one splat.
    """
    num = len(cloud)
    if budget.unit == "units":
        count = int(budget.amount * num + 1e-9) if budget.relative else int(budget.amount)
    elif budget.unit == "bytes":
        limit = bytes_limit(cloud, budget, suffix)
        order = found.argsort(descending=True, stable=True)
        count = _largest_within(
            num, limit, lambda n: quality.encoded_bytes(rows(cloud, order[:n]), suffix)
        )
    else:
        raise ValueError(f"a budget in {budget.unit}: splats are counted, or weighed in bytes")
    return allowed(count, num, budget)


def allowed(count: int, num: int, budget: Budget) -> int:
    """The largest number up to `count` that cap and round_to allow; ValueError below the floor."""
    count = min(count, num, budget.cap or num)
    if count < num:
        count -= count % budget.round_to
    least = max(1, min(budget.floor, num))
    if count < least:
        raise ValueError(f"the budget leaves {count} of {num} splats, expected at least {least}")
    return count


def _largest_within(num: int, limit: float, size: Callable[[int], int]) -> int:
    """The largest count whose size is within the limit, to 1% for sizes that are not a line."""
    low, high = 1, num
    low_size, high_size = size(1), size(num)
    if high_size <= limit:
        return num
    if low_size > limit:
        raise ValueError(f"a budget of {limit:.0f} bytes does not hold one splat ({low_size})")
    for _ in range(10):
        if high - low <= 1:
            break
        guess = low + int((limit - low_size) / (high_size - low_size) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        at = size(guess)
        if at <= limit:
            low, low_size = guess, at
        else:
            high, high_size = guess, at
    return low


def bytes_limit(cloud: SplatCloud, budget: Budget, suffix: str) -> float | None:
    """The bytes a budget allows; None for a budget in splats."""
    if budget.unit != "bytes":
        return None
    if not budget.relative:
        return budget.amount
    return budget.amount * quality.encoded_bytes(cloud, suffix)
