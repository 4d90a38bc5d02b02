"""The gated hash grid on the CPU with numba.

Forward, a thread walks its tiles of points three times. It finds the saliency of each and packs
those where it is not 0; it takes level after level through all its tiles, so that a level's rows
stay in the cache; it writes the rows of features. Backward mirrors that (`cpu_backward`): gradients
of features are packed by column, and then a thread owns whole levels and walks all points for each,
so nothing is added to by two and the sums have the same order with any number of threads.

Floor for M points, L levels and F features: forward reads 8 L F M floats of the table, from a cache
where a level fits, and writes L F M; backward reads and writes 8 L F M and reads 2 L F M. Each way
is about 30 (F + 1) L M operations. For 196,608 points, 16 levels, F = 2: 201 MB and 0.3 GFLOP
forward, 403 MB and 0.3 GFLOP backward, one word at a time, as the rows are scattered. A level of
2^19 rows is 4 MB: each of its 65,536 lines comes from memory once a pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.hashgrid_encode import cpu_backward
from gencompress_kernels.hashgrid_encode.cpu_corners import (
    BLOCK,
    ONE,
    PLANE,
    TILE,
    ZERO,
    f32,
    gather,
    grid_cells,
    grid_corners,
    level_corners,
    load,
    mix,
    u32,
    u64,
)

# Of a thread at a time: 27 MB at 16 levels of two features. At 2^19 rows a level, 16 tiles took
# twice as long, since every level came from memory twelve times
TILES = 192


def forward(
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    cells: Tensor | None,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
) -> None:
    """float32. Fills features [M, L F], norms [M] and saliency [M] as the reference."""
    if points.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {points.dtype}")
    side = len(logits) if logits is not None else 0 if cells is None else len(cells) + 1
    threads = numba.get_num_threads()
    _forward(
        _flat(points), _flat(table), table.shape[1], _flat(logits),
        np.empty(0, np.bool_) if cells is None else cells.view(-1).numpy(), side,
        *_layout(scales, offsets, strides), threads, np.empty(threads, f32),
        _flat(features), norms.numpy(), saliency.numpy(),
    )  # fmt: skip


def backward(
    slopes: Tensor,
    norm_slopes: Tensor,
    saliency_slopes: Tensor,
    points: Tensor,
    table: Tensor,
    logits: Tensor | None,
    features: Tensor,
    norms: Tensor,
    saliency: Tensor,
    scales: Sequence[float],
    offsets: Sequence[int],
    strides: Sequence[int],
    table_slopes: Tensor | None,
    logit_slopes: Tensor | None,
    point_slopes: Tensor | None,
) -> None:
    """float32. Fills the last three, each unless None, as the reference."""
    width, side = table.shape[1], 0 if logits is None else len(logits)
    layout, threads = _layout(scales, offsets, strides), numba.get_num_threads()
    tiles = -(-len(points) // TILE)
    packed = (
        np.empty(tiles * 3 * TILE, f32),
        np.empty(tiles, np.int64),
        np.empty(tiles * TILE if side else 0, f32),
        np.empty(tiles * len(scales) * width * PLANE, f32),
    )
    members = np.empty(tiles * TILE, np.int64)
    cpu_backward.pack(
        _flat(slopes), norm_slopes.numpy(), saliency_slopes.numpy(), _flat(points),
        _flat(features), norms.numpy(), saliency.numpy(), len(scales) * width, threads, members,
        *packed,
    )  # fmt: skip
    owners = _owners(strides, table_slopes is not None, logit_slopes is not None, threads)
    cpu_backward.scatter(
        *packed, width, side, *layout, owners, threads, _flat(table_slopes), _flat(logit_slopes)
    )
    if point_slopes is not None:
        point_slopes.zero_()
        cpu_backward.move(
            *packed, members, _flat(table), width, _flat(logits), side, *layout, threads,
            _flat(points), _flat(point_slopes),
        )  # fmt: skip


def _flat(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0, f32) if tensor is None else tensor.detach().view(-1).numpy()


def _layout(
    scales: Sequence[float], offsets: Sequence[int], strides: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.array(scales, f32), np.array(offsets, np.int64), np.array(strides, u32)


def _owners(strides: Sequence[int], table: bool, logits: bool, threads: int) -> np.ndarray:
    """[L + 1]: the thread of each level's gradient, and of the logits'; -1: not wanted."""
    # measured, in passes over a hashed level of 2^15 rows
    costs = [0.8 if stride else 1.0 for stride in strides] if table else []
    tasks = [*enumerate(costs), *([(len(strides), 0.5)] if logits else [])]
    owners, loads = np.full(len(strides) + 1, -1), [0.0] * threads
    for task, cost in sorted(tasks, key=lambda item: -item[1]):
        owners[task] = loads.index(min(loads))
        loads[owners[task]] += cost
    return owners


@jit.exact
def _sigmoid(values):
    """In place; exactly 0 and 1 at -128 and 128."""
    for i in range(len(values)):
        t = np.exp(-abs(values[i]))
        values[i] = (ONE if values[i] >= ZERO else t) / (ONE + t)


@jit.serial
def _select(points, first, last, grid, kept, side, places, index, fractions, saliency, members):
    """Saliency of points first to last; those where it is not 0 into places and members."""
    count = 0
    for start in range(first, last, BLOCK):
        n = min(BLOCK, last - start)
        block, values = places[count:], saliency[start : start + n]
        load(points, start, n, block)
        if len(grid):
            grid_corners(block, n, side, index, fractions)
            gather(grid, index, fractions, n, values)
            _sigmoid(values)
        else:
            values[:] = ONE
        if len(kept):
            grid_cells(block, n, side, index)
            for i in range(n):
                if not kept[u64(index[i])]:
                    values[i] = ZERO
        alive = 0
        for i in range(n):
            block[alive] = block[i]
            block[alive + TILE] = block[i + TILE]
            block[alive + 2 * TILE] = block[i + 2 * TILE]
            members[count + alive] = start + i
            alive += values[i] != ZERO
        count += alive
    return count


@jit.serial
def _gather_pair(values, index, fractions, n, first, second):
    """Interpolates two neighbouring columns."""
    one = u64(1)
    for i in range(n):
        x, y, z = fractions[i], fractions[i + BLOCK], fractions[i + 2 * BLOCK]
        r0, r1 = u64(index[i]), u64(index[i + BLOCK])
        r2, r3 = u64(index[i + 2 * BLOCK]), u64(index[i + 3 * BLOCK])
        r4, r5 = u64(index[i + 4 * BLOCK]), u64(index[i + 5 * BLOCK])
        r6, r7 = u64(index[i + 6 * BLOCK]), u64(index[i + 7 * BLOCK])
        a0, a1 = mix(values[r0], values[r1], x), mix(values[r2], values[r3], x)
        a2, a3 = mix(values[r4], values[r5], x), mix(values[r6], values[r7], x)
        b0 = mix(values[r0 + one], values[r1 + one], x)
        b1 = mix(values[r2 + one], values[r3 + one], x)
        b2 = mix(values[r4 + one], values[r5 + one], x)
        b3 = mix(values[r6 + one], values[r7 + one], x)
        first[i] = mix(mix(a0, a1, y), mix(a2, a3, y), z)
        second[i] = mix(mix(b0, b1, y), mix(b2, b3, y), z)


@jit.serial
def _finish(planes, count, members, first, last, channels, features, norms, saliency):
    """Columns of a tile times saliency to the rows they belong to, zeros elsewhere."""
    if count < last - first:
        features[first * channels : last * channels] = ZERO
        norms[first:last] = ZERO
    for k in range(count):
        at = members[k]
        p, total = saliency[at], ZERO
        row = features[at * channels : (at + 1) * channels]
        for i in range(channels):
            f = planes[i * PLANE + k]
            total += f * f
            row[i] = p * f
        norms[at] = p * np.sqrt(total)


@jit.serial
def _touch(values):
    """Reads a line after the other, which is faster than to meet them scattered."""
    total = ZERO
    for i in range(0, len(values), 16):
        total += values[i]
    return total


@jit.parallel
def _forward(
    points, table, width, grid, kept, side, scales, offsets, strides, workers, touched, features,
    norms, saliency,
):  # fmt: skip
    """touched [workers]: sums that keep `_touch` from being left out."""
    total, levels = len(norms), len(scales)
    channels, tiles = levels * width, (total + TILE - 1) // TILE
    for worker in numba.prange(workers):
        begin, end = worker * tiles // workers, (worker + 1) * tiles // workers
        most = min(TILES, end - begin)
        index, fractions = np.empty(8 * BLOCK, u32), np.empty(3 * BLOCK, f32)
        places, members = np.empty(most * 3 * TILE, f32), np.empty(most * TILE, np.int64)
        planes, counts = np.empty(most * channels * PLANE, f32), np.zeros(most, np.int64)
        for head in range(begin, end, TILES):
            some = min(TILES, end - head)
            for k in range(some):
                first = (head + k) * TILE
                counts[k] = _select(
                    points, first, min(first + TILE, total), grid, kept, side,
                    places[k * 3 * TILE :], index, fractions, saliency, members[k * TILE :],
                )  # fmt: skip
            for level in range(levels):
                values = table[offsets[level] * width : offsets[level + 1] * width]
                rows = len(values) // width
                if 16 * np.sum(counts[:some]) > rows:
                    touched[worker] = _touch(values)
                for k in range(some):
                    for start in range(0, counts[k], BLOCK):
                        n = min(BLOCK, counts[k] - start)
                        level_corners(
                            places[k * 3 * TILE + start :], n, scales[level], strides[level], rows,
                            width, index, fractions,
                        )  # fmt: skip
                        out = planes[(k * channels + level * width) * PLANE + start :]
                        for column in range(0, width - 1, 2):
                            _gather_pair(
                                values[column:], index, fractions, n, out[column * PLANE :],
                                out[(column + 1) * PLANE :],
                            )  # fmt: skip
                        if width % 2:
                            last = out[(width - 1) * PLANE :]
                            gather(values[width - 1 :], index, fractions, n, last)
            for k in range(some):
                first = (head + k) * TILE
                _finish(
                    planes[k * channels * PLANE :], counts[k], members[k * TILE :], first,
                    min(first + TILE, total), channels, features, norms, saliency,
                )  # fmt: skip
