"""Corners of cells: what the passes of `cpu` and `cpu_backward` over blocks of points share.

Points of a tile lie by coordinate in `places`: x at 0, y at TILE, z at 2 * TILE. A block's eight
corners lie in `index`, one BLOCK after the other, x fastest, and its three fractions in
`fractions`. Columns of a tile lie PLANE floats apart.
"""

from __future__ import annotations

import numpy as np

from gencompress_kernels import jit
from gencompress_kernels.hashgrid_encode.reference import PRIMES

TILE = 1024  # points that are selected, transposed and counted together
PLANE = TILE + 16  # a power of two would put a row's columns into the same few sets of the cache
BLOCK = 256  # points whose corners are found together: 11 KB, a third of the first-level cache
f32, u32, u64 = np.float32, np.uint32, np.uint64
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
PRIME_Y, PRIME_Z = u32(PRIMES[1]), u32(PRIMES[2])


@jit.exact
def load(points, first, n, places):
    """Points [M, 3] (flat) first to first + n into places, clamped; what is not a number becomes
    0, so that nothing is read outside a table."""
    for i in range(n):
        for axis in range(3):
            x = points[3 * (first + i) + axis]
            x = x if x > ZERO else ZERO
            places[i + axis * TILE] = x if x < ONE else ONE


@jit.inline
def mix(a, b, t):
    return a + t * (b - a)


@jit.inline
def _split(x, scale):
    """Cell and fraction on an axis of a level."""
    q = x * scale + HALF
    cell = np.int32(q)
    return u32(cell), q - f32(cell)


@jit.inline
def _place(x, side):
    """Cell and fraction on an axis of the grid of logits."""
    u = x * f32(side - 1)
    cell = min(np.int32(u), np.int32(side - 2))
    return cell, u - f32(cell)


@jit.serial
def level_corners(places, n, scale, stride, rows, width, index, fractions):
    """Rows times width of the corners in a level."""
    columns = u32(width)
    if stride == 0:
        _hash(places, n, scale, u32(rows - 1), columns, index, fractions)
        return
    for i in range(n):
        a, fractions[i] = _split(places[i], scale)
        b, fractions[i + BLOCK] = _split(places[i + TILE], scale)
        c, fractions[i + 2 * BLOCK] = _split(places[i + 2 * TILE], scale)
        index[i] = a + stride * (b + stride * c)
    for k in range(7, -1, -1):
        step = u32(k & 1) + stride * (u32(k >> 1 & 1) + stride * u32(k >> 2))
        part = index[k * BLOCK : k * BLOCK + n]
        for i in range(n):
            row = u32(index[i] + step)
            # past the last row once at most; below it, the difference wraps to a larger number
            part[i] = u32(min(row, u32(row - u32(rows))) * columns)


@jit.serial
def _hash(places, n, scale, mask, columns, index, fractions):
    for i in range(n):
        a, fractions[i] = _split(places[i], scale)
        b, fractions[i + BLOCK] = _split(places[i + TILE], scale)
        c, fractions[i + 2 * BLOCK] = _split(places[i + 2 * TILE], scale)
        a1, b0, c0 = u32(a + u32(1)), u32(b * PRIME_Y), u32(c * PRIME_Z)
        b1, c1 = u32(b0 + PRIME_Y), u32(c0 + PRIME_Z)
        index[i] = u32(((a ^ b0 ^ c0) & mask) * columns)
        index[i + BLOCK] = u32(((a1 ^ b0 ^ c0) & mask) * columns)
        index[i + 2 * BLOCK] = u32(((a ^ b1 ^ c0) & mask) * columns)
        index[i + 3 * BLOCK] = u32(((a1 ^ b1 ^ c0) & mask) * columns)
        index[i + 4 * BLOCK] = u32(((a ^ b0 ^ c1) & mask) * columns)
        index[i + 5 * BLOCK] = u32(((a1 ^ b0 ^ c1) & mask) * columns)
        index[i + 6 * BLOCK] = u32(((a ^ b1 ^ c1) & mask) * columns)
        index[i + 7 * BLOCK] = u32(((a1 ^ b1 ^ c1) & mask) * columns)


@jit.serial
def grid_corners(places, n, side, index, fractions):
    """Places of the corners in the flat grid of logits, where x is slowest."""
    for i in range(n):
        a, fractions[i] = _place(places[i], side)
        b, fractions[i + BLOCK] = _place(places[i + TILE], side)
        c, fractions[i + 2 * BLOCK] = _place(places[i + 2 * TILE], side)
        index[i] = u32((a * side + b) * side + c)
    for k in range(7, -1, -1):
        step = u32(((k & 1) * side + (k >> 1 & 1)) * side + (k >> 2))
        part = index[k * BLOCK : k * BLOCK + n]
        for i in range(n):
            part[i] = u32(index[i] + step)


@jit.serial
def grid_cells(places, n, side, index):
    """Places in the flat grid of cells."""
    for i in range(n):
        a, b = _place(places[i], side)[0], _place(places[i + TILE], side)[0]
        c = _place(places[i + 2 * TILE], side)[0]
        index[i] = u32((a * (side - 1) + b) * (side - 1) + c)


@jit.serial
def gather(values, index, fractions, n, out):
    """Interpolates one column."""
    for i in range(n):
        x, y, z = fractions[i], fractions[i + BLOCK], fractions[i + 2 * BLOCK]
        a0 = mix(values[u64(index[i])], values[u64(index[i + BLOCK])], x)
        a1 = mix(values[u64(index[i + 2 * BLOCK])], values[u64(index[i + 3 * BLOCK])], x)
        a2 = mix(values[u64(index[i + 4 * BLOCK])], values[u64(index[i + 5 * BLOCK])], x)
        a3 = mix(values[u64(index[i + 6 * BLOCK])], values[u64(index[i + 7 * BLOCK])], x)
        out[i] = mix(mix(a0, a1, y), mix(a2, a3, y), z)
