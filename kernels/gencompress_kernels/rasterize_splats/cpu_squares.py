"""Sums of products of per-pixel derivatives with numba: the second walk of `cpu`, more sums.

With alpha = o exp(-q), every derivative by a screen value is d log alpha / d value, a polynomial of
the offset from the centre that is the same for all pixels, times dC/d log alpha. So the kernel sums
moments of the offset, weighted by the squared change or by weight times change, and
`moments.columns` makes the products of them, in float64, once a splat.

The offset is taken in the axes s = sqrt(a) (dx + b/a dy), t = dy / (reach of the splat in y): both
are within a few units wherever the splat shows, t is constant along a row, and the two large and
nearly equal terms of a needle's a dx + b dy are never subtracted.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.rasterize_splats.cpu import (
    BLUE,
    GREEN,
    OPACITY,
    PIXELS,
    REACH_Y,
    RED,
    TILE,
    A,
    B,
    C,
    X,
    Y,
    _blend,
    _first_row,
    _last_row,
    _open_pixels,
    _row_alphas,
    _row_weights,
    _sum_changes,
    f32,
    project,
    tile_lists,
)
from gencompress_kernels.rasterize_splats.moments import WEIGHT, columns
from gencompress_kernels.rasterize_splats.reference import MAX_ALPHA, MIN_ALPHA, Shot

CHUNK = 1 << 15  # splats whose matrices are held at once


def squared_gradients(shot: Shot, fisher: bool) -> Tensor:
    """float32. Returns [N, 2] or [N, 42] as the reference."""
    width, height = shot.width, shot.height
    records = project(shot)
    order, offsets, pairs = tile_lists(records, width, height)
    planes = np.empty((len(order), 5, PIXELS), f32)
    _blend(records, order, offsets, pairs, width, height, planes, np.empty((0, 4), f32), False)
    slots = np.empty((len(pairs), WEIGHT + 1 if fisher else 2), f32)
    _pair_moments(records, order, offsets, pairs, width, height, planes, slots)
    totals = np.zeros((len(records), slots.shape[1]))
    _sum_changes(pairs, slots, totals)
    if not fisher:
        return torch.from_numpy(totals.astype(f32))
    result = np.zeros((len(records), 42), f32)
    shown = np.flatnonzero(records[:, OPACITY] > 0)  # the rest of a culled record is not written
    for start in range(0, len(shown), CHUNK):
        part = shown[start : start + CHUNK]
        some = torch.from_numpy(records[part].astype(np.float64))
        conics, reaches = some[:, A : C + 1], some[:, REACH_Y]
        result[part] = columns(conics, some[:, OPACITY], reaches, torch.from_numpy(totals[part]))
    return torch.from_numpy(result)


@jit.inline
def _row_slope(behind, weights, gains, follows, color, slope):
    """One channel: takes a splat's share out of what lies behind, and gives dC/d log alpha."""
    for x in range(TILE):
        share = weights[x] * color
        rest = behind[x] - share
        behind[x] = rest
        slope[x] = follows[x] * share - gains[x] * rest


@jit.inline
def _row_offsets(r, x0, y, along):
    """s of the module's docstring; beyond 4 nothing is blended, and powers could leave float32."""
    root, shift = math.sqrt(r[A]), r[X] + r[B] / r[A] * (r[Y] - y)
    for x in range(TILE):
        along[x] = min(max(root * (shift - (x0 + f32(x))), f32(-4.0)), f32(4.0))


@jit.inline
def _add_cross(slot, first, weighted, slope, along, t):
    """Adds a row of one channel's w dC/d log alpha s^i t^j to six places of the slot."""
    zero, one, two = f32(0.0), f32(0.0), f32(0.0)
    for x in range(TILE):
        s = along[x]
        product = weighted[x] * slope[x]
        zero += product
        one += product * s
        two += product * s * s
    slot[first] += zero
    slot[first + 1] += one
    slot[first + 2] += two
    slot[first + 3] += zero * t
    slot[first + 4] += one * t
    slot[first + 5] += zero * t * t


@jit.inline
def _add_squares(slot, squares, along, t):
    """Adds a row of (dC/d log alpha)^2 s^i t^j to the fifteen places of `SQUARES`."""
    zero, one, two, three, four = f32(0.0), f32(0.0), f32(0.0), f32(0.0), f32(0.0)
    for x in range(TILE):
        s = along[x]
        ss = s * s
        first, second = squares[x] * s, squares[x] * ss
        zero += squares[x]
        one += first
        two += second
        three += first * ss
        four += second * ss
    slot[1] += zero
    slot[2] += one
    slot[3] += two
    slot[4] += three
    slot[5] += four
    power = t
    slot[6] += power * zero
    slot[7] += power * one
    slot[8] += power * two
    slot[9] += power * three
    power *= t
    slot[10] += power * zero
    slot[11] += power * one
    slot[12] += power * two
    power *= t
    slot[13] += power * zero
    slot[14] += power * one
    slot[15] += power * t * zero


@jit.parallel
def _pair_moments(records, order, offsets, pairs, width, height, planes, slots):
    """Fills slots [pairs, 2] with the sums of (dC/dg)^2 and (dC/d log alpha)^2 over the tile, or
    slots [pairs, 35] with all of the moments."""
    tiles_x = (width + TILE - 1) // TILE
    moments = slots.shape[1] > 2
    for i in numba.prange(len(order)):
        tile = order[i]
        x0 = f32((tile % tiles_x) * TILE) + f32(0.5)
        y0 = f32((tile // tiles_x) * TILE) + f32(0.5)
        behind = planes[tile].reshape(5 * PIXELS).copy()
        left = np.zeros(PIXELS, f32)
        _open_pixels(left, x0, y0, width, height)
        alphas, weights = np.empty(TILE, f32), np.empty(TILE, f32)
        gains, follows = np.empty(TILE, f32), np.empty(TILE, f32)
        to_red, to_green, to_blue = np.empty(TILE, f32), np.empty(TILE, f32), np.empty(TILE, f32)
        squares, along = np.empty(TILE, f32), np.empty(TILE, f32)
        alive = np.ones(TILE, np.uint8)
        num_alive = TILE
        start, end = offsets[tile], offsets[tile + 1]
        for p in range(start, end):
            if num_alive == 0:
                end = p
                break
            r = records[pairs[p]]
            cr, cg, cb, opacity = r[RED], r[GREEN], r[BLUE], r[OPACITY]
            slot = slots[p]
            slot[:] = f32(0.0)
            total, by_value, weight = f32(0.0), f32(0.0), f32(0.0)
            for row in range(_first_row(r, y0), _last_row(r, y0)):
                if alive[row] == 0:
                    continue
                at = row * TILE
                y = y0 + f32(row)
                _row_alphas(r, x0, y, alphas)
                if _row_weights(left[at : at + TILE], alphas, weights, gains) <= f32(0.0):
                    alive[row] = 0
                    num_alive -= 1
                for x in range(TILE):
                    # alpha follows the splat where it was blended and not held at its maximum
                    free = weights[x] > f32(0.0) and alphas[x] < f32(MAX_ALPHA)
                    gain = alphas[x] / (f32(1.0) - alphas[x])
                    gains[x] = gain if free else f32(0.0)
                    follows[x] = f32(1.0) if free else f32(0.0)
                _row_slope(behind[at : at + TILE], weights, gains, follows, cr, to_red)
                _row_slope(
                    behind[at + PIXELS : at + PIXELS + TILE], weights, gains, follows, cg, to_green
                )
                _row_slope(
                    behind[at + 2 * PIXELS : at + 2 * PIXELS + TILE],
                    weights,
                    gains,
                    follows,
                    cb,
                    to_blue,
                )
                for x in range(TILE):
                    square = to_red[x] * to_red[x] + to_green[x] * to_green[x]
                    squares[x] = square + to_blue[x] * to_blue[x]
                for x in range(TILE):
                    ratio = opacity / max(alphas[x], f32(MIN_ALPHA))  # 1 / g
                    by_value += squares[x] * ratio * ratio
                if moments:
                    for x in range(TILE):
                        weight += weights[x] * weights[x]
                    t = (r[Y] - y) / max(r[REACH_Y], f32(1.0))
                    _row_offsets(r, x0, y, along)
                    _add_squares(slot, squares, along, t)
                    _add_cross(slot, 16, weights, to_red, along, t)
                    _add_cross(slot, 22, weights, to_green, along, t)
                    _add_cross(slot, 28, weights, to_blue, along, t)
                else:
                    for x in range(TILE):
                        total += squares[x]
            slot[0] = by_value
            if moments:
                slot[34] = weight
            else:
                slot[1] = total
        slots[end : offsets[tile + 1]] = f32(0.0)
