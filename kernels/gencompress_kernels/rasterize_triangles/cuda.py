"""Soft and hard triangles with CUDA: a warp takes a polygon (`cuda.cu`, `soft.cuh`).

A silhouette adds the logarithms of 1 - P as whole numbers, a z-buffer compares depths the same way,
so there are neither lists of tiles nor an order that matters. One polygon that fills a picture is
still one warp's work. Floors as on the CPU; a z-buffer in float64 takes 12 operations a pixel of a
box, slow on cards that have few units for it. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gencompress_kernels.nvrtc import Kernel, blocks_of, kernel, long
from gencompress_kernels.rasterize_triangles import reference, walk

SOURCE = "rasterize_triangles/cuda.cu"
CONSTANTS = {
    "BLUR": reference.BLUR, "STEEP": reference.STEEP, "SHARE": walk.SHARE,
    "TILE_COLUMNS": walk.TILE_COLUMNS, "TILE_ROWS": walk.TILE_ROWS,
}  # fmt: skip
WARPS = 4  # polygons a block
_cover = kernel(SOURCE, "cover", CONSTANTS)
_uncover = kernel(SOURCE, "uncover", CONSTANTS)
_extents = kernel(SOURCE, "extents", CONSTANTS)
_measure = kernel(SOURCE, "measure", CONSTANTS)
_corners = kernel(SOURCE, "corners", CONSTANTS)
_front = kernel(SOURCE, "front", CONSTANTS)
_weigh = kernel(SOURCE, "weigh", CONSTANTS)


def silhouettes(points: Tensor, polygons: Tensor, sigma: float, clear: Tensor) -> None:
    """float32. Fills clear [C, H, W] as the reference."""
    sums = torch.zeros(clear.shape, dtype=torch.int64, device=clear.device)
    _per_polygon(_cover, polygons, clear.shape, sigma, _single(points), polygons, sums)
    _uncover(blocks_of(clear.numel(), 256), 256, sums, clear, long(clear.numel()))


def silhouettes_backward(
    slopes: Tensor, clear: Tensor, points: Tensor, polygons: Tensor, sigma: float, out: Tensor
) -> None:
    """float32. Fills out [C * F, 4, 2] as the reference."""
    ahead = (slopes * clear).contiguous()
    arrays = _single(points), polygons, ahead, None, None, out
    _per_polygon(_corners, polygons, clear.shape, sigma, *arrays)


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
    _extents(
        blocks_of(count, 256), 256, _single(points), polygons, extent, long(count), width, height
    )
    arrays = points.detach(), polygons, masks.contiguous(), _holes(masks, cull), extent, sums, peak
    _per_polygon(_measure, polygons, masks.shape, sigma, *arrays)


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
    masks, slopes = masks.contiguous(), slopes.contiguous()
    arrays = _single(points), polygons, masks, _holes(masks, cull), slopes, out
    _per_polygon(_corners, polygons, masks.shape, sigma, *arrays)


def visible(points: Tensor, depths: Tensor, polygons: Tensor, winner: Tensor) -> None:
    """float32. Fills winner [C, H, W] as the reference."""
    views, height, width = winner.shape
    nearest = torch.full(winner.shape, -1, dtype=torch.int64, device=winner.device)
    _front(
        blocks_of(len(polygons), WARPS), 32 * WARPS, _single(points), depths, polygons, nearest,
        long(len(polygons)), long(len(polygons) // max(views, 1)), width, height,
    )  # fmt: skip
    # the number of the polygon is the lower half; of all ones where there is none
    winner.copy_(nearest.view(torch.int32)[..., ::2])


def weigh(
    winner: Tensor, seen: Tensor, faces: Tensor, inverse: Tensor, depths: Tensor, weights: Tensor
) -> None:
    """float32. Fills depths [C, H, W] and weights [C, H, W, 3] as the reference."""
    height, width = winner.shape[1:]
    _weigh(
        blocks_of(winner.numel(), 256), 256, winner, _single(seen).contiguous(), faces, inverse,
        depths, weights, long(winner.numel()), long(seen.shape[1]), width, height,
    )  # fmt: skip


def _per_polygon(
    which: Kernel, polygons: Tensor, shape: torch.Size, sigma: float, *arrays: Tensor | None
) -> None:
    """A warp for each polygon of `shape[0]` views."""
    count, (views, height, width) = len(polygons), shape
    which(
        blocks_of(count, WARPS), 32 * WARPS, *arrays, long(count), long(count // max(views, 1)),
        width, height, math.sqrt(reference.BLUR) * sigma, sigma**-2,
    )  # fmt: skip


def _holes(masks: Tensor, cull: bool) -> Tensor | None:
    """As `walk.holes`; None without `cull`."""
    return walk.holes(masks) if cull else None


def _single(points: Tensor) -> Tensor:
    if points.dtype != torch.float32:
        raise ValueError(f"the cuda backend takes float32, got {points.dtype}")
    return points.detach()
