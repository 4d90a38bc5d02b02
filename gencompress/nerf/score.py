"""What a cell of the saliency grid is worth: its learned saliency, or a baseline measured on a
field that has none."""

from __future__ import annotations

import torch
from gencompress_kernels.composite import composite
from torch import Tensor

from gencompress.nerf.field import Field
from gencompress.nerf.render import densities, march
from gencompress.nerf.storage import corner_peaks
from gencompress.views.rays import Shots, shot_rays

RAYS, BATCH = 1 << 17, 1 << 13  # that look for the weight of cells; marched at once
PROBES = 64  # points a cell, that look for its density

BASELINES = ("random", "density", "weight")


def scores(name: str, field: Field, side: int, shots: Shots, generator: torch.Generator) -> Tensor:
    """float32 [side^3], one for each cell, larger means keep.

    Args:
        name: saliency (the largest of the cell's corners), density (the largest at random points),
            weight (the largest blend weight of a sample on random rays of the photos) or random.
        side: cells a side.
    """
    if name == "saliency":
        return corner_peaks(field.logits).flatten()
    if name == "random":
        return torch.rand(side**3, generator=generator)
    if name == "density":
        return _densest(field, side, generator)
    if name != "weight":
        raise ValueError(f"score {name!r}: known are saliency, {', '.join(BASELINES)}")
    return _heaviest(field, side, shots, generator)


@torch.no_grad()
def _heaviest(field: Field, side: int, shots: Shots, generator: torch.Generator) -> Tensor:
    found = torch.zeros(side**3)
    for index in torch.randint(len(shots.pixels), (RAYS,), generator=generator).split(BATCH):
        origins, directions, _ = shot_rays(shots, index)
        packed, points, distances, steps = march(field, origins, directions, None)
        density = densities(field, points)
        weights = composite(density, torch.zeros_like(points), steps, packed, distances)[3]
        found.scatter_reduce_(0, cell_of(points, side), weights, "amax")
    return found


@torch.no_grad()
def _densest(field: Field, side: int, generator: torch.Generator) -> Tensor:
    found = torch.zeros(side**3)
    place = field.occupancy.nonzero().float()
    for _ in range(max(1, PROBES * side**3 // max(1, field.occupancy.numel()))):
        noise = torch.rand(len(place), 3, generator=generator)
        for points in ((place + noise) / len(field.occupancy)).split(1 << 18):
            found.scatter_reduce_(0, cell_of(points, side), densities(field, points), "amax")
    return found


def cell_of(points: Tensor, side: int) -> Tensor:
    """int64 [M]: the cell, x slowest, of points [M, 3] of the unit cube."""
    x, y, z = (points * side).long().clamp(0, side - 1).unbind(-1)
    return (x * side + y) * side + z
