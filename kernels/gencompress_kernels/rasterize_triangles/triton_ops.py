"""Soft and hard triangles with Triton: a program, which is one warp, takes a polygon.

As in `cuda`, a silhouette adds the logarithms of 1 - P as whole numbers, a z-buffer compares depths
the same way: neither lists of tiles nor an order that matters, the same bits at every run. Every
lane computes all edges of its polygon, about 170 operations in float64 a tile of its box, which is
slow on cards that have few units for it. One polygon that fills a picture is still one warp's work.
Floors as on the CPU. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gencompress_kernels.rasterize_triangles import reference, walk
from gencompress_kernels.rasterize_triangles.triton_front import find_front, weigh_corners
from gencompress_kernels.rasterize_triangles.triton_soft import (
    BLUR,
    COLUMNS,
    ROWS,
    area_of,
    box_of,
    corners_of,
    covered,
    field,
    has_four,
    is_full,
    is_there,
    lost,
    sign_of,
    tile_of,
)
from gencompress_kernels.triton_launch import launch, single

SHARE = tl.constexpr(walk.SHARE)
WARP = {"BLOCK": 64, "num_warps": 1}  # pixels of a polygon at a time
BLOCK = 128  # of what a lane does alone
NOTHING = (1 << 63) - 1  # behind all


@triton.jit
def _cover(
    points, polygons, sums, each, width, height, reach, inverse, BLOCK: tl.constexpr
):  # fmt: skip
    """-log(1 - P) of all polygons into a picture of sums."""
    q = tl.program_id(0).to(tl.int64)
    c, four = corners_of(points, polygons, q), has_four(polygons, q)
    orient = sign_of(area_of(c))
    x0, x1, y0, y1 = box_of(c, is_there(polygons, q), width, height, reach)
    picture = sums + q // each * width * height
    for top in range(y0, y1, ROWS):
        for left in range(x0, x1, COLUMNS):
            edges, columns, pixels = tile_of(c, orient, left, top, x1, y1, reach)
            for first in range(0, pixels, BLOCK):
                i = first + tl.arange(0, BLOCK)
                row, column = i // columns, i % columns
                px, py = column.to(tl.float32), row.to(tl.float32)
                x, _, _, _, _ = field(edges, four, orient, px, py, inverse)
                place = picture + (top + row).to(tl.int64) * width + left + column
                whole = (lost(x).to(tl.float64) * SHARE).to(tl.int64)
                tl.atomic_add(place, whole, (i < pixels) & (x >= -BLUR), sem="relaxed")


@triton.jit
def _uncover(sums, clear, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(sums + i, mask=i < count, other=0).to(tl.float64) / SHARE
    tl.store(clear + i, tl.exp(-total.to(tl.float32)), mask=i < count)


@triton.jit
def _clamp(value, most):
    return tl.minimum(tl.maximum(value, 0.0), most)


@triton.jit
def _primitive(y, height):
    inner = _clamp(y, height)
    return 0.5 * inner * inner + height * tl.maximum(y - inner, 0.0)


@triton.jit
def _below(ax, ay, bx, by, width, height):
    """What an edge adds to the area within the frame; see the reference."""
    ax, ay, bx, by = ax.to(tl.float64), ay.to(tl.float64), bx.to(tl.float64), by.to(tl.float64)
    x0, x1 = _clamp(ax, width), _clamp(bx, width)
    rise = (by - ay) / tl.where(ax == bx, 1.0, bx - ax)
    y0, y1 = ay + rise * (x0 - ax), ay + rise * (x1 - ax)
    flat = tl.abs(y1 - y0) < 1e-6
    sloped = (_primitive(y1, height) - _primitive(y0, height)) / tl.where(flat, 1.0, rise)
    found = tl.where(flat, _clamp(0.5 * (y0 + y1), height) * (x1 - x0), sloped)
    return tl.where(x0 == x1, 0.0, found)


@triton.jit
def _extents(points, polygons, extent, count, width, height, BLOCK: tl.constexpr):
    """Areas within the frame and in all, px^2; a lane a polygon."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    q = tl.minimum(n, count - 1)
    c, there = corners_of(points, polygons, q), is_there(polygons, q)
    within = _below(c[0], c[1], c[2], c[3], width, height)
    within += _below(c[2], c[3], c[4], c[5], width, height)
    within += _below(c[4], c[5], c[6], c[7], width, height)
    within += _below(c[6], c[7], c[0], c[1], width, height)
    tl.store(extent + 2 * n, tl.where(there, tl.abs(within), 0.0), mask=n < count)
    total = 0.5 * tl.abs(area_of(c))
    tl.store(extent + 2 * n + 1, tl.where(there, total, 0.0), mask=n < count)


@triton.jit
def _measure(
    points, polygons, masks, holes, extent, sums, peak, each, width, height, reach, inverse,
    CULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of P and P (1 - m), and the largest P (1 - m), of a polygon."""
    q = tl.program_id(0).to(tl.int64)
    c, four = corners_of(points, polygons, q), has_four(polygons, q)
    orient = sign_of(area_of(c))
    x0, x1, y0, y1 = box_of(c, is_there(polygons, q), width, height, reach)
    view = q // each
    if CULL:
        whole = is_full(holes, view, x0, x1, y0, y1, width, height)
        x1 = tl.where(whole, x0, x1)
    mask = masks + view * width * height
    area, outside = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    highest = tl.zeros([BLOCK], tl.float32)
    for top in range(y0, y1, ROWS):
        for left in range(x0, x1, COLUMNS):
            edges, columns, pixels = tile_of(c, orient, left, top, x1, y1, reach)
            one, two = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
            for first in range(0, pixels, BLOCK):
                i = first + tl.arange(0, BLOCK)
                row, column = i // columns, i % columns
                px, py = column.to(tl.float32), row.to(tl.float32)
                x, _, _, _, _ = field(edges, four, orient, px, py, inverse)
                some = (i < pixels) & (x >= -BLUR)
                place = mask + (top + row).to(tl.int64) * width + left + column
                cover = tl.where(some, covered(x), 0.0)
                out = cover * (1 - tl.load(place, mask=some, other=0.0))
                one += cover
                two += out
                highest = tl.maximum(highest, out)
            area += one
            outside += two
    total = tl.sum(area, 0).to(tl.float32)
    if CULL:
        total = tl.where(whole, tl.load(extent + 2 * q), total)
    tl.store(sums + 2 * q, total)
    tl.store(sums + 2 * q + 1, tl.sum(outside, 0).to(tl.float32))
    tl.store(peak + q, tl.max(highest, 0))


@triton.jit
def _at(own, k: tl.constexpr, before: tl.constexpr, first, second):
    """A pixel's pull on corner k, which its own edge begins or the one before it ends at."""
    return tl.where(own == k, first, tl.where(own == before, second, 0.0))


@triton.jit
def _pull(
    points, polygons, pictures, holes, slopes, out, each, width, height, reach, inverse,
    SUMS: tl.constexpr, CULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients by the corners, out [Q, 4, 2]. With SUMS slopes [Q, 2] are those of the sums, the
    picture a mask; without, the picture holds the silhouettes' slopes times what is uncovered."""
    q = tl.program_id(0).to(tl.int64)
    c, four = corners_of(points, polygons, q), has_four(polygons, q)
    orient = sign_of(area_of(c))
    x0, x1, y0, y1 = box_of(c, is_there(polygons, q), width, height, reach)
    view = q // each
    if CULL:
        x1 = tl.where(is_full(holes, view, x0, x1, y0, y1, width, height), x0, x1)
    picture = pictures + view * width * height
    ax = tl.zeros([BLOCK], tl.float32)
    ay, bx, by, cx, cy, dx, dy = ax, ax, ax, ax, ax, ax, ax
    for top in range(y0, y1, ROWS):
        for left in range(x0, x1, COLUMNS):
            edges, columns, pixels = tile_of(c, orient, left, top, x1, y1, reach)
            for first in range(0, pixels, BLOCK):
                i = first + tl.arange(0, BLOCK)
                row, column = i // columns, i % columns
                px, py = column.to(tl.float32), row.to(tl.float32)
                x, own, wx, wy, t = field(edges, four, orient, px, py, inverse)
                some = (i < pixels) & (x >= -BLUR)
                place = picture + (top + row).to(tl.int64) * width + left + column
                here, cover = tl.load(place, mask=some, other=0.0), covered(x)
                if SUMS:
                    slope = tl.load(slopes + 2 * q) + tl.load(slopes + 2 * q + 1) * (1 - here)
                    slope *= cover * (1 - cover)
                else:
                    slope = here * cover
                slope = tl.where(some, tl.where(x >= 0, slope, -slope), 0.0)
                wx *= slope
                wy *= slope
                sx, sy = t * wx, t * wy
                fx, fy = wx - sx, wy - sy
                ax += _at(own, 0, 3, fx, sx)
                ay += _at(own, 0, 3, fy, sy)
                bx += _at(own, 1, 0, fx, sx)
                by += _at(own, 1, 0, fy, sy)
                cx += _at(own, 2, 1, fx, sx)
                cy += _at(own, 2, 1, fy, sy)
                dx += _at(own, 3, 2, fx, sx)
                dy += _at(own, 3, 2, fy, sy)
    place, factor = out + 8 * q, -2 * inverse
    tl.store(place, factor * tl.sum(ax, 0))
    tl.store(place + 1, factor * tl.sum(ay, 0))
    tl.store(place + 2, factor * tl.sum(bx, 0))
    tl.store(place + 3, factor * tl.sum(by, 0))
    tl.store(place + 4, factor * tl.sum(cx, 0))
    tl.store(place + 5, factor * tl.sum(cy, 0))
    tl.store(place + 6, factor * tl.sum(dx, 0))
    tl.store(place + 7, factor * tl.sum(dy, 0))


def silhouettes(points: Tensor, polygons: Tensor, sigma: float, clear: Tensor) -> None:
    """float32. Fills clear [C, H, W] as the reference."""
    sums = torch.zeros(clear.shape, dtype=torch.int64, device=clear.device)
    launch(
        _cover, (len(polygons),), clear, single(points), polygons, sums,
        *_sizes(polygons, clear.shape, sigma), **WARP,
    )  # fmt: skip
    grid = (triton.cdiv(clear.numel(), BLOCK),)
    launch(_uncover, grid, clear, sums, clear, clear.numel(), BLOCK=BLOCK)


def silhouettes_backward(
    slopes: Tensor, clear: Tensor, points: Tensor, polygons: Tensor, sigma: float, out: Tensor
) -> None:
    """float32. Fills out [C * F, 4, 2] as the reference."""
    ahead = (slopes * clear).contiguous()
    launch(
        _pull, (len(polygons),), out, single(points), polygons, ahead, polygons, ahead, out,
        *_sizes(polygons, clear.shape, sigma), SUMS=False, CULL=False, **WARP,
    )  # fmt: skip


def coverage(
    points: Tensor,
    polygons: Tensor,
    masks: Tensor,
    sigma: float,
    cull: bool,
    sums: Tensor,
    peak: Tensor,
    extent: Tensor,
) -> None:
    """float32. Fills sums, peak and extent as the reference."""
    count, (height, width) = len(polygons), masks.shape[1:]
    launch(
        _extents, (triton.cdiv(count, BLOCK),), extent, single(points), polygons, extent, count,
        width, height, BLOCK=BLOCK,
    )  # fmt: skip
    holes = walk.holes(masks) if cull else polygons
    launch(
        _measure, (count,), sums, single(points), polygons, masks.contiguous(), holes, extent, sums,
        peak, *_sizes(polygons, masks.shape, sigma), CULL=cull, **WARP,
    )  # fmt: skip


def coverage_backward(
    slopes: Tensor,
    points: Tensor,
    polygons: Tensor,
    masks: Tensor,
    sigma: float,
    cull: bool,
    out: Tensor,
) -> None:
    """float32. Fills out [C * F, 4, 2] as the reference."""
    holes = walk.holes(masks) if cull else polygons
    launch(
        _pull, (len(polygons),), out, single(points), polygons, masks.contiguous(), holes,
        slopes.contiguous(), out, *_sizes(polygons, masks.shape, sigma), SUMS=True, CULL=cull,
        **WARP,
    )  # fmt: skip


def visible(points: Tensor, depths: Tensor, polygons: Tensor, winner: Tensor) -> None:
    """float32. Fills winner [C, H, W] as the reference."""
    nearest = torch.full(winner.shape, NOTHING, dtype=torch.int64, device=winner.device)
    launch(
        find_front, (len(polygons),), winner, single(points), depths, polygons, nearest,
        *_sizes(polygons, winner.shape, 1.0)[:3], **WARP, enable_fp_fusion=False,
    )  # fmt: skip
    # the number of the polygon is the lower half; of all ones where there is none
    winner.copy_(nearest.view(torch.int32)[..., ::2])


def weigh(
    winner: Tensor, seen: Tensor, faces: Tensor, inverse: Tensor, depths: Tensor, weights: Tensor
) -> None:
    """float32. Fills depths [C, H, W] and weights [C, H, W, 3] as the reference."""
    (height, width), count = winner.shape[1:], winner.numel()
    launch(
        weigh_corners, (triton.cdiv(count, BLOCK),), winner, winner, single(seen).contiguous(),
        faces, inverse, depths, weights, count, seen.shape[1], width, height, BLOCK=BLOCK,
    )  # fmt: skip


def _sizes(polygons: Tensor, shape: torch.Size, sigma: float) -> tuple[int, int, int, float, float]:
    """Polygons of a view, columns and rows of a picture, reach of the blur and sigma^-2."""
    views, height, width = shape
    each = len(polygons) // max(views, 1)
    return each, width, height, math.sqrt(reference.BLUR) * sigma, sigma**-2
