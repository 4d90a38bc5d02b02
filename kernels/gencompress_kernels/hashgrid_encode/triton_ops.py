"""The gated hash grid with Triton: a program takes a block of points through one level.

Backward adds to the table and the logits by atomics in fixed point (`fixed`): the same bits at
every run. Points have their own programs, which walk all levels. Floors as on the CPU, but that a
level's rows (4 MB at 2^19) stay in the second-level cache of a large GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.hashgrid_encode.fixed import incoming, layout, unit_of
from gencompress_kernels.hashgrid_encode.reference import PRIMES
from gencompress_kernels.triton_launch import launch, single

BLOCK = 256  # points
# as 32 bits with a sign
PRIME_Y, PRIME_Z = (tl.constexpr((p + (1 << 31)) % (1 << 32) - (1 << 31)) for p in PRIMES[1:])


@triton.jit
def _inside(points, i, axis: tl.constexpr, some):
    """A coordinate within [0, 1]; what is no number becomes 0."""
    x = tl.load(points + 3 * i + axis, mask=some, other=0.0)
    x = tl.where(x > 0, x, 0.0)
    return tl.where(x < 1, x, 1.0)


@triton.jit
def _split(x, scale):
    """Cell and fraction on an axis of a level."""
    q = x * scale + 0.5
    cell = q.to(tl.int32)
    return cell, q - cell.to(tl.float32)


@triton.jit
def _place(x, side):
    """Cell and fraction on an axis of the grid of logits."""
    u = x * (side - 1).to(tl.float32)
    cell = tl.minimum(u.to(tl.int32), side - 2)
    return cell, u - cell.to(tl.float32)


@triton.jit
def _row(a, b, c, stride, rows):
    if stride == 0:
        row = ((a ^ (b * PRIME_Y) ^ (c * PRIME_Z)) & (rows - 1).to(tl.int32)).to(tl.int64)
    else:
        row = a + stride * (b + stride * c.to(tl.int64))
        row = tl.where(row >= rows, row - rows, row)  # past the last once at most
    return row


@triton.jit
def _mix(a, b, t):
    return a + t * (b - a)


@triton.jit
def _side(k: tl.constexpr, t):
    """The share of a corner on an axis."""
    return t if k else 1 - t


@triton.jit
def _saliency(
    points, logits, cells, saliency, count, side, GATED: tl.constexpr, KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    cx, x = _place(_inside(points, i, 0, some), side)
    cy, y = _place(_inside(points, i, 1, some), side)
    cz, z = _place(_inside(points, i, 2, some), side)
    p = tl.full([BLOCK], 1.0, tl.float32)
    if GATED:
        at = logits + (cx.to(tl.int64) * side + cy) * side + cz
        down = side.to(tl.int64) * side  # x is slowest
        a = _mix(tl.load(at, mask=some, other=0.0), tl.load(at + down, mask=some, other=0.0), x)
        at += side
        b = _mix(tl.load(at, mask=some, other=0.0), tl.load(at + down, mask=some, other=0.0), x)
        at += 1
        d = _mix(tl.load(at, mask=some, other=0.0), tl.load(at + down, mask=some, other=0.0), x)
        at -= side
        c = _mix(tl.load(at, mask=some, other=0.0), tl.load(at + down, mask=some, other=0.0), x)
        value = _mix(_mix(a, b, y), _mix(c, d, y), z)
        t = tl.exp(-tl.abs(value))
        p = tl.where(value >= 0, 1.0, t) / (1 + t)
    if KEPT:
        at = (cx.to(tl.int64) * (side - 1) + cy) * (side - 1) + cz
        p = tl.where(tl.load(cells + at, mask=some, other=0) != 0, p, 0.0)
    tl.store(saliency + i, p, mask=some)


@triton.jit
def _features(
    points, table, saliency, scales, offsets, strides, features, count, levels,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    p = tl.load(saliency + i, mask=some, other=0.0)
    scale, stride = tl.load(scales + level), tl.load(strides + level)
    offset = tl.load(offsets + level)
    rows = tl.load(offsets + level + 1) - offset
    a, x = _split(_inside(points, i, 0, some), scale)
    b, y = _split(_inside(points, i, 1, some), scale)
    c, z = _split(_inside(points, i, 2, some), scale)
    column = tl.arange(0, COLUMNS)
    read = (p != 0)[:, None] & (column < WIDTH)[None, :]
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for k in tl.static_range(8):
        weight = _side(k & 1, x) * _side(k >> 1 & 1, y) * _side(k >> 2, z)
        row = offset + _row(a + (k & 1), b + (k >> 1 & 1), c + (k >> 2), stride, rows)
        values = tl.load(table + row[:, None] * WIDTH + column[None, :], mask=read, other=0.0)
        total += weight[:, None] * values
    place = features + (i * levels + level)[:, None] * WIDTH + column[None, :]
    total = tl.where(read, total * p[:, None], 0.0)
    tl.store(place, total, mask=some[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _scatter(
    points, by_f, saliency, scales, offsets, strides, unit, sums, count, levels,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    level = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    some = some & (tl.load(saliency + i, mask=some, other=0.0) != 0)
    scale, stride = tl.load(scales + level), tl.load(strides + level)
    offset = tl.load(offsets + level)
    rows = tl.load(offsets + level + 1) - offset
    a, x = _split(_inside(points, i, 0, some), scale)
    b, y = _split(_inside(points, i, 1, some), scale)
    c, z = _split(_inside(points, i, 2, some), scale)
    column = tl.arange(0, COLUMNS)
    both = some[:, None] & (column < WIDTH)[None, :]
    place = by_f + (i * levels + level)[:, None] * WIDTH + column[None, :]
    slope = tl.load(place, mask=both, other=0.0).to(tl.float64) * tl.load(unit)
    for k in tl.static_range(8):
        weight = _side(k & 1, x) * _side(k >> 1 & 1, y) * _side(k >> 2, z)
        row = offset + _row(a + (k & 1), b + (k >> 1 & 1), c + (k >> 2), stride, rows)
        whole = (weight.to(tl.float64)[:, None] * slope).to(tl.int64)
        tl.atomic_add(sums + row[:, None] * WIDTH + column[None, :], whole, both, sem="relaxed")


@triton.jit
def _scatter_logits(points, by_z, saliency, unit, sums, count, side, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    some = some & (tl.load(saliency + i, mask=some, other=0.0) != 0)
    cx, x = _place(_inside(points, i, 0, some), side)
    cy, y = _place(_inside(points, i, 1, some), side)
    cz, z = _place(_inside(points, i, 2, some), side)
    slope = tl.load(by_z + i, mask=some, other=0.0).to(tl.float64) * tl.load(unit)
    for k in tl.static_range(8):
        weight = _side(k & 1, x) * _side(k >> 1 & 1, y) * _side(k >> 2, z)
        at = ((cx + (k & 1)).to(tl.int64) * side + cy + (k >> 1 & 1)) * side + cz + (k >> 2)
        tl.atomic_add(sums + at, (weight.to(tl.float64) * slope).to(tl.int64), some, sem="relaxed")


@triton.jit
def _unfix(sums, unit, out, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    value = tl.load(sums + i, mask=some, other=0).to(tl.float64) / tl.load(unit)
    tl.store(out + i, value.to(tl.float32), mask=some)


@triton.jit
def _lean(h, k: tl.constexpr, x, y, z, dx, dy, dz):
    """Adds what the height of a corner gives to the slopes by x, y and z."""
    sx, sy, sz = _side(k & 1, x), _side(k >> 1 & 1, y), _side(k >> 2, z)
    dx += (h if k & 1 else -h) * sy * sz
    dy += (h if k >> 1 & 1 else -h) * sx * sz
    dz += (h if k >> 2 else -h) * sx * sy
    return dx, dy, dz


@triton.jit
def _move(
    points, table, logits, by_f, by_z, saliency, scales, offsets, strides, out, count, levels, side,
    GATED: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    some = i < count
    read = some & (tl.load(saliency + i, mask=some, other=0.0) != 0)
    px, py, pz = (
        _inside(points, i, 0, some),
        _inside(points, i, 1, some),
        _inside(points, i, 2, some),
    )
    column = tl.arange(0, COLUMNS)
    both = read[:, None] & (column < WIDTH)[None, :]
    mx = tl.zeros([BLOCK], tl.float32)
    my, mz = mx, mx
    for level in range(levels):
        scale, stride = tl.load(scales + level), tl.load(strides + level)
        offset = tl.load(offsets + level)
        rows = tl.load(offsets + level + 1) - offset
        a, x = _split(px, scale)
        b, y = _split(py, scale)
        c, z = _split(pz, scale)
        place = by_f + (i * levels + level)[:, None] * WIDTH + column[None, :]
        slope = tl.load(place, mask=both, other=0.0)
        dx = tl.zeros([BLOCK], tl.float32)
        dy, dz = dx, dx
        for k in tl.static_range(8):
            row = offset + _row(a + (k & 1), b + (k >> 1 & 1), c + (k >> 2), stride, rows)
            values = tl.load(table + row[:, None] * WIDTH + column[None, :], mask=both, other=0.0)
            dx, dy, dz = _lean(tl.sum(values * slope, 1), k, x, y, z, dx, dy, dz)
        mx += scale * dx
        my += scale * dy
        mz += scale * dz
    if GATED:
        cx, x = _place(px, side)
        cy, y = _place(py, side)
        cz, z = _place(pz, side)
        slope = tl.load(by_z + i, mask=read, other=0.0)
        dx = tl.zeros([BLOCK], tl.float32)
        dy, dz = dx, dx
        for k in tl.static_range(8):
            at = ((cx + (k & 1)).to(tl.int64) * side + cy + (k >> 1 & 1)) * side + cz + (k >> 2)
            h = tl.load(logits + at, mask=read, other=0.0) * slope
            dx, dy, dz = _lean(h, k, x, y, z, dx, dy, dz)
        scale = (side - 1).to(tl.float32)
        mx += scale * dx
        my += scale * dy
        mz += scale * dz
    # a coordinate that was clamped has no gradient
    x = tl.load(points + 3 * i, mask=some, other=0.0)
    y = tl.load(points + 3 * i + 1, mask=some, other=0.0)
    z = tl.load(points + 3 * i + 2, mask=some, other=0.0)
    tl.store(out + 3 * i, tl.where(read & (x == px), mx, 0.0), mask=some)
    tl.store(out + 3 * i + 1, tl.where(read & (y == py), my, 0.0), mask=some)
    tl.store(out + 3 * i + 2, tl.where(read & (z == pz), mz, 0.0), mask=some)


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
    count, levels = len(single(points)), len(scales)
    side = len(logits) if logits is not None else 2 if cells is None else len(cells) + 1
    blocks = triton.cdiv(count, BLOCK)
    launch(
        _saliency, (blocks,), points, points, points if logits is None else logits,
        points if cells is None else cells.view(torch.int8), saliency, count, side,
        GATED=logits is not None, KEPT=cells is not None, BLOCK=BLOCK,
    )  # fmt: skip
    launch(
        _features, (blocks, levels), points, points, table, saliency,
        *layout(scales, offsets, strides, points.device), features, count, levels,
        BLOCK=BLOCK, **_columns(table),
    )  # fmt: skip
    norms.copy_(torch.linalg.vector_norm(features, dim=1))


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
    by_f, by_z = incoming(slopes, norm_slopes, saliency_slopes, features, norms, saliency)
    count, levels, blocks = len(points), len(scales), triton.cdiv(len(points), BLOCK)
    grids = layout(scales, offsets, strides, points.device)
    side = 0 if logits is None else len(logits)
    if table_slopes is not None:
        unit, sums = unit_of(by_f, count), torch.zeros_like(table_slopes, dtype=torch.int64)
        launch(
            _scatter, (blocks, levels), points, points, by_f, saliency, *grids, unit, sums, count,
            levels, BLOCK=BLOCK, **_columns(table),
        )  # fmt: skip
        _finish(sums, unit, table_slopes)
    if logit_slopes is not None:
        unit, sums = unit_of(by_z, count), torch.zeros_like(logit_slopes, dtype=torch.int64)
        launch(
            _scatter_logits, (blocks,), points, points, by_z, saliency, unit, sums, count, side,
            BLOCK=BLOCK,
        )  # fmt: skip
        _finish(sums, unit, logit_slopes)
    if point_slopes is not None:
        launch(
            _move, (blocks,), points, points, table, points if logits is None else logits, by_f,
            by_z, saliency, *grids, point_slopes, count, levels, side, GATED=logits is not None,
            BLOCK=BLOCK, **_columns(table),
        )  # fmt: skip


def _columns(table: Tensor) -> dict[str, int]:
    return {"WIDTH": table.shape[1], "COLUMNS": triton.next_power_of_2(table.shape[1])}


def _finish(sums: Tensor, unit: Tensor, out: Tensor) -> None:
    count = out.numel()
    launch(_unfix, (triton.cdiv(count, 1024),), out, sums, unit, out, count, BLOCK=1024)
