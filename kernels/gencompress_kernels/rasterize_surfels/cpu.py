"""Surfel rasterisation on the CPU with numba: tiles are the tasks, rows of 16 pixels the vectors.

Built like the splat rasterizer: `cpu_project` computes a 96-byte record a surfel and lists, tile by
tile and nearest first, the surfels that may touch it; `_blend` walks each list with the surfel as
the outer and a row of 16 pixels as the inner loop; statistics get one slot per (tile, surfel) pair
and are summed afterwards in a fixed order. No atomics: the same result with any number of threads.
Floor: 80 float operations and one division for each pixel of each row that a pair covers, and the
pictures once; 50,000 surfels at 512 x 512 cover 1.7 million rows.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.rasterize_splats.cpu import E1, E2, E3, E4, E5, E6, _sum_slots
from gencompress_kernels.rasterize_surfels.cpu_project import (
    BOTTOM,
    D0,
    DEPTH,
    DX,
    DY,
    LOW_X,
    LOW_Y,
    NORMAL_X,
    NORMAL_Y,
    NORMAL_Z,
    OPACITY,
    RED,
    TILE,
    TOP,
    UX,
    UY,
    VX,
    VY,
    X,
    Y,
    f32,
    project,
    tile_lists,
)
from gencompress_kernels.rasterize_surfels.reference import (
    LOW_PASS,
    MAX_ALPHA,
    MEDIAN,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    NEAR,
    Drawn,
    Gradients,
    Pictures,
    Shot,
)

# where in a row of a tile its parts start (after red, green, blue), and in the scratch of a row
LEFT, FAR_SUM, MEDIANS, NORMALS, SPREAD = (TILE * k for k in (3, 4, 5, 6, 9))
PLANES = 10
SPAN = PLANES * TILE
ALPHAS, DEPTHS, INVERSE, HIT, WEIGHTS, REACHED = (TILE * k for k in range(6))
SCRATCH = 12 * TILE
CUT = f32(11.2)  # of u^2 + v^2: beyond, alpha is under 1/255 whatever the opacity


def forward(shot: Shot, background: Tensor, statistics: bool) -> Drawn:
    """float32. As the reference, and what `backward` needs."""
    width, height = shot.width, shot.height
    records, boxes = project(shot)
    order, offsets, pairs = tile_lists(records, boxes, width, height)
    planes = np.empty((len(order), TILE, PLANES, TILE), f32)
    slots = np.empty((len(pairs) if statistics else 0, 4), f32)
    _blend(records, order, offsets, pairs, width, height, planes, slots, statistics)
    totals = np.zeros((len(records) if statistics else 0, 4), f32)
    _sum_slots(pairs, slots, totals)
    images = [np.empty((height, width, 3)[: 3 if k in (0, 4) else 2], f32) for k in range(6)]
    _untile(planes, background.numpy(), *images)
    arrays = (totals, records, offsets, pairs)
    return Drawn(Pictures(*map(torch.from_numpy, images)), *map(torch.from_numpy, arrays))


def backward(
    shot: Shot,
    background: Tensor,
    drawn: Pictures,
    incoming: Pictures,
    saved: list[Tensor],
    absolute: bool,
    poses: bool,
) -> Gradients:
    """float32. As the reference; an empty tensor in `incoming` is a gradient of 0."""
    from gencompress_kernels.rasterize_surfels.cpu_backward import backward

    return backward(shot, background, drawn, incoming, saved, absolute, poses)


# The loops over a row below are free of branches and touch few arrays, each a slice that starts at
# 0 with its parts at constant offsets: the compiler then sees that parts do not overlap, and makes
# one vector loop of it. The same work on a dozen small arrays takes four times as long, and so does
# a running maximum inside the loop; a sum does no harm.


@jit.inline
def _row_hits(r, x0, y, s):
    """A surfel along a row of pixel centres (x0, y), (x0 + 1, y) ...: alphas, 0 below 1/255, and
    depths; 1 / below and 1 where the plane is hit, 1 and 0 where the low-pass is smaller. Returns
    the sum of alphas."""
    dy, dx0, lx0, ly = y - r[Y], x0 - r[X], x0 - r[LOW_X], y - r[LOW_Y]
    u0, v0, d0 = r[UY] * dy, r[VY] * dy, r[D0] + r[DY] * dy
    ux, vx, dd, opacity = r[UX], r[VX], r[DX], r[OPACITY]
    z, near = r[DEPTH], f32(NEAR)
    plane_z = z * r[D0]
    ly = f32(LOW_PASS) * ly * ly
    total = f32(0.0)
    for x in range(TILE):
        dx = dx0 + f32(x)
        lx = lx0 + f32(x)
        low = min(f32(LOW_PASS) * lx * lx + ly, CUT)
        u, v, below = ux * dx + u0, vx * dx + v0, dd * dx + d0
        squared = u * u + v * v
        is_hit = (
            (squared <= low * (below * below)) & (below > f32(1e-30)) & (plane_z >= near * below)
        )
        inverse = f32(1.0) / (below if is_hit else f32(1.0))
        s[HIT + x] = f32(1.0) if is_hit else f32(0.0)
        s[INVERSE + x] = inverse
        s[DEPTHS + x] = (plane_z if is_hit else z) * inverse
        # -q / 8 for the eighth power of the polynomial of the splats
        t = min((squared if is_hit else low) * inverse * inverse, CUT) * f32(-0.0625)
        e = f32(1.0) + t * (E1 + t * (E2 + t * (E3 + t * (E4 + t * (E5 + t * E6)))))
        e *= e
        e *= e
        e *= e
        alpha = min(opacity * e, f32(MAX_ALPHA))
        alpha = alpha if alpha >= f32(MIN_ALPHA) else f32(0.0)
        s[ALPHAS + x] = alpha
        total += alpha
    return total


@jit.inline
def _row_blend(row, s, r):
    """Blends a row. Returns the sum of transmittances, 0 when every pixel is finished."""
    red, green, blue = r[RED], r[RED + 1], r[RED + 2]
    nx, ny, nz = r[NORMAL_X], r[NORMAL_Y], r[NORMAL_Z]
    open_sum = f32(0.0)
    for x in range(TILE):
        left, alpha, z = row[LEFT + x], s[ALPHAS + x], s[DEPTHS + x]
        before = max(left, f32(0.0))
        after = before * (f32(1.0) - alpha)
        reached = alpha * before
        stop = after <= f32(MIN_TRANSMITTANCE)
        w = f32(0.0) if stop else reached
        left = -abs(left) if stop else after
        s[WEIGHTS + x], s[REACHED + x], row[LEFT + x] = w, reached, left
        crosses = (before > f32(MEDIAN)) & (after <= f32(MEDIAN)) & (w > f32(0.0))
        row[MEDIANS + x] += z if crosses else f32(0.0)
        # 2 w (z A - D), with A = 1 - transmittance and D the sum of w z so far
        far = row[FAR_SUM + x]
        row[SPREAD + x] += f32(2.0) * w * (z * (f32(1.0) - before) - far)
        row[FAR_SUM + x] = far + w * z
        row[x] += w * red
        row[TILE + x] += w * green
        row[2 * TILE + x] += w * blue
        row[NORMALS + x] += w * nx
        row[NORMALS + TILE + x] += w * ny
        row[NORMALS + 2 * TILE + x] += w * nz
        open_sum += f32(0.0) if stop else after
    return open_sum


@jit.inline
def _row_statistics(best, winner, s, pair, sums):
    """Weight, largest weight and count of a row go to `sums`; moves the winners on."""
    total, largest, touched = f32(0.0), f32(0.0), f32(0.0)
    for x in range(TILE):
        w = s[WEIGHTS + x]
        total += w
        touched += f32(1.0) if w > f32(0.0) else f32(0.0)
    for x in range(TILE):
        largest = max(largest, s[REACHED + x])
    for x in range(TILE):
        winner[x] = pair if s[WEIGHTS + x] > best[x] else winner[x]
    for x in range(TILE):
        best[x] = max(best[x], s[WEIGHTS + x])
    sums[0] += total
    sums[1] = max(sums[1], largest)
    sums[2] += touched


@jit.inline
def _open_rows(plane, x0, y0, width, height, span):
    """Transmittance 1 inside the picture; beyond it stays 0 and is never blended."""
    for row in range(TILE):
        for x in range(TILE):
            if x0 + f32(x) < width and y0 + f32(row) < height:
                plane[row * span + LEFT + x] = f32(1.0)


@jit.inline
def _row_range(r, y0):
    """First and last + 1 row of a tile whose pixel centres lie inside the bounds."""
    first = int(math.ceil(max(r[TOP] - y0, f32(0.0))))
    last = int(math.floor(min(r[BOTTOM] - y0, f32(TILE)))) + 1
    return first, min(last, TILE)


@jit.parallel
def _blend(records, order, offsets, pairs, width, height, planes, slots, statistics):
    """Fills planes [tiles, 16 rows, 10, 16] (red, green, blue, transmittance, depth, median,
    normal, distortion) and, for statistics, slots [pairs, 4]. A finished pixel keeps its
    transmittance with the sign turned."""
    tiles_x = (width + TILE - 1) // TILE
    for i in numba.prange(len(order)):
        tile = order[i]
        x0 = f32((tile % tiles_x) * TILE) + f32(0.5)
        y0 = f32((tile // tiles_x) * TILE) + f32(0.5)
        plane = planes[tile].reshape(TILE * SPAN)
        plane[:] = f32(0.0)
        _open_rows(plane, x0, y0, width, height, SPAN)
        s = np.zeros(SCRATCH, f32)
        best = np.zeros(TILE * TILE, f32)
        winner = np.full(TILE * TILE, -1, np.int32)
        alive = np.ones(TILE, np.uint8)
        num_alive = TILE
        start, end = offsets[tile], offsets[tile + 1]
        for p in range(start, end):
            if num_alive == 0:
                end = p
                break
            r = records[pairs[p]]
            if statistics:
                slots[p, :] = f32(0.0)
            first, last = _row_range(r, y0)
            for row in range(first, last):
                if alive[row] == 0:
                    continue
                if _row_hits(r, x0, y0 + f32(row), s) == f32(0.0):
                    continue
                if _row_blend(plane[row * SPAN : (row + 1) * SPAN], s, r) <= f32(0.0):
                    alive[row] = 0
                    num_alive -= 1
                if statistics:
                    at = row * TILE
                    _row_statistics(
                        best[at : at + TILE], winner[at : at + TILE], s, np.int32(p - start),
                        slots[p],
                    )  # fmt: skip
        if statistics:
            slots[end : offsets[tile + 1]] = f32(0.0)
            for x in range(TILE * TILE):
                if winner[x] >= 0:
                    slots[start + winner[x], 3] += f32(1.0)


@jit.parallel
def _untile(planes, background, colors, alphas, depths, medians, normals, distortions):
    height, width = alphas.shape
    tiles_x = (width + TILE - 1) // TILE
    for y in numba.prange(height):
        first = (y // TILE) * tiles_x
        for x in range(width):
            row = planes[first + x // TILE, y % TILE].reshape(SPAN)
            at = x % TILE
            left = abs(row[LEFT + at])
            for k in range(3):
                colors[y, x, k] = row[k * TILE + at] + left * background[k]
                normals[y, x, k] = row[NORMALS + k * TILE + at]
            alphas[y, x] = f32(1.0) - left
            depths[y, x] = row[FAR_SUM + at]
            medians[y, x] = row[MEDIANS + at]
            distortions[y, x] = row[SPREAD + at]
