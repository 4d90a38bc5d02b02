"""What an architecture costs in multiply-accumulates, by its gates.

Counted for the picture size that the experts are used at: where self-attention grows with the
square of the tokens, a budget met at a smaller size is not met there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gencompress.measure import analytic, macs
from gencompress.t2i import coupling
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.layout import Layout
from gencompress.t2i.aptp.losses import prunable_target

SLACK = 1e-12  # of the rounding of a share


@dataclass(frozen=True, eq=False)
class MacsTable:
    """MACs of a denoiser by entry of its layout.

    `entries`: float64 [D] on the CPU; of a width entry its own, of a depth entry those of the
    module that no width entry holds. `total`: of the dense model.
    """

    layout: Layout
    entries: Tensor
    total: float

    @property
    def prunable(self) -> float:
        """Of all entries: of modules with a depth gate everything counts."""
        return float(self.entries.sum())

    @property
    def fixed(self) -> float:
        """Of what no gate removes."""
        return self.total - self.prunable

    @property
    def least(self) -> float:
        """Of the smallest architecture: one entry of each slice, and of the depth entries only
        rank 0, which never goes."""
        values = torch.zeros(self.layout.size, dtype=torch.float64)
        values[list(self.layout.offsets)] = 1
        values[[self.layout.width + i for i in self.layout.order[:1]]] = 1
        return float(self.current(values))

    def current(self, values: Tensor) -> Tensor:
        """MACs of the model under these gates: [..., D] -> float64 [...].

        A depth gate multiplies everything in its module. Of gates of 0 and 1 it is to the last
        unit what a counter finds in the expert. Differentiable; straight-through values (0 and 1
        in the forward pass) give the gradient of the real cost.
        """
        return self.fixed + self._used(values)

    def ratio(self, values: Tensor) -> Tensor:
        """The part of the prunable MACs that is used, [..., D] -> float64 [...]; see
        `prunable_target`."""
        return self._used(values) / self.prunable

    def prunable_target(self, share: float) -> float:
        """The `ratio` at which the whole model costs `share` of the dense one.

        Raises ValueError for a share that no architecture has.
        """
        if not self.least * (1 - SLACK) <= share * self.total <= self.total:
            raise ValueError(
                f"a target of {share:g} of the MACs, expected {self.least / self.total:.3f} to 1: "
                f"{self.fixed:,.0f} of {self.total:,.0f} belong to nothing that has a gate"
            )
        return prunable_target(share, self.total, self.prunable)

    def _used(self, values: Tensor) -> Tensor:
        if values.shape[-1] != self.layout.size:
            raise ValueError(f"gates of {values.shape[-1]} entries, expected {self.layout.size}")
        values, entries = values.double(), self.entries.to(values.device)
        depth = values[..., self.layout.width :]
        outside = torch.cat([depth, torch.ones_like(depth[..., :1])], -1)
        around = outside[..., self._around.to(values.device)]
        return (values * around) @ entries

    @cached_property
    def _around(self) -> Tensor:
        """Per entry, the depth entry that multiplies it; the one behind the last is always 1."""
        none = len(self.layout.depth)
        found = []
        for one in self.layout.slices:
            found += [none if one.gated_by is None else one.gated_by] * one.length
        return torch.tensor([*found, *[none] * none])


def macs_table(model: nn.Module, layout: Layout, inputs: dict[str, Any]) -> MacsTable:
    """True MACs, counted in one forward with these inputs (`measure.macs.model_inputs`; of one
    sample, at the size of deployment). Model and inputs may be on the meta device.

    Raises ValueError where the layout is not one of this model.
    """
    return _table(model, layout, macs.by_module(model, inputs))


def paper_table(model: nn.Module, layout: Layout, latent: int) -> MacsTable:
    """MACs of a U-Net as the paper's tables count them (`measure.analytic.aptp`), for a square
    latent of side `latent`. Only to compare with the paper: they are no true count."""
    if macs.family(model) != "unet":
        raise ValueError(f"the paper counts U-Nets, got a {type(model).__name__}")
    return _table(model, layout, analytic.aptp_by_module(model, latent))


def _table(model: nn.Module, layout: Layout, found: Mapping[str, float]) -> MacsTable:
    priced = coupling.priced(gates.units(model, layout), model, found)
    slices, blocks = priced[: len(layout.slices)], priced[len(layout.slices) :]
    own = torch.cat([group.cost for group in blocks]) if blocks else torch.zeros(0).double()
    for one, group in zip(layout.slices, slices, strict=True):
        if one.gated_by is not None:
            own[one.gated_by] -= group.cost.sum()
    entries = torch.cat([*(group.cost for group in slices), own]).cpu()
    return MacsTable(layout, entries, float(sum(found.values())))
