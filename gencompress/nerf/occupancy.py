"""Which cells of space rays take samples in: a running maximum of the optical thickness of a step.

Values decay by 0.95 an update and are raised to what a random point of the cell shows, as in
Instant-NGP and nerfacc. Cells that no camera sees hold -1 and are never sampled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gencompress.nerf.field import Field, Space
from gencompress.nerf.render import densities
from gencompress.views.camera import Camera, pixel_rays

DECAY, THICKNESS = 0.95, 0.01  # of the values; above which a cell is occupied
EVERY, WARM_UP = 16, 256  # steps between updates; steps in which an update looks at every cell
COARSE = 4  # cells to a block, whose visibility is decided at once
MOST_THICKNESS = 1e6
BLOCK = 1 << 18  # points evaluated at once


def first_values(field: Field, cameras: Sequence[Camera]) -> Tensor:
    """[N, N, N] float32: -1 where no camera sees the cell, else 0; for a field whose occupancy is
    known already, enough to stay occupied for a while where it is.

    What is seen is decided by blocks of 4 cells a side, on the safe side: a block is seen where the
    ball around it may touch the picture.
    """
    space, size = field.space, len(field.occupancy)
    coarse = size // COARSE
    corners = torch.linspace(0, 1, coarse + 1, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(corners, corners, corners, indexing="ij"), -1)
    world, known = to_world(space, grid.view(-1, 3))
    world, known = world.view(*grid.shape), known.view(grid.shape[:3])
    low = high = world
    for axis in range(3):  # contracted, a block's corner of least x may not be that of its least y
        low = torch.minimum(low.narrow(axis, 0, coarse), low.narrow(axis, 1, coarse))
        high = torch.maximum(high.narrow(axis, 0, coarse), high.narrow(axis, 1, coarse))
    centres, radii = ((low + high) / 2).view(-1, 3), (high - low).norm(dim=-1).view(-1) / 2
    seen = ~(known[:-1, :-1, :-1] & known[1:, 1:, 1:]).reshape(-1)  # to infinity: may be seen
    for camera in cameras:
        seen |= _may_see(camera, centres, radii)
    values = torch.where(seen, 0.0, -1.0).view((coarse,) * 3)
    for axis in range(3):
        values = values.repeat_interleave(size // coarse, axis)
    if bool(field.occupancy.all()):
        return values
    return torch.where(field.occupancy & (values == 0), 2 * THICKNESS, values)


def _may_see(camera: Camera, centres: Tensor, radii: Tensor) -> Tensor:
    """bool [M]: whether the picture, as wide as its lens makes it, may touch each ball."""
    view = camera.world_to_camera
    x, y, z = (centres @ view[:3, :3].T + view[:3, 3]).unbind(-1)
    near = z.abs() <= radii  # around the camera's own plane
    depth = z.clamp(min=1e-12)
    found = z > 0
    for along, (least, most) in zip((x, y), _frame(camera), strict=True):
        # a ball ends radius / cos(angle of its end) / depth beside its middle
        found &= along / depth >= least - radii / depth * math.hypot(1, least)
        found &= along / depth <= most + radii / depth * math.hypot(1, most)
    return found | near


def _frame(camera: Camera) -> list[tuple[float, float]]:
    """The least and the largest x/z and y/z that the picture shows."""
    across, down = torch.arange(camera.width + 1.0), torch.arange(camera.height + 1.0)
    border = [torch.stack([across, torch.full_like(across, y)], 1) for y in (0, camera.height)]
    border += [torch.stack([torch.full_like(down, x), down], 1) for x in (0, camera.width)]
    lens = replace(camera, world_to_camera=torch.eye(4, dtype=torch.float64))
    rays = pixel_rays(lens, torch.cat(border))[1]
    plane = rays[:, :2] / rays[:, 2:]
    return list(zip(plane.amin(0).tolist(), plane.amax(0).tolist(), strict=True))


def to_world(space: Space, points: Tensor) -> tuple[Tensor, Tensor]:
    """World positions [M, 3] of points of the unit cube, and where they are finite (bool [M]).

    Contracted space is the inverse of x -> (2 - 1/|x|) x/|x| outside |x| = 1, the largest
    coordinate, of the box as [-1, 1]^3.
    """
    low, high = space.box(points)
    if not space.contracted:
        return low + points * (high - low), torch.ones(len(points), dtype=torch.bool)
    y = points * 4 - 2
    size = y.abs().amax(-1, keepdim=True)
    known = size[..., 0] < 2 - 1e-6
    stretch = torch.where(size > 1, 1 / ((2 - size).clamp(min=1e-6) * size.clamp(min=1)), 1.0)
    return (low + high) / 2 + y * stretch * (high - low) / 2, known


def updated(field: Field, values: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """The values after a look at the field: at all cells during the first `WARM_UP` steps, then at
    a quarter of them drawn at random and as many of those that are occupied."""
    flat = values.flatten()
    if step < WARM_UP:
        cells = (flat >= 0).nonzero()[:, 0]
    else:
        many = len(flat) // 4
        drawn = torch.randint(len(flat), (many,), generator=generator)
        full = occupied(values).flatten().nonzero()[:, 0]
        if len(full) > many:
            full = full[torch.randint(len(full), (many,), generator=generator)]
        cells = torch.cat([drawn[flat[drawn] >= 0], full])
    size = len(values)
    place = torch.stack([cells // size**2, cells // size % size, cells % size], dim=-1)
    points = (place + torch.rand(len(cells), 3, generator=generator)) / size
    found = torch.cat([densities(field, part) for part in points.split(BLOCK)] or [points[:, 0]])
    decayed = torch.where(flat >= 0, flat * DECAY, flat)
    # what is no number counts as full: left out, it would never show in the loss
    thickness = (found * field.space.step).nan_to_num(MOST_THICKNESS).clamp(max=MOST_THICKNESS)
    decayed.scatter_reduce_(0, cells, thickness, "amax")
    return decayed.view_as(values)


def occupied(values: Tensor) -> Tensor:
    """bool: cells above `THICKNESS`, or above their own mean where that is lower."""
    there = values[values >= 0]
    if not len(there):
        return torch.zeros_like(values, dtype=torch.bool)
    return values > min(THICKNESS, float(there.mean()))
