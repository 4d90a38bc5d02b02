"""Marching in readable torch, one step of all rays at a time: the definition of correct.

Every backend does this arithmetic in this order, so that it keeps the same samples to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    origins: Tensor,
    directions: Tensor,
    jitter: Tensor,
    occupancy: Tensor,
    box: Tensor,
    step: float,
    cone: float,
    near: float,
    far: float,
    contracted: bool,
    most: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """packed, points, distances, steps."""
    starts, speeds = to_unit(origins, directions, box, contracted)
    first, leave = span(starts, speeds, jitter, step, cone, near, far, contracted)
    found, here, count = [], first, torch.zeros_like(first, dtype=torch.int64)
    walking, number = here < leave, first.new_zeros(())
    while bool(walking.any()):
        point = place(starts, speeds, here, contracted)
        x, y, z = (point * len(occupancy)).long().unbind(1)
        keep = walking & occupancy[x, y, z] & (count < most)
        count += keep
        found.append(torch.where(keep, here, torch.nan))
        number += 1
        ahead = first + number * step if cone == 0 else here + length(here, step, cone)
        # far out, a step may be too short to move a number at all
        walking = walking & (ahead > here) & (ahead < leave)
        here = ahead
    packed = torch.stack([count.cumsum(0) - count, count], 1)
    if not found:
        return packed, origins.new_empty(0, 3), origins.new_empty(0), origins.new_empty(0)
    table = torch.stack(found, 1)
    ray, column = table.isfinite().nonzero(as_tuple=True)
    distances = table[ray, column]
    points = place(starts[ray], speeds[ray], distances, contracted)
    return packed, points, distances, length(distances, step, cone)


def length(distances: Tensor, step: float, cone: float) -> Tensor:
    """What a sample at that distance stands for."""
    return (cone * distances).clamp_min(step)


def to_unit(
    origins: Tensor, directions: Tensor, box: Tensor, contracted: bool
) -> tuple[Tensor, Tensor]:
    """Rays in coordinates where the box is [0, 1]^3, contracted [-1, 1]^3."""
    scale = 1 / (box[1] - box[0])
    starts, speeds = (origins - box[0]) * scale, directions * scale
    return (starts * 2 - 1, speeds * 2) if contracted else (starts, speeds)


def span(
    starts: Tensor,
    speeds: Tensor,
    jitter: Tensor,
    step: float,
    cone: float,
    near: float,
    far: float,
    contracted: bool,
) -> tuple[Tensor, Tensor]:
    """First sample [R], and the distance [R] that all lie before."""
    enter, leave = torch.full_like(jitter, near), torch.full_like(jitter, far)
    moving = (speeds != 0).any(1)
    if not contracted:
        low, high = (0 - starts) / speeds, (1 - starts) / speeds
        still = speeds == 0
        within = (starts >= 0) & (starts <= 1)
        low = torch.where(still, -torch.inf, torch.minimum(low, high))
        high = torch.where(still, torch.inf, torch.maximum((0 - starts) / speeds, high))
        moving = moving & (within | ~still).all(1)
        enter = enter.maximum(low.amax(1))
        leave = leave.minimum(high.amin(1))
    first = enter + jitter * length(enter, step, cone)
    return first, torch.where(moving, leave, -torch.inf)


def place(starts: Tensor, speeds: Tensor, distances: Tensor, contracted: bool) -> Tensor:
    """[M, 3] in [0, 1): where samples lie in the grid."""
    points = starts + distances[:, None] * speeds
    if contracted:
        size = points.abs().amax(1, keepdim=True)
        points = torch.where(size > 1, points * ((2 - 1 / size) / size), points) * 0.25 + 0.5
    return points.clamp(0, 1 - torch.finfo(points.dtype).eps / 2).nan_to_num(0)
