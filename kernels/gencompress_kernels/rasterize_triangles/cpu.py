"""Soft and hard triangles on the CPU with numba.

A polygon is evaluated over the box around its blur, in blocks of at most `FLAT` pixels that lie
one after the other in a scratch plane whatever their rows, so that the loops over them are long
and vectorise though boxes are small. Sums and gradients go by polygon; pictures by bands of rows,
each drawn by one worker in the order of the faces. No atomics: the same at any number of threads.

Floor: a pixel of a box takes about 17 operations an edge and 24 for x and the sigmoid, 75 in all,
and nothing of it goes to memory; a polygon reads 32 bytes (corners, box) and writes 20. 5,120 faces
of a sphere at 256 px have boxes of 66 px: 25 MFLOP and 0.3 MB a picture, and backward once more
with 20 operations an edge on top. Blocks of 8 or 16 columns hold 1.5 times the pixels of their
boxes. Small faces, as of a million at 256 px, cost what a polygon costs before its first pixel:
about 60 ns. A z-buffer takes 12 operations a pixel of a box in float64.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels.rasterize_triangles import reference
from gencompress_kernels.rasterize_triangles.cpu_backward import pull
from gencompress_kernels.rasterize_triangles.cpu_front import front, interpolate
from gencompress_kernels.rasterize_triangles.cpu_soft import bound, cover, f32, i32, measure


def silhouettes(points: Tensor, polygons: Tensor, sigma: float, clear: Tensor) -> None:
    """float32. Fills clear [C, H, W] as the reference."""
    boxes = boxes_of(points, polygons, sigma, clear.shape)
    clear.fill_(1)
    workers = numba.get_num_threads()
    cover(as_numpy(points), polygons.numpy(), boxes, f32(sigma**-2), workers, clear.numpy())


def silhouettes_backward(
    slopes: Tensor, clear: Tensor, points: Tensor, polygons: Tensor, sigma: float, out: Tensor
) -> None:
    """float32. Fills out [C * F, 4, 2] as the reference."""
    boxes = boxes_of(points, polygons, sigma, clear.shape)
    ahead = (slopes * clear)[None].numpy()
    pull(
        as_numpy(points), polygons.numpy(), boxes, f32(sigma**-2), ahead, _holes(clear, False),
        np.empty((0, 2), f32), numba.get_num_threads(), out.numpy(),
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
    boxes = boxes_of(points, polygons, sigma, masks.shape)
    workers = numba.get_num_threads()
    measure(
        as_numpy(points), polygons.numpy(), boxes, f32(sigma**-2), (1 - masks).numpy(),
        _holes(masks, cull), workers, sums.numpy(), peak.numpy(), extent.numpy(),
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
    boxes = boxes_of(points, polygons, sigma, masks.shape)
    pull(
        as_numpy(points), polygons.numpy(), boxes, f32(sigma**-2), (1 - masks)[None].numpy(),
        _holes(masks, cull), slopes.numpy(), numba.get_num_threads(), out.numpy(),
    )  # fmt: skip


def visible(points: Tensor, depths: Tensor, polygons: Tensor, winner: Tensor) -> None:
    """float32. Fills winner [C, H, W] as the reference."""
    boxes = boxes_of(points, polygons, 0.0, winner.shape)
    front(
        as_numpy(points), depths.numpy(), polygons.numpy(), boxes, numba.get_num_threads(),
        winner.numpy(),
    )  # fmt: skip


def weigh(
    winner: Tensor, seen: Tensor, faces: Tensor, inverse: Tensor, depths: Tensor, weights: Tensor
) -> None:
    """float32. Fills depths [C, H, W] and weights [C, H, W, 3] as the reference."""
    interpolate(
        winner.numpy(), as_numpy(seen), faces.numpy(), inverse.numpy(), depths.numpy(),
        weights.numpy(),
    )  # fmt: skip


def as_numpy(points: Tensor) -> np.ndarray:
    if points.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {points.dtype}")
    return points.detach().numpy()


def boxes_of(points: Tensor, polygons: Tensor, sigma: float, shape: torch.Size) -> np.ndarray:
    """int32 [Q, 4]: first column, past the last, first row, past the last; empty as zeros."""
    boxes = np.zeros((len(polygons), 4), i32)
    reach = f32(math.sqrt(reference.BLUR) * sigma)
    bound(as_numpy(points), polygons.numpy(), reach, shape[2], shape[1], boxes)
    return boxes


def _holes(masks: Tensor, cull: bool) -> np.ndarray:
    """int32 [C, H + 1, W + 1]: how many pixels above and left of a place are not ones of the mask;
    without `cull` nothing to ask."""
    if not cull:
        return np.zeros((len(masks), 0, 0), i32)
    table = np.zeros((len(masks), masks.shape[1] + 1, masks.shape[2] + 1), i32)
    np.cumsum((masks < 1).numpy(), axis=1, dtype=i32, out=table[:, 1:, 1:])
    np.cumsum(table[:, 1:, 1:], axis=2, out=table[:, 1:, 1:])
    return table
