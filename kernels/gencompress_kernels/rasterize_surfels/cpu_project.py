"""Where surfels fall on the screen, for the CPU passes: records, bounding ellipses, tile lists.

The ellipse u^2 + v^2 <= L, with L = 2 ln(255 opacity), bounds a surfel exactly where alpha reaches
1/255; its dual conic on the screen is M diag(L, L, -1) M^T. A surfel whose ellipse reaches the
plane of the camera has no bounds and is offered to every tile.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch

from gencompress_kernels import jit
from gencompress_kernels.rasterize_splats.cpu import (
    DEPTH,
    OPACITY,
    RED,
    TILE,
    _deal,
    _sort_by_depth,
    camera_place,
    f32,
)
from gencompress_kernels.rasterize_splats.cpu_harmonics import sh_color
from gencompress_kernels.rasterize_surfels.reference import (
    FAR,
    LOW_PASS,
    MAX_SLANT,
    MAX_VARIANCE,
    MIN_ALPHA,
    NEAR,
    Shot,
)

# Columns of a record, beside OPACITY to DEPTH (5 to 9), which the sort by depth needs in the places
# they have in a splat's record. At offset d from the projected mean X, Y:
# u = (UX dx + UY dy) / below, v = (VX dx + VY dy) / below, below = D0 + DX dx + DY dy > 0.
X, Y, LOW_X, LOW_Y, D0 = range(5)
UX, UY, VX, VY, DX, DY, NORMAL_X, NORMAL_Y, NORMAL_Z, TOP, BOTTOM = range(10, 21)
FACTOR = 21  # what the six were multiplied by, to keep their squares inside float32
RECORD = 24
# Columns of a box, the ellipse that bounds the surfel: middle, half sizes, x of the middle line per
# y, half width along y = middle, y of the rightmost point; and the half size of the low-pass disc.
BOX_X, BOX_Y, REACH_X, REACH_Y, LEAN, THICK, TIP, DISC = range(8)
UNBOUNDED = f32(1e9)
_LN_255 = math.log(255.0)


def project(shot: Shot) -> tuple[np.ndarray, np.ndarray]:
    """Records, float32 [N, 24], opacity 0 where a surfel is culled; and boxes, float32 [N, 8]."""
    if shot.means.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {shot.means.dtype}")
    records = np.zeros((shot.means.shape[0], RECORD), f32)
    boxes = np.zeros((shot.means.shape[0], 8), f32)
    surfels = (tensor.numpy() for tensor in shot[:7])
    _project(*surfels, camera_place(shot.viewmat), shot.width, shot.height, records, boxes)
    return records, boxes


def tile_lists(
    records: np.ndarray, boxes: np.ndarray, width: int, height: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which surfels each tile blends, nearest first.

    Returns the order in which workers take the tiles, int32 [tiles]; offsets, int64 [tiles + 1];
    and pairs, int32: tile t blends pairs[offsets[t]:offsets[t + 1]].
    """
    tiles_x, tiles_y = -(-width // TILE), -(-height // TILE)
    workers = min(numba.get_num_threads() * 4, tiles_y)
    bands = np.linspace(0, tiles_y, workers + 1).astype(np.int64)
    nearest = _sort_by_depth(records)
    counts = np.zeros(tiles_x * tiles_y + 1, np.int64)
    _count_pairs(records, boxes, nearest, bands, tiles_x, counts)
    offsets = np.zeros(len(counts), np.int64)
    np.cumsum(counts[:-1], out=offsets[1:])
    pairs = np.empty(offsets[-1], np.int32)
    _fill_pairs(records, boxes, nearest, bands, tiles_x, offsets[:-1].copy(), pairs)
    return _deal(counts[:-1]), offsets, pairs


@jit.parallel
def _project(
    means, quats, scales, opacities, sh, view, lens, position, width, height, records, boxes
):
    fx, fy, cx, cy = lens[0, 0], lens[1, 1], lens[0, 2], lens[1, 2]
    one, two = f32(1.0), f32(2.0)
    bands = sh.shape[1]
    for n in numba.prange(means.shape[0]):
        r = records[n]
        mx, my, mz = means[n, 0], means[n, 1], means[n, 2]
        z = view[2, 0] * mx + view[2, 1] * my + view[2, 2] * mz + view[2, 3]
        if z < f32(NEAR):
            continue
        if opacities[n] < f32(MIN_ALPHA):
            continue
        x = view[0, 0] * mx + view[0, 1] * my + view[0, 2] * mz + view[0, 3]
        y = view[1, 0] * mx + view[1, 1] * my + view[1, 2] * mz + view[1, 3]
        iz = one / z
        sx, sy = x * iz, y * iz

        qw, qx, qy, qz = quats[n, 0], quats[n, 1], quats[n, 2], quats[n, 3]
        norm = max(math.sqrt(qw * qw + qx * qx + qy * qy + qz * qz), f32(1e-12))
        qw, qx, qy, qz = qw / norm, qx / norm, qy / norm, qz / norm
        ax, ay = one - two * (qy * qy + qz * qz), two * (qx * qy + qw * qz)
        az = two * (qx * qz - qw * qy)
        bx, by = two * (qx * qy - qw * qz), one - two * (qx * qx + qz * qz)
        bz = two * (qy * qz + qw * qx)
        nx, ny = two * (qx * qz + qw * qy), two * (qy * qz - qw * qx)
        nz = one - two * (qx * qx + qy * qy)

        # the scaled tangents over z, in camera axes; then the Jacobian along them
        su, sv = scales[n, 0] * iz, scales[n, 1] * iz
        mu = su * (view[2, 0] * ax + view[2, 1] * ay + view[2, 2] * az)
        mv = sv * (view[2, 0] * bx + view[2, 1] * by + view[2, 2] * bz)
        xu = fx * (su * (view[0, 0] * ax + view[0, 1] * ay + view[0, 2] * az) - sx * mu)
        xv = fx * (sv * (view[0, 0] * bx + view[0, 1] * by + view[0, 2] * bz) - sx * mv)
        yu = fy * (su * (view[1, 0] * ax + view[1, 1] * ay + view[1, 2] * az) - sy * mu)
        yv = fy * (sv * (view[1, 0] * bx + view[1, 1] * by + view[1, 2] * bz) - sy * mv)
        size = mu * mu + mv * mv
        wide = max(xu * xu + xv * xv, yu * yu + yv * yv)
        if wide > f32(MAX_VARIANCE) or size > f32(MAX_SLANT):
            continue

        px, py = fx * sx + cx, fy * sy + cy
        det = xu * yv - xv * yu
        # rounding takes the logarithm of an opacity of 1/255 below zero
        limit = max(two * (math.log(opacities[n]) + f32(_LN_255)), f32(0.0))
        box, disc = boxes[n], math.sqrt(limit / f32(LOW_PASS)) + f32(0.01)
        low_x, low_y = f32(-FAR), f32(-FAR)
        if size < one:
            low_x = px - (xu * mu + xv * mv) / (one - size)
            low_y = py - (yu * mu + yv * mv) / (one - size)
        box[:] = f32(0.0)
        box[REACH_X], box[REACH_Y], box[THICK] = UNBOUNDED, UNBOUNDED, UNBOUNDED
        room = one - limit * size
        if room > f32(0.01):
            h = limit / room
            ox, oy = -h * (xu * mu + xv * mv), -h * (yu * mu + yv * mv)
            sxx = ox * ox + h * (xu * xu + xv * xv)
            sxy = ox * oy + h * (xu * yu + xv * yv)
            syy = oy * oy + h * (yu * yu + yv * yv)
            box[BOX_X], box[BOX_Y] = px + ox, py + oy
            # a hundredth of a pixel, and a ten thousandth, for the rounding
            box[REACH_X] = math.sqrt(sxx) * f32(1.0001) + f32(0.01)
            box[REACH_Y] = math.sqrt(syy) * f32(1.0001) + f32(0.01)
            box[LEAN] = sxy / max(syy, f32(1e-12))
            # sqrt(det S / S_yy), and det S = h^2 det(J)^2 / room
            thick = h * abs(det) / math.sqrt(room * max(syy, f32(1e-12)))
            box[THICK] = min(thick, math.sqrt(sxx)) * f32(1.0001) + f32(0.01)
            box[TIP] = sxy / math.sqrt(max(sxx, f32(1e-12)))
        box[DISC] = disc
        left = min(box[BOX_X] - box[REACH_X], low_x - disc)
        right = max(box[BOX_X] + box[REACH_X], low_x + disc)
        top = min(box[BOX_Y] - box[REACH_Y], low_y - disc)
        bottom = max(box[BOX_Y] + box[REACH_Y], low_y + disc)
        if right < 0 or left > width or bottom < 0 or top > height:
            continue

        # a common factor of the six leaves u, v and the depth as they are
        largest = max(max(abs(xu), abs(xv)), max(abs(yu), abs(yv)))
        factor = one / largest if largest > f32(1e-18) else f32(0.0)
        if det < f32(0.0):
            factor = -factor
        r[X], r[Y], r[LOW_X], r[LOW_Y] = px, py, low_x, low_y
        r[UX], r[UY], r[VX], r[VY] = factor * yv, -factor * xv, -factor * yu, factor * xu
        r[D0] = r[UX] * xu + r[UY] * yu
        r[DX] = -(r[UX] * mu + r[VX] * mv)
        r[DY] = -(r[UY] * mu + r[VY] * mv)
        r[FACTOR] = factor
        r[OPACITY], r[DEPTH] = opacities[n], z
        r[TOP], r[BOTTOM] = top, bottom
        for k in range(3):
            r[NORMAL_X + k] = view[k, 0] * nx + view[k, 1] * ny + view[k, 2] * nz
        if r[NORMAL_X] * x + r[NORMAL_Y] * y + r[NORMAL_Z] * z > f32(0.0):
            for k in range(3):
                r[NORMAL_X + k] = -r[NORMAL_X + k]
        dx, dy, dz = mx - position[0], my - position[1], mz - position[2]
        length = max(math.sqrt(dx * dx + dy * dy + dz * dz), f32(1e-12))
        dx, dy, dz = dx / length, dy / length, dz / length
        for k in range(3):
            r[RED + k] = max(sh_color(sh[n], k, bands, dx, dy, dz), f32(0.0))


@jit.inline
def _rows_of_tiles(r, low, high):
    """First and last + 1 row of tiles, of those in [low, high), that a surfel may enter."""
    first = int(math.floor(max(r[TOP], f32(-TILE)) / f32(TILE)))
    last = int(math.floor(min(r[BOTTOM], UNBOUNDED) / f32(TILE))) + 1
    return max(first, low), min(last, high)


@jit.inline
def _tiles_in_row(r, b, row, tiles_x):
    """First and last + 1 tile of a row of tiles that a surfel's ellipse or disc may enter.

    The right edge of the ellipse is a concave function of y, so over the row's band it is largest
    at the y nearest to that of the rightmost point; the left edge mirrors it.
    """
    reach = b[REACH_Y]
    top = min(max(f32(row * TILE) - b[BOX_Y], -reach), reach)
    bottom = min(max(f32((row + 1) * TILE) - b[BOX_Y], -reach), reach)
    at = min(max(b[TIP], top), bottom)
    share = max(f32(1.0) - (at / reach) * (at / reach), f32(0.0))
    right = b[BOX_X] + b[LEAN] * at + b[THICK] * math.sqrt(share) + f32(0.01)
    at = min(max(-b[TIP], top), bottom)
    share = max(f32(1.0) - (at / reach) * (at / reach), f32(0.0))
    left = b[BOX_X] + b[LEAN] * at - b[THICK] * math.sqrt(share) - f32(0.01)
    # the disc is mostly inside; where it is not, it widens every row a little
    right = min(max(right, r[LOW_X] + b[DISC]), UNBOUNDED)
    left = max(min(left, r[LOW_X] - b[DISC]), f32(-TILE))
    first = int(math.floor(left / f32(TILE)))
    last = int(math.floor(right / f32(TILE))) + 1
    return max(first, 0), min(last, tiles_x)


@jit.parallel
def _count_pairs(records, boxes, nearest, bands, tiles_x, counts):
    for worker in numba.prange(len(bands) - 1):
        for i in range(len(nearest)):
            r, b = records[nearest[i]], boxes[nearest[i]]
            low, high = _rows_of_tiles(r, bands[worker], bands[worker + 1])
            for row in range(low, high):
                first, last = _tiles_in_row(r, b, row, tiles_x)
                for tile in range(row * tiles_x + first, row * tiles_x + last):
                    counts[tile] += 1


@jit.parallel
def _fill_pairs(records, boxes, nearest, bands, tiles_x, cursor, pairs):
    for worker in numba.prange(len(bands) - 1):
        for i in range(len(nearest)):
            n = nearest[i]
            r, b = records[n], boxes[n]
            low, high = _rows_of_tiles(r, bands[worker], bands[worker + 1])
            for row in range(low, high):
                first, last = _tiles_in_row(r, b, row, tiles_x)
                for tile in range(row * tiles_x + first, row * tiles_x + last):
                    pairs[cursor[tile]] = n
                    cursor[tile] += 1
