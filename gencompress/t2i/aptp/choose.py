"""The architectures that learnt codes stand for, within the budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gencompress.core.mask import Mask
from gencompress.t2i.aptp.architecture import PLAIN, Relaxation, kept
from gencompress.t2i.aptp.cost import MacsTable
from gencompress.t2i.aptp.experts import gate_values, harden, rounded

HALVINGS = 30  # of the range of the shift
FARTHEST = 32.0  # shift of all logits: past it everything or only the best of a slice is kept


def choose(
    logits: Tensor,
    loads: Tensor,
    model: Any,
    table: MacsTable,
    share: float,
    relaxation: Relaxation = PLAIN,
    multiple: int = 1,
) -> tuple[list[Mask], float]:
    """One mask for each code, and the shift at which they were read.

    While they were learnt noise decided, and the mean cost of noisy gates is not that of the
    likelier ones. So all logits are shifted alike until the mean over `loads` is as near under
    `share` of the MACs as it gets; a shift of 0 is the rule of `kept`.

    Args:
        logits: [K, D] of the codes.
        loads: [K] how many prompts go to each.
        multiple: of channels that every module keeps, see `experts.rounded`.

    Raises:
        ValueError: a share that no architecture has, or no loads.
    """
    table.prunable_target(share)  # checks
    if loads.shape != logits.shape[:1] or not float(loads.sum()) > 0:
        raise ValueError(f"loads {tuple(loads.shape)} of {len(logits)} codes, and some of them > 0")
    weight = loads.double().cpu() / float(loads.sum())

    def masks(shift: float) -> list[Mask]:
        how = replace(relaxation, offset=relaxation.offset + shift)
        found = [harden(row, table.layout) for row in kept(logits.detach(), table.layout, how)]
        if multiple > 1:
            found = [
                rounded(mask, row, model, table.layout, multiple)
                for mask, row in zip(found, logits.detach().cpu(), strict=True)
            ]
        return found

    def cost(found: list[Mask]) -> float:
        return float(weight @ costs(found, table))

    low, high = -FARTHEST, FARTHEST
    best = masks(low)
    if cost(best) > share * table.total:
        least = cost(best) / table.total
        raise ValueError(
            f"a target of {share:g} of the MACs: with multiples of {multiple} channels "
            f"these codes leave {least:.3f} or more"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = masks(middle)
        if cost(more) <= share * table.total:
            low, best = middle, more
        else:
            high = middle
    return best, low


def costs(masks: list[Mask], table: MacsTable) -> Tensor:
    """float64 [K]: MACs of each."""
    values = torch.stack([gate_values(mask, table.layout) for mask in masks])
    return table.current(values).cpu()
