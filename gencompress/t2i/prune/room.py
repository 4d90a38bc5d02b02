"""A budget of the whole denoiser, told as what the units that can go may cost together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gencompress.core.budget import Budget, Unit, budget_text
from gencompress.core.mask import Mask
from gencompress.core.units import Units
from gencompress.measure import macs
from gencompress.measure.cost import parameter_bytes, parameters
from gencompress.t2i import coupling
from gencompress.t2i.pipeline import denoiser
from gencompress.t2i.quality import forward_inputs


@dataclass(frozen=True, eq=False)
class Room:
    """Units with their cost in the budget's unit, and the limit for those that stay."""

    units: list[Units]
    unit: Unit
    total: float  # of the whole denoiser, or of all units where units are counted
    limit: float  # of the units that stay

    def cost(self, mask: Mask) -> float:
        """Of the units that a mask keeps."""
        return sum(float(group.cost[mask.keep[group.name]].sum()) for group in self.units)

    @property
    def fixed(self) -> float:
        """What no mask removes."""
        return self.total - sum(float(group.cost.sum()) for group in self.units)

    def predicted(self) -> dict[str, float]:
        """For `--dry-run`."""
        share = (self.fixed + self.limit) / self.total
        return {f"{self.unit} before": self.total, f"most {self.unit}": share * self.total}

    def kept(self, mask: Mask) -> dict[str, Any]:
        """What a mask leaves: {"units", "of", "cost", "share", "unit"}, cost with what is fixed."""
        cost = self.fixed + self.cost(mask)
        return {
            "units": mask.num_kept, "of": mask.num_units, "cost": cost, "share": cost / self.total,
            "unit": self.unit,
        }  # fmt: skip


def room_for(pipe: Any, kinds: Sequence[str], budget: Budget, size: int) -> Room:
    """The room that a budget leaves in the denoiser of a pipeline.

    Parameters, bytes (of its weights, as they are stored) and MACs (of one forward for a picture of
    `size` pixels) are those of the whole denoiser; units are those of `kinds`.

    Raises:
        ValueError: so little would stay that even without any unit it were more; or a unit of
            budget that pruning does not know.
    """
    model, _ = denoiser(pipe)
    groups = coupling.units(model, kinds)
    if budget.unit == "units":
        groups = [replace(g, cost=torch.ones_like(g.cost)) for g in groups]
        total = float(sum(g.cost.numel() for g in groups))
    elif budget.unit == "params":
        total = float(parameters(model))
    elif budget.unit == "bytes":
        total = float(parameter_bytes(model))
        each = total / parameters(model)
        groups = [replace(g, cost=g.cost * each) for g in groups]
    elif budget.unit == "macs":
        found = macs.by_module(model, forward_inputs(pipe, size))
        groups, total = coupling.priced(groups, model, found), sum(found.values())
    else:
        raise ValueError(f"a budget in {budget.unit}: prune knows units, params, bytes and macs")
    amount = budget.amount * total if budget.relative else min(budget.amount, total)
    room = Room(groups, budget.unit, total, amount)
    left = amount - room.fixed
    if left <= 0:
        raise ValueError(
            f"cannot keep {budget_text(budget)}: {room.fixed / total:.0%} of the {budget.unit} "
            f"belong to no {' or '.join(kinds)}"
        )
    return replace(room, limit=left)
