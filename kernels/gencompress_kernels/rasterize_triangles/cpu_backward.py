"""Gradients of soft maps by the corners of their polygons."""

from __future__ import annotations

import numba
import numpy as np

from gencompress_kernels import jit
from gencompress_kernels.rasterize_triangles.cpu_soft import (
    BLOCK,
    COVER,
    EDGE,
    EXPONENT,
    FLAT,
    ONE,
    OPEN,
    TWO,
    WIDEST,
    ZERO,
    f32,
    field,
    full,
    i32,
    laid_out,
    load,
    probabilities,
    shift_of,
)


@jit.parallel
def pull(points, polygons, boxes, inverse, pictures, holes, slopes, workers, out):
    """Gradients by the corners. With slopes [Q, 2] those of the sums, pictures[0] = 1 - masks; with
    slopes [0, 2] those of the silhouettes, pictures[0] = slopes * clear."""
    views = pictures.shape[1]
    count = len(polygons) // max(views, 1)
    blocks = (len(polygons) + BLOCK - 1) // BLOCK
    for worker in numba.prange(workers):
        scratch, corners, edges = np.empty(4 * FLAT, f32), np.empty(8), np.empty((4, 8), f32)
        for block in range(worker, blocks, workers):
            for q in range(block * BLOCK, min((block + 1) * BLOCK, len(polygons))):
                out[q] = ZERO
                box = boxes[q]
                if polygons[q, 0] < 0 or box[0] == box[1]:
                    continue
                view = q // count
                if full(holes, view, box):
                    continue
                number, orient = load(points, polygons[q], corners)
                summed = len(slopes) > 0
                by_area, by_outside = ZERO, ONE
                if summed:
                    by_area, by_outside = slopes[q, 0], slopes[q, 1]
                _turn(
                    corners, number, orient, box, inverse, pictures[0, view], summed, by_area,
                    by_outside, edges, scratch, out[q],
                )  # fmt: skip


@jit.serial
def _turn(
    corners, number, orient, box, inverse, picture, summed, by_area, by_outside, edges, scratch, out
):
    bent = ONE if summed else ZERO
    x = box[0]
    while x < box[1]:
        columns = min(1 << WIDEST, box[1] - x)
        step = FLAT >> shift_of(columns)
        y = box[2]
        while y < box[3]:
            rows = min(step, box[3] - y)
            shift = field(corners, number, orient, x, y, columns, rows, inverse, edges, scratch)
            if shift >= 0:
                pixels = rows << shift
                probabilities(pixels, False, scratch)
                laid_out(picture, x, y, columns, rows, shift, scratch)
                # d loss / d (squared distance), in place of P
                for i in range(pixels):
                    cover = scratch[COVER + i]
                    sign = inverse if scratch[EXPONENT + i] >= ZERO else -inverse
                    slope = by_area + by_outside * scratch[OPEN + i]
                    scratch[COVER + i] = sign * slope * cover * (ONE - bent * cover)
                for k in range(number):
                    _edge(edges[k], k, 0 if k == number - 1 else k + 1, shift, pixels, scratch, out)
            y += rows
        x += columns


@jit.serial
def _edge(edge, k, after, shift, count, scratch, out):
    low, right, own = i32((1 << shift) - 1), i32(shift), f32(k)
    first_x, first_y, second_x, second_y = ZERO, ZERO, ZERO, ZERO
    x0, y0, ux, uy, start, end, place, inverse = (
        edge[0], edge[1], edge[2], edge[3], edge[4], edge[5], edge[6], edge[7],
    )  # fmt: skip
    for i in range(i32(count)):
        dx, dy = f32(i & low) - x0, f32(i >> right) - y0
        along = min(max(dx * ux + dy * uy, start), end)
        weight = scratch[COVER + i] if scratch[EDGE + i] == own else ZERO
        wx, wy = weight * (dx - along * ux), weight * (dy - along * uy)
        t = place + along * inverse
        first_x += wx - t * wx
        first_y += wy - t * wy
        second_x += t * wx
        second_y += t * wy
    out[k, 0] -= TWO * first_x
    out[k, 1] -= TWO * first_y
    out[after, 0] -= TWO * second_x
    out[after, 1] -= TWO * second_y
