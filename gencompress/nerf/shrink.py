"""From a trained field to what its file holds: cells emptied, numbers rounded, both fitted once
more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gencompress.nerf.field import Field
from gencompress.nerf.render import psnr, render_rays
from gencompress.nerf.score import scores
from gencompress.nerf.storage import cells_above, covered, sizes
from gencompress.views.rays import Shots, over, shot_rays

UNSEEN = 1e-3  # blend weight up to which nobody misses a sample
HARMLESS = 0.02  # dB that emptying cells may cost
FALLBACKS = (0.4, 0.2, 0.1, 0.02, 0.0)  # of the threshold, where it costs more
CHECK_RAYS = 1 << 15


def emptied(
    field: Field, shots: Shots, threshold: float, keep: float, generator: torch.Generator
) -> tuple[Field, Tensor, dict[str, Any]]:
    """The field with at most the share `keep` of its cells; what each cell shows [count], float32;
    and what was found, for the log.

    Cells whose saliency is at most `threshold` go, or less where that would change pictures by
    more than 0.02 dB. Of the others those stay that show most: by the largest blend weight of a
    sample in them on rays of the photos, which none has inside of what is opaque.
    """
    full = field_error(field, shots)
    for share in (1.0, *FALLBACKS):
        level = threshold * share
        cells = cells_above(field.logits, level)
        if field.cells is not None:  # one beside a kept one shares its corners
            cells &= field.cells
        small = with_cells(field, cells)
        change = psnr(field_error(small, shots)) - psnr(full)
        if change > -HARMLESS:
            break
    shown = scores("weight", small, len(field.logits) - 1, shots, generator)
    shown = shown.masked_fill(~small.cells.flatten(), 0.0)
    count = min(int((shown > UNSEEN).sum()), int(keep * len(shown)))
    if not count:
        raise ValueError(f"a budget of {keep:.3g} of the cells: nothing would be left to see")
    order = shown.argsort(descending=True, stable=True)
    small = _largest(field, small.cells, order, count)
    return small, shown, {
        "kind": "event", "event": "emptied", "threshold": level, "cells": count, "of": len(shown),
        "psnr_change": psnr(field_error(small, shots)) - psnr(full),
    }  # fmt: skip


def with_cells(field: Field, cells: Tensor) -> Field:
    """The field where only these cells of the saliency grid hold something; no rays sample the
    others."""
    return replace(field, cells=cells, occupancy=field.occupancy & covered(cells, field.occupancy))


def within(field: Field, shown: Tensor | None, limit: float) -> Field:
    """The field as a file of at most `limit` bytes: with fewer bits a number, then without the
    cells that show least, by what `emptied` found.

    Raises ValueError where not even one cell fits.
    """
    for bits in (b for b in (32, 16, 8, 6, 4) if b <= field.bits):
        storage = "quant" if bits <= 8 else field.storage
        if storage != "quant" and field.cells is None and storage != "faithful":
            storage = "faithful"
        small = replace(field, storage=storage, bits=bits)
        if sizes(small)["file bytes"] <= limit:
            return small
    if field.cells is None or shown is None:
        raise ValueError(
            f"a budget of {limit:g} bytes: with 4 bits a number the field takes "
            f"{sizes(small)['file bytes']}, and without a saliency grid there are no cells to "
            "empty; lower log2_rows"
        )
    order = shown.argsort(descending=True, stable=True)
    low, high = 0, int(field.cells.sum())
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        if sizes(_largest(small, small.cells, order, middle))["file bytes"] <= limit:
            low = middle
        else:
            high = middle
    if not low:
        least = sizes(_largest(small, small.cells, order, 1))["file bytes"]
        raise ValueError(f"a budget of {limit:g} bytes: one cell alone takes {least}")
    return _largest(small, small.cells, order, low)


def _largest(field: Field, cells: Tensor, order: Tensor, count: int) -> Field:
    """The field with the first of `order` among its cells, which has the shape of `cells`."""
    keep = torch.zeros(cells.numel(), dtype=torch.bool)
    keep[order[:count]] = True
    return with_cells(field, keep.view_as(cells))


@torch.no_grad()
def field_error(field: Field, shots: Shots) -> float:
    """Mean squared error over rays of the photos, always the same ones, before the background."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(shots.pixels), (CHECK_RAYS,), generator=generator)
    origins, directions, rgba = shot_rays(shots, index)
    behind = torch.tensor(field.background)
    wanted = over(rgba, behind)
    total = 0.0
    for o, d, w in zip(*(t.split(1 << 13) for t in (origins, directions, wanted)), strict=True):
        color, alpha, _ = render_rays(field, o, d)
        total += float((color + (1 - alpha[:, None]) * behind - w).square().sum())
    return total / wanted.numel()
