"""Marching with Triton: a lane walks a ray, first to count its samples, then to write them.

The arithmetic is the reference's, in its order, without fused multiply-add, so that the samples are
the same to the bit. Their number is the size of the result, so the host waits for it once a call.
Floor: 28 bytes a kept sample; what binds is the time of a lookup, step after step, since 4,096 rays
are 128 warps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.march_rays import reference
from gencompress_kernels.triton_launch import launch, single

RAYS = 32  # of a program: one warp
BELOW_ONE = tl.constexpr(1 - 2.0**-24)


@triton.jit
def _bound(p):
    # what is no number becomes a place inside, too
    return tl.minimum(tl.where(p > 0, p, 0.0), BELOW_ONE)


@triton.jit
def _place(t, ax, ay, az, vx, vy, vz, CONTRACTED: tl.constexpr):
    x, y, z = ax + t * vx, ay + t * vy, az + t * vz
    if CONTRACTED:
        size = tl.maximum(tl.maximum(tl.abs(x), tl.abs(y)), tl.abs(z))
        far = size > 1
        size = tl.where(far, size, 1.0)
        factor = tl.div_rn(2 - tl.div_rn(tl.full(size.shape, 1.0, tl.float32), size), size)
        x = tl.where(far, x * factor, x) * 0.25 + 0.5
        y = tl.where(far, y * factor, y) * 0.25 + 0.5
        z = tl.where(far, z * factor, z) * 0.25 + 0.5
    return _bound(x), _bound(y), _bound(z)


@triton.jit
def _march(
    firsts, leaves, starts, speeds, grid, counts, begins, points, distances, steps, rays, side,
    size, step, cone, most, CONE: tl.constexpr, CONTRACTED: tl.constexpr, WRITE: tl.constexpr,
    RAYS: tl.constexpr,
):  # fmt: skip
    """Fills counts [R], or, where WRITE, from `begins` on what they count."""
    ray = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    some = ray < rays
    first = tl.load(firsts + ray, mask=some, other=0.0)
    leave = tl.load(leaves + ray, mask=some, other=0.0)
    ax = tl.load(starts + 3 * ray, mask=some, other=0.0)
    ay = tl.load(starts + 3 * ray + 1, mask=some, other=0.0)
    az = tl.load(starts + 3 * ray + 2, mask=some, other=0.0)
    vx = tl.load(speeds + 3 * ray, mask=some, other=0.0)
    vy = tl.load(speeds + 3 * ray + 1, mask=some, other=0.0)
    vz = tl.load(speeds + 3 * ray + 2, mask=some, other=0.0)
    count = tl.zeros([RAYS], tl.int32)
    at = count.to(tl.int64)
    if WRITE:
        at = tl.load(begins + ray, mask=some, other=0)
    here, walking = first, some & (first < leave)
    number = tl.zeros([RAYS], tl.float32)
    going = tl.max(walking.to(tl.int32), 0)
    while going > 0:
        x, y, z = _place(here, ax, ay, az, vx, vy, vz, CONTRACTED)
        cell = ((x * size).to(tl.int32) * side + (y * size).to(tl.int32)).to(tl.int64) * side
        cell += (z * size).to(tl.int32)
        keep = walking & (tl.load(grid + cell, mask=walking, other=0) != 0)
        if WRITE:
            tl.store(points + 3 * at, x, mask=keep)
            tl.store(points + 3 * at + 1, y, mask=keep)
            tl.store(points + 3 * at + 2, z, mask=keep)
            tl.store(distances + at, here, mask=keep)
            tl.store(steps + at, tl.maximum(cone * here, step), mask=keep)
            at += keep.to(tl.int64)
        count += keep.to(tl.int32)
        if CONE:
            ahead = here + tl.maximum(cone * here, step)
        else:
            number += 1
            ahead = first + number * step
        # far out, a step may be too short to move a number at all
        walking = walking & (ahead > here) & (ahead < leave) & (count < most)
        here = ahead
        going = tl.max(walking.to(tl.int32), 0)
    if not WRITE:
        tl.store(counts + ray, count, mask=some)


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
    """float32. As the reference."""
    starts, speeds = reference.to_unit(single(origins), directions, box, contracted)
    first, leave = reference.span(starts, speeds, jitter, step, cone, near, far, contracted)
    counts = torch.empty(len(origins), dtype=torch.int32, device=origins.device)
    rays = first, leave, starts.contiguous(), speeds.contiguous(), occupancy.view(torch.int8)
    side = len(occupancy)
    sizes = len(origins), side, float(side), step, cone, min(most, (1 << 31) - 1)
    meta = {
        "CONE": cone > 0, "CONTRACTED": contracted, "RAYS": RAYS, "num_warps": 1,
        "enable_fp_fusion": False,
    }  # fmt: skip
    grid = (triton.cdiv(len(origins), RAYS),)
    nothing = (counts, first, first, first)
    launch(_march, grid, first, *rays, counts, *nothing, *sizes, WRITE=False, **meta)
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    packed = torch.stack([ends - counts, counts.long()], 1)
    points, distances, steps = (first.new_empty(s) for s in ((total, 3), total, total))
    if total:
        begins = packed[:, 0].contiguous()
        out = (begins, points, distances, steps)
        launch(_march, grid, first, *rays, counts, *out, *sizes, WRITE=True, **meta)
    return packed, points, distances, steps
