"""A budget of the whole denoiser, told as what the units that can go may cost together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gencompress.core.allocate import ROUNDING
from gencompress.core.budget import Budget, Unit, budget_text
from gencompress.core.mask import Mask
from gencompress.core.units import Units
from gencompress.measure import macs
from gencompress.measure.cost import parameters
from gencompress.t2i import coupling
from gencompress.t2i.formats import stored_type
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import forward_inputs

SLACK = 1e-12  # of sums of costs


@dataclass(frozen=True)
class Floors:
    """What stays of every layer, whatever the budget. Blocks may all go."""

    heads_or_channels: int = 1  # at least
    multiple: int = 1  # of channels, or all there are; a head counts as many as it is wide
    share: float = 0.0  # of each layer, at least


@dataclass(frozen=True, eq=False)
class Room:
    """Units with their cost in the budget's unit, and the limit for those that stay."""

    units: list[Units]
    unit: Unit
    total: float  # of the whole denoiser, or of all units where units are counted
    limit: float  # of the units that stay
    fewest: dict[str, int]  # units that stay in each group

    def cost(self, mask: Mask) -> float:
        """Of the units that a mask keeps."""
        return sum(float(group.cost[mask.keep[group.name]].sum()) for group in self.units)

    def holds(self, mask: Mask) -> bool:
        """Whether a mask is within the limit, up to the rounding of sums."""
        return self.cost(mask) <= self.limit * (1 + SLACK)

    @property
    def fixed(self) -> float:
        """What no mask removes."""
        return self.total - sum(float(group.cost.sum()) for group in self.units)

    @property
    def floor_cost(self) -> float:
        """Of the units that stay in any case."""
        return sum(float(g.cost[: self.fewest[g.name]].sum()) for g in self.units)

    @property
    def budget(self) -> Budget:
        """The limit, with what is fixed."""
        return Budget(self.fixed + self.limit, self.unit)

    def predicted(self) -> dict[str, float]:
        """For `--dry-run`."""
        return {
            f"{self.unit} before": self.total,
            f"most {self.unit}": self.budget.amount,
            f"least {self.unit} possible": self.fixed + self.floor_cost,
        }

    def kept(self, mask: Mask) -> dict[str, Any]:
        """What a mask leaves: {"units", "of", "cost", "share", "unit", "budget"}, cost and budget
        with what is fixed."""
        cost = self.fixed + self.cost(mask)
        return {
            "units": mask.num_kept, "of": mask.num_units, "cost": cost, "share": cost / self.total,
            "unit": self.unit, "budget": self.budget.amount,
        }  # fmt: skip


def room_for(
    pipe: Any, kinds: Sequence[str], budget: Budget, size: int, floors: Floors = Floors()
) -> Room:
    """The room that a budget leaves in the denoiser of a pipeline.

    Parameters, bytes (of all that its file holds, in the `stored_type`) and MACs (of one forward
    for a picture of `size` pixels) are those of the whole denoiser; units are those of `kinds`.

    Raises:
        ValueError: less would stay than is possible, which the text says; a unit of budget that
            pruning does not know, or limits within the budget.
    """
    if (budget.scope, budget.floor, budget.cap, budget.round_to) != ("global", 0, None, 1):
        raise ValueError(
            "a budget with scope, floor, cap or round_to: prune has settings of its own, allocate, "
            "floor and multiple"
        )
    model, _ = denoiser(pipe)
    groups = prunable(model, kinds)
    if budget.unit == "units":
        groups = [replace(g, cost=torch.ones_like(g.cost)) for g in groups]
        total = float(sum(g.cost.numel() for g in groups))
    elif budget.unit == "params":
        total = float(parameters(model))
    elif budget.unit == "bytes":
        each = getattr(torch, stored_type(model)).itemsize
        groups = [replace(g, cost=g.cost * each) for g in groups]
        total = float(sum(tensor.numel() for tensor in model.state_dict().values()) * each)
    elif budget.unit == "macs":
        found = macs.by_module(model, forward_inputs(pipe, size))
        groups, total = coupling.priced(groups, model, found), sum(found.values())
    else:
        raise ValueError(f"a budget in {budget.unit}: prune knows units, params, bytes and macs")
    amount = budget.amount * total if budget.relative else min(budget.amount, total)
    room = Room(groups, budget.unit, total, amount, fewest(groups, floors))
    left = amount - room.fixed
    if left <= 0 or left < room.floor_cost * (1 - SLACK):
        least = room.fixed + room.floor_cost
        raise ValueError(
            f"cannot keep {budget_text(budget)}: {least:,.0f} {budget.unit} "
            f"({math.ceil(1000 * least / total) / 10:g}%) is the least, of which {room.fixed:,.0f} "
            f"belong to no {' or '.join(kinds)}"
        )
    return replace(room, limit=left)


def prunable(model: nn.Module, kinds: Sequence[str]) -> list[Units]:
    """The groups of these kinds that do not overlap: where a block holds others (Transformer2DModel
    in SDXL), those within it are units, and it is none."""
    groups = coupling.units(model, kinds)
    blocks = [group.name for group in groups if group.kind == "block"]
    return [
        group
        for group in groups
        if group.kind != "block" or not any(name.startswith(f"{group.name}.") for name in blocks)
    ]


def fewest(groups: Sequence[Units], floors: Floors) -> dict[str, int]:
    """How many units each group keeps at least."""
    found = {}
    for group in groups:
        least = max(
            floors.heads_or_channels, math.ceil(floors.share * group.cost.numel() - ROUNDING)
        )
        found[group.name] = 0 if group.kind == "block" else least
    return in_multiples(found, groups, floors.multiple)


def in_multiples(counts: dict[str, int], groups: Sequence[Units], multiple: int) -> dict[str, int]:
    """As `coupling.round_up` does with masks: the next multiple of channels, or all there are."""
    readers = coupling.consumers(groups)
    found = {}
    for group in groups:
        width = readers[group.name][0].width if readers[group.name] else multiple
        step = multiple // math.gcd(multiple, width)
        found[group.name] = min(-(-counts[group.name] // step) * step, group.cost.numel())
    return found
