"""What the allocators rank with. A ranking is by float32 value, highest first; equal values (0.0
and -0.0 among them) go to the lower index. M blocks, N units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from gencompress_kernels.select import select_top
from torch import Tensor

# below this a stable sort takes under 5 ms (2 cores); the first call of the select op compiles
SELECT_FROM = 1 << 16


class Blocks(NamedTuple):
    """`size` neighbours in the rank of one group each, highest first; the last may be smaller."""

    keys: Tensor  # float32 [M], mean score
    prices: Tensor  # float64 [M], total cost
    begins: Tensor  # int64 [M], rank of the first unit
    ends: Tensor  # int64 [M], rank after the last unit
    order: Tensor  # int64 [N], the ranking of the units
    size: int


def split(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    return list(torch.split(flat, list(sizes)))


def top_flat(values: Tensor, count: int) -> Tensor:
    """bool [N]: exactly the `count` highest of float32 [N]."""
    if values.numel() >= SELECT_FROM:
        return select_top(values, count)
    return top_rows(values.unsqueeze(0), count).squeeze(0)


def top_rows(rows: Tensor, count: int) -> Tensor:
    """bool [R, N]: exactly the `count` highest of each row of float32 [R, N]."""
    order = rows.sort(dim=1, descending=True, stable=True).indices[:, :count]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True)


def bounds(sizes: Sequence[int], floor: int, cap: int | None) -> tuple[int, int]:
    """Fewest and most units that floor and cap of groups of these sizes allow."""
    most = sizes if cap is None else [min(size, cap) for size in sizes]
    return sum(min(size, floor) for size in sizes), sum(most)


def check_count(count: int, least: int, most: int) -> None:
    if not least <= count <= most:
        raise ValueError(f"cannot keep {count} units: floors, caps and sizes allow {least}-{most}")


def pick(groups: list[Tensor], count: int, floor: int, cap: int | None) -> list[Tensor]:
    """Exactly `count` over all groups: the reserved floor of each, then one ranking of the rest.

    float32 [N] per group in, bool [N] per group out. ValueError where floors, caps and sizes do
    not allow the count.
    """
    sizes = [len(group) for group in groups]
    least, most = bounds(sizes, floor, cap)
    check_count(count, least, most)
    if not groups:
        return []
    flat = torch.cat(groups)
    if floor == 0 and cap is None:
        return split(top_flat(flat, count), sizes)
    keep = torch.cat([top_flat(group, min(floor, len(group))) for group in groups])
    rest = ~keep
    if cap is not None:
        rest &= torch.cat([top_flat(group, min(cap, len(group))) for group in groups])
    keep[rest] = top_flat(flat[rest], count - least)
    return split(keep, sizes)


def blocks(scores: Tensor, cost: Tensor, size: int, per_cost: bool) -> Blocks:
    """Ranks one group (float32 [N], float64 [N]; `per_cost`: by score / cost) on the CPU."""
    value = scores.to("cpu", torch.float32)
    if per_cost:  # what is free and scores at all ranks first
        value = (value.double() / cost.clamp_min(torch.finfo(torch.float64).tiny)).float()
    order = value.sort(descending=True, stable=True).indices
    begins = torch.arange(0, len(order), size)
    ends = (begins + size).clamp_max(len(order))
    which = torch.arange(len(order)) // size
    zeros = torch.zeros(len(begins), dtype=torch.float64)
    keys = zeros.index_add(0, which, value[order].double()) / (ends - begins)
    keys = keys.nan_to_num(math.inf, math.inf, -math.inf)  # inf and -inf in one block: keep
    prices = zeros.index_add(0, which, cost[order])
    return Blocks(keys.float(), prices, begins, ends, order, size)


def unblock(taken: Tensor, block: Blocks) -> Tensor:
    """bool [N] from the blocks taken (bool [M]); the smaller last one counts if all are taken."""
    num = len(block.order)
    if num % block.size and not bool(taken.all()):
        taken = taken.clone()
        taken[-1] = False
    keep = torch.zeros(num, dtype=torch.bool)
    keep[block.order] = taken.repeat_interleave(block.size)[:num]
    return keep


def walk(prices: Tensor, room: float, look_ahead: int) -> Tensor:
    """bool [M]: takes in order what still fits in `room`, ends after `look_ahead` misses."""
    taken = torch.zeros(len(prices), dtype=torch.bool)
    start, misses = 0, 0
    while start < len(prices) and misses <= look_ahead:
        spent = prices[start : start + 65536].cumsum(0)  # in chunks: a miss adds one up again
        fits = int(torch.searchsorted(spent, torch.tensor(room, dtype=spent.dtype), right=True))
        taken[start : start + fits] = True
        room -= float(spent[fits - 1]) if fits else 0.0
        missed = fits < len(spent)
        start += fits + missed
        misses += missed
    return taken
