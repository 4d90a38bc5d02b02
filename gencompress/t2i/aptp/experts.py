"""Architectures made hard, and experts cut from the pretrained weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gencompress.core.gate import best_of_none
from gencompress.core.mask import Mask
from gencompress.t2i import coupling
from gencompress.t2i.aptp import gates
from gencompress.t2i.aptp.layout import Layout


def harden(values: Tensor, layout: Layout) -> Mask:
    """One architecture for good: what has a gate of 0.5 or more is kept.

    `values`: [D], gates without noise, or whether each is kept (`architecture.kept`). A slice that
    would keep nothing keeps its largest entry, of equal ones the first; all depth gates may be off.
    The mask has a bool per entry, by slice [length] and by module with a depth gate [1].

    Raises ValueError for another shape and for NaN.
    """
    if values.shape != (layout.size,) or bool(values.isnan().any()):
        raise ValueError(
            f"values are {tuple(values.shape)}, expected ({layout.size},) and none of them NaN"
        )
    values = values.detach().float().cpu()
    keep = best_of_none(values >= 0.5, values, layout.lengths)
    return Mask(dict(zip(_names(layout), torch.split(keep, _lengths(layout)), strict=True)))


def rounded(mask: Mask, values: Tensor, model: nn.Module, layout: Layout, multiple: int) -> Mask:
    """Keeps the best of what was removed until each module keeps a multiple of `multiple` channels
    (8 or 16, for fast matrix products), or all of them. Costs MACs: count again after it.

    `values`: [D], what the entries are ranked by. Depth stays as it is.
    """
    slices, _ = layout.split(values.detach())
    ranks = {one.name: part for one, part in zip(layout.slices, slices, strict=True)}
    return coupling.round_up(mask, ranks, gates.units(model, layout), multiple)


def gate_values(mask: Mask, layout: Layout) -> Tensor:
    """The gates of a mask, 0 and 1: float32 [D] on the CPU."""
    names = _names(layout)
    shapes = {name: tuple(keep.shape) for name, keep in mask.keep.items()}
    if shapes != {name: (n,) for name, n in zip(names, _lengths(layout), strict=True)}:
        raise ValueError(f"a mask of {len(shapes)} groups that are not those of the layout")
    return torch.cat([mask.keep[name].cpu() for name in names]).float()


def unit_mask(mask: Mask, model: nn.Module, layout: Layout) -> Mask:
    """The mask of `coupling.units(model, coupling.KINDS)`: a gate of grouped neurons is one of each
    of them. Raises ValueError where mask, layout and model do not fit."""
    gate_values(mask, layout)  # checks
    gates.units(model, layout)
    counts = {g.name: g.cost.numel() for g in coupling.units(model, coupling.KINDS)}
    return Mask(
        {
            name: keep.repeat_interleave(counts[name] // keep.numel())
            for name, keep in mask.keep.items()
        }
    )


def expert(model: nn.Module, layout: Layout, mask: Mask) -> Any:
    """The denoiser that a mask leaves, as a Cut model of t2i/cut.py, which plain diffusers loads.

    Cut from the weights of `model`, which stays as it is; a dropped module passes its input on, in
    an up block of a U-Net without the skip. Raises ValueError where mask, layout and model do not
    fit.
    """
    groups = coupling.units(model, coupling.KINDS)
    return coupling.compact(model, groups, unit_mask(mask, model, layout))


def _names(layout: Layout) -> list[str]:
    return [*(one.name for one in layout.slices), *layout.depth]


def _lengths(layout: Layout) -> list[int]:
    return [*layout.lengths, *[1] * len(layout.depth)]
