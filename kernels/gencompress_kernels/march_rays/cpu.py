"""Marching on the CPU with numba: tiles of samples, and none of a tile in an empty neighbourhood.

A sample costs little more than the lookup of its cell: places are computed for a tile of samples at
once, in vectors, and kept without a branch. Without a cone a tile is short enough to touch at most
two blocks of 8^3 cells along each axis; coordinates move one way along a ray, rounding included, so
the blocks of the first sample of a tile and of the next tile enclose it, and it is passed over if a
grid of such neighbourhoods says that all are empty. The samples kept are those of a walk that looks
at each. With a cone, or contracted, every tile is looked at.

Distances go to a buffer for each thread with room for all that its rays may keep; memory that is
not written is never taken from the system. The rest follows once the number of samples is known.

Floor: about 30 operations and a lookup for a sample that is looked at, 28 bytes for one that is
kept, and one pass over the grid. 4,096 rays with 1,000 places each: 0.12 GFLOP, were none skipped.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.march_rays import reference

CHUNK = 64  # rays of a task
TILE, VECTOR = 64, 16  # samples
SHIFT = 3  # blocks of 8^3 cells; best of 4 and 8 cells, and of tiles of 32 and 64
BUFFER = 1 << 26  # distances; 256 MB, were all of them kept
MOST = 1 << 24  # float32 counts no further
f32, i32 = np.float32, np.int32
ZERO, ONE, TWO, QUARTER, HALF = f32(0), f32(1), f32(2), f32(0.25), f32(0.5)
BELOW_ONE = f32(1 - 2.0**-24)


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
    if origins.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {origins.dtype}")
    starts, speeds = reference.to_unit(origins, directions, box, contracted)
    spans = reference.span(starts, speeds, jitter, step, cone, near, far, contracted)
    rays = [tensor.numpy() for tensor in (*spans, starts, speeds)]
    grid = occupancy.numpy()
    around = _neighbourhoods(grid, numba.get_num_threads())
    walk = f32(step), f32(cone), contracted
    numbers = ((spans[1] - spans[0]) / step).nan_to_num(0).clamp(0, MOST)
    most = min(most, int(numbers.max()) + 2) if len(origins) else 1
    batch = max(BUFFER // (most * CHUNK), 1) * CHUNK
    parts = [
        _march_batch([array[at : at + batch] for array in rays], grid, around, walk, most)
        for at in range(0, max(len(origins), 1), batch)
    ]
    counts, points, distances, steps = (
        torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        for arrays in zip(*parts, strict=True)
    )
    return torch.stack([counts.cumsum(0) - counts, counts], 1), points, distances, steps


def _march_batch(
    rays: list[np.ndarray],
    grid: np.ndarray,
    around: np.ndarray,
    walk: tuple[np.float32, np.float32, bool],
    most: int,
) -> tuple[np.ndarray, ...]:
    """Counts, points, distances, steps."""
    workers = numba.get_num_threads()
    chunks = -(-len(rays[0]) // CHUNK)
    counts, begins = np.empty(len(rays[0]), np.int64), np.empty(chunks, np.int64)
    buffer = np.empty((workers, -(-chunks // workers) * CHUNK * most + TILE), f32)
    cells = grid.reshape(-1).view(np.uint8)
    _march(*rays, cells, i32(len(grid)), around, *walk, most, counts, begins, buffer)
    total = int(counts.sum())
    points, distances, steps = (np.empty(shape, f32) for shape in ((total, 3), total, total))
    starts = np.cumsum(counts) - counts
    _gather(*rays[2:], *walk, counts, starts, begins, buffer, points, distances, steps)
    return counts, points, distances, steps


@jit.parallel
def _neighbourhoods(grid, workers):
    """bool [B, B, B]: whether any cell is occupied in 2^3 blocks, from this one upwards."""
    side = len(grid)
    size = (side + (1 << SHIFT) - 1) >> SHIFT
    blocks = np.zeros((size + 1, size + 1, size + 1), np.bool_)
    for worker in numba.prange(workers):
        for i in range(worker * size // workers, (worker + 1) * size // workers):
            for x in range(i << SHIFT, min((i + 1) << SHIFT, side)):
                for y in range(side):
                    for z in range(side):
                        if grid[x, y, z]:
                            blocks[i, y >> SHIFT, z >> SHIFT] = True
    out = np.empty((size, size, size), np.bool_)
    for i in range(size):
        for j in range(size):
            for k in range(size):
                out[i, j, k] = np.any(blocks[i : i + 2, j : j + 2, k : k + 2])
    return out


@jit.exact
def _bound(p):
    # written so that NaN becomes a place inside, too
    return min(p, BELOW_ONE) if p > ZERO else ZERO


@jit.exact
def _place(t, start, speed, contracted):
    x, y, z = start[0] + t * speed[0], start[1] + t * speed[1], start[2] + t * speed[2]
    if contracted:
        size = max(abs(x), abs(y), abs(z))
        factor = (TWO - ONE / size) / size if size > ONE else ONE
        x, y, z = x * factor, y * factor, z * factor
        x, y, z = x * QUARTER + HALF, y * QUARTER + HALF, z * QUARTER + HALF
    return _bound(x), _bound(y), _bound(z)


@jit.exact
def _keep(tile, n, start, speed, contracted, grid, side, cells, count, out):
    """Appends to out[:count] those of tile[:n] that lie in occupied cells."""
    size = f32(side)
    for i in range(TILE):
        x, y, z = _place(tile[i], start, speed, contracted)
        cells[i] = (i32(x * size) * side + i32(y * size)) * side + i32(z * size)
    # without a sign there is no counting from the end of an array
    at = np.uint64(count)
    for i in range(n):
        out[at] = tile[i]
        at += np.uint64(grid[np.uint32(cells[i])])
    return np.int64(at)


@jit.exact
def _number(first, leave, step):
    """How many samples lie before `leave`."""
    if not first < leave:
        return 0
    n = int(min((leave - first) / step, f32(MOST))) + 2
    while n > 0 and not first + f32(n - 1) * step < leave:
        n -= 1
    return n


@jit.exact
def _block(t, start, speed, size):
    x, y, z = _place(t, start, speed, False)
    return i32(x * size) >> SHIFT, i32(y * size) >> SHIFT, i32(z * size) >> SHIFT


@jit.exact
def _march_even(
    first, leave, start, speed, contracted, grid, side, around, step, most, tile, cells, out
):
    size, count, num = f32(side), 0, _number(first, leave, step)
    fastest = max(abs(speed[0]), abs(speed[1]), abs(speed[2]))
    length = int(min(f32(1 << SHIFT) / (step * fastest * size), f32(TILE))) // VECTOR * VECTOR
    sparse = length > 0 and not contracted
    length = length if sparse else TILE
    x, y, z = _block(first, start, speed, size)
    for k in range(0, num, length):
        if sparse:
            u, v, w = _block(first + f32(k + length) * step, start, speed, size)
            near = abs(u - x) <= 1 and abs(v - y) <= 1 and abs(w - z) <= 1
            empty = near and not around[min(u, x), min(v, y), min(w, z)]
            x, y, z = u, v, w
            if empty:
                continue
        for i in range(TILE):
            tile[i] = first + f32(i32(k + i)) * step
        n = min(length, num - k)
        count = _keep(tile, n, start, speed, contracted, grid, side, cells, count, out)
        if count >= most:
            return most
    return count


@jit.exact
def _march_growing(
    first, leave, start, speed, contracted, grid, side, step, cone, most, tile, cells, out
):
    count, here = 0, first
    while here < leave:
        for i in range(TILE):
            tile[i] = here
            here += max(step, cone * here)
        n = 1  # a step that does not move the distance ends the walk, and so would all after it
        for i in range(1, TILE):
            n += tile[i] > tile[i - 1] and tile[i] < leave
        count = _keep(tile, n, start, speed, contracted, grid, side, cells, count, out)
        if count >= most:
            return most
        if n < TILE or here == tile[TILE - 1]:
            break
    return count


@jit.parallel
def _march(
    first, leave, starts, speeds, grid, side, around, step, cone, contracted, most,
    counts, begins, buffer,
):  # fmt: skip
    """Every `workers`th chunk of rays, their distances one after the other."""
    workers = len(buffer)
    for worker in numba.prange(workers):
        tile, cells = np.empty(TILE, f32), np.empty(TILE, i32)
        total = 0
        for chunk in range(worker, len(begins), workers):
            begins[chunk] = total
            for ray in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(counts))):
                line = first[ray], leave[ray], starts[ray], speeds[ray]
                out = buffer[worker, total:]
                if cone > ZERO:
                    n = _march_growing(
                        *line, contracted, grid, side, step, cone, most, tile, cells, out
                    )
                else:
                    n = _march_even(
                        *line, contracted, grid, side, around, step, most, tile, cells, out
                    )
                counts[ray] = n
                total += n


@jit.exact
def _fill(source, start, speed, step, cone, contracted, points, distances, steps):
    for i in range(len(source)):
        t = source[i]
        distances[i] = t
        steps[i] = max(step, cone * t)
        x, y, z = _place(t, start, speed, contracted)
        points[i, 0], points[i, 1], points[i, 2] = x, y, z


@jit.parallel
def _gather(
    starts, speeds, step, cone, contracted, counts, places, begins, buffer,
    points, distances, steps,
):  # fmt: skip
    workers = len(buffer)
    for worker in numba.prange(workers):
        for chunk in range(worker, len(begins), workers):
            at = begins[chunk]
            for ray in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(counts))):
                a, b = places[ray], places[ray] + counts[ray]
                source = buffer[worker, at : at + counts[ray]]
                _fill(
                    source, starts[ray], speeds[ray], step, cone, contracted,
                    points[a:b], distances[a:b], steps[a:b],
                )  # fmt: skip
                at += counts[ray]
