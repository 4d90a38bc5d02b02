"""Gradients of the gated hash grid with numba: packed by column, then added up level by level.

Tiles keep the points that have a gradient: `places` and `sizes` of them, the gradient of z in
`heights` (none without logits) and that of f in `planes`, for all tiles one after the other.
"""

from __future__ import annotations

import numba
import numpy as np

from gencompress_kernels import jit
from gencompress_kernels.hashgrid_encode.cpu_corners import (
    BLOCK,
    ONE,
    PLANE,
    TILE,
    ZERO,
    f32,
    grid_corners,
    level_corners,
    load,
    mix,
    u32,
    u64,
)
from gencompress_kernels.hashgrid_encode.reference import LEAST_NORM

TINY = f32(LEAST_NORM)


@jit.serial
def _gradient(slopes, features, factor, p, row):
    """p D into row; the sum of its sizes and <v, D>, with D = slopes + factor v."""
    dot, size = ZERO, ZERO
    for k in range(len(row)):
        slope = slopes[k] + factor * features[k]
        dot += slope * features[k]
        row[k] = p * slope
        size += abs(row[k])
    return size, dot


@jit.serial
def _gradient_plain(slopes, p, row):
    """The sum of sizes where factor and <v, D> do not matter, so that v need not be read."""
    size = ZERO
    for k in range(len(row)):
        row[k] = p * slopes[k]
        size += abs(row[k])
    return size


@jit.parallel
def pack(
    slopes, norm_slopes, saliency_slopes, points, features, norms, saliency, channels, workers,
    members, places, sizes, heights, planes,
):  # fmt: skip
    total, tiles = len(norms), len(sizes)
    for worker in numba.prange(workers):
        rows = np.empty(TILE * channels, f32)
        for tile in range(worker * tiles // workers, (worker + 1) * tiles // workers):
            count = 0
            for i in range(tile * TILE, min((tile + 1) * TILE, total)):
                p, r = saliency[i], norms[i]
                if p == ZERO:
                    continue
                row = rows[count * channels : (count + 1) * channels]
                incoming = slopes[i * channels : (i + 1) * channels]
                factor = norm_slopes[i] / r if r >= TINY else ZERO
                height = ZERO
                if factor != ZERO or len(heights):
                    v = features[i * channels : (i + 1) * channels]
                    size, dot = _gradient(incoming, v, factor, p, row)
                    height = (dot + p * saliency_slopes[i]) * (ONE - p)
                else:
                    size = _gradient_plain(incoming, p, row)
                if size == ZERO and (height == ZERO or len(heights) == 0):
                    continue
                members[tile * TILE + count] = i
                load(points, i, 1, places[tile * 3 * TILE + count :])
                if len(heights):
                    heights[tile * TILE + count] = height
                count += 1
            sizes[tile] = count
            out = planes[tile * channels * PLANE : (tile + 1) * channels * PLANE]
            for k in range(channels):
                for i in range(count):
                    out[k * PLANE + i] = rows[i * channels + k]


@jit.inline
def _shares(k, x, y, z):
    """Weights of corners 2 k and 2 k + 1."""
    weight = (y if k & 1 else ONE - y) * (z if k & 2 else ONE - z)
    far = weight * x
    return weight - far, far


@jit.serial
def _scatter_pair(values, index, fractions, n, first, second):
    one = u64(1)
    for i in range(n):
        x, y, z = fractions[i], fractions[i + BLOCK], fractions[i + 2 * BLOCK]
        a, b = first[i], second[i]
        for k in range(4):
            near, far = _shares(k, x, y, z)
            low, high = u64(index[i + 2 * k * BLOCK]), u64(index[i + (2 * k + 1) * BLOCK])
            values[low] += near * a
            values[low + one] += near * b
            values[high] += far * a
            values[high + one] += far * b


@jit.serial
def _scatter(values, index, fractions, n, slopes):
    for i in range(n):
        x, y, z = fractions[i], fractions[i + BLOCK], fractions[i + 2 * BLOCK]
        for k in range(4):
            near, far = _shares(k, x, y, z)
            values[u64(index[i + 2 * k * BLOCK])] += near * slopes[i]
            values[u64(index[i + (2 * k + 1) * BLOCK])] += far * slopes[i]


@jit.parallel
def scatter(
    places, sizes, heights, planes, width, side, scales, offsets, strides, owners, workers,
    by_table, by_logits,
):  # fmt: skip
    levels = len(scales)
    channels = levels * width
    for worker in numba.prange(workers):
        index, fractions = np.empty(8 * BLOCK, u32), np.empty(3 * BLOCK, f32)
        if owners[levels] == worker:
            by_logits[:] = ZERO
            for tile in range(len(sizes)):
                for start in range(0, sizes[tile], BLOCK):
                    n = min(BLOCK, sizes[tile] - start)
                    grid_corners(places[tile * 3 * TILE + start :], n, side, index, fractions)
                    _scatter(by_logits, index, fractions, n, heights[tile * TILE + start :])
        for level in range(levels):
            if owners[level] != worker:
                continue
            values = by_table[offsets[level] * width : offsets[level + 1] * width]
            values[:] = ZERO
            for tile in range(len(sizes)):
                for start in range(0, sizes[tile], BLOCK):
                    n = min(BLOCK, sizes[tile] - start)
                    level_corners(
                        places[tile * 3 * TILE + start :], n, scales[level], strides[level],
                        len(values) // width, width, index, fractions,
                    )  # fmt: skip
                    slopes = planes[(tile * channels + level * width) * PLANE + start :]
                    for column in range(0, width - 1, 2):
                        _scatter_pair(
                            values[column:], index, fractions, n, slopes[column * PLANE :],
                            slopes[(column + 1) * PLANE :],
                        )  # fmt: skip
                    if width % 2:
                        last = slopes[(width - 1) * PLANE :]
                        _scatter(values[width - 1 :], index, fractions, n, last)


@jit.serial
def _corner_heights(values, index, n, slopes, add, out):
    """slopes times values of the corners into out [8 * BLOCK], or onto it."""
    for k in range(8):
        part, rows = out[k * BLOCK : k * BLOCK + n], index[k * BLOCK : k * BLOCK + n]
        for i in range(n):
            height = values[u64(rows[i])] * slopes[i]
            part[i] = part[i] + height if add else height


@jit.serial
def _lean(heights, fractions, n, scale, sums):
    """Adds the slopes by x, y and z of what interpolates the heights of the corners."""
    h = heights
    for i in range(n):
        x, y, z = fractions[i], fractions[i + BLOCK], fractions[i + 2 * BLOCK]
        a, b, c, d = h[i], h[i + BLOCK], h[i + 2 * BLOCK], h[i + 3 * BLOCK]
        p, q, r, s = h[i + 4 * BLOCK], h[i + 5 * BLOCK], h[i + 6 * BLOCK], h[i + 7 * BLOCK]
        sums[i] += scale * mix(mix(b - a, d - c, y), mix(q - p, s - r, y), z)
        sums[i + TILE] += scale * mix(mix(c - a, d - b, x), mix(r - p, s - q, x), z)
        sums[i + 2 * TILE] += scale * mix(mix(p - a, q - b, x), mix(r - c, s - d, x), y)


@jit.parallel
def move(
    places, sizes, heights, planes, members, table, width, grid, side, scales, offsets, strides,
    workers, points, out,
):  # fmt: skip
    """Adds the gradient of the points [M, 3]; a coordinate that was clamped has none."""
    levels, tiles = len(scales), len(sizes)
    channels = levels * width
    for worker in numba.prange(workers):
        index, fractions = np.empty(8 * BLOCK, u32), np.empty(3 * BLOCK, f32)
        corners, sums = np.empty(8 * BLOCK, f32), np.empty(3 * TILE, f32)
        for tile in range(worker * tiles // workers, (worker + 1) * tiles // workers):
            sums[:] = ZERO
            for start in range(0, sizes[tile], BLOCK):
                n = min(BLOCK, sizes[tile] - start)
                here, moved = places[tile * 3 * TILE + start :], sums[start:]
                for level in range(levels):
                    values = table[offsets[level] * width : offsets[level + 1] * width]
                    level_corners(
                        here, n, scales[level], strides[level], len(values) // width, width, index,
                        fractions,
                    )  # fmt: skip
                    for column in range(width):
                        plane = tile * channels + level * width + column
                        slopes = planes[plane * PLANE + start :]
                        _corner_heights(values[column:], index, n, slopes, column > 0, corners)
                    _lean(corners, fractions, n, scales[level], moved)
                if len(grid):
                    grid_corners(here, n, side, index, fractions)
                    slopes = heights[tile * TILE + start :]
                    _corner_heights(grid, index, n, slopes, False, corners)
                    _lean(corners, fractions, n, f32(side - 1), moved)
            for k in range(sizes[tile]):
                for axis in range(3):
                    at = 3 * members[tile * TILE + k] + axis
                    if ZERO <= points[at] <= ONE:
                        out[at] = sums[k + axis * TILE]
