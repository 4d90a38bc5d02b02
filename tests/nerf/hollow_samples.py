"""Fields made by hand: as dense as wanted in some cells and exactly empty in the others, in colours
that tell along which direction they were seen."""

import math
from dataclasses import replace

import torch
from gencompress_kernels.hashgrid_encode import hashgrid_levels

from gencompress.nerf.field import THIN, Space, new_field

GLOW = 4.0  # colours are sigmoid of this times the direction
BOX = Space((-1.0, -1.0, -1.0), (1.0, 1.0, 1.0), step=0.02)


def voxel_field(kept, density=500.0, *, space=BOX, occupancy=None):
    """`kept` is bool [T-1, T-1, T-1]; rays take samples wherever `occupancy`, by default all of
    space, lets them."""
    kept = torch.as_tensor(kept)
    levels = hashgrid_levels(1, 2, 4, 4, 10)
    field = new_field(levels, space, torch.Generator().manual_seed(0), saliency=len(kept) + 1)
    first, second, third, fourth, fifth = (torch.zeros_like(layer) for layer in field.layers)
    first[0, 0] = 1.0  # the feature, which is the saliency: 1 in what follows
    second[0, 0] = math.log(density) + THIN
    for axis, (row, sign) in enumerate(((3, -1), (1, -1), (2, 1))):  # harmonics of x, y and z
        for side in (1, -1):
            unit = 2 * axis + (side < 0)
            third[15 + row, unit] = sign * side / 0.4886025119029199
            fourth[unit, unit] = 1.0
            fifth[unit, axis] = GLOW * side
    return replace(
        field,
        table=torch.ones_like(field.table),
        layers=(first, second, third, fourth, fifth),
        logits=torch.full_like(field.logits, 30.0),
        cells=kept,
        alpha=1e4,
        occupancy=torch.ones((16,) * 3, dtype=torch.bool) if occupancy is None else occupancy,
    )


def ball_cells(size, outer, inner=0.0):
    """bool [size]^3: cells whose middle is between two distances of the middle, in half boxes."""
    at = (torch.arange(size) + 0.5) / size * 2 - 1
    radius = torch.stack(torch.meshgrid(at, at, at, indexing="ij"), -1).norm(dim=-1)
    return (radius < outer) & (radius >= inner)
