"""Units: what may be removed from a model, and what each of them costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Scores = dict[str, Tensor]
"""float32 [count] per group, or [experts, count]. A larger score means keep."""


class Slice(NamedTuple):
    """Part of a named tensor: `width` entries per unit along `axis`; unit u starts at
    `start + u * width`."""

    parameter: str
    axis: int = 0
    start: int = 0
    width: int = 1


@dataclass(frozen=True)
class Units:
    """One group of removable units. All slices a unit owns are cut together."""

    name: str
    kind: str  # head, channel, block, weight, token, cell, splat or face
    cost: Tensor  # float64 [count], in the currency of the budget
    owns: tuple[Slice, ...] = ()
