"""A z-buffer on the CPU, and where in its triangle a pixel lies. float64 throughout."""

from __future__ import annotations

import math

import numba
import numpy as np

from gencompress_kernels import jit
from gencompress_kernels.rasterize_triangles.cpu_soft import (
    FAR,
    FLAT,
    WIDEST,
    band_of,
    f32,
    i32,
    shift_of,
)

NOTHING = f32(3e38)  # deeper than all


@jit.parallel
def front(points, depths, polygons, boxes, workers, winner):
    views, height, width = winner.shape
    count = len(polygons) // max(views, 1)
    band = band_of(height)
    bands = (height + band - 1) // band
    for worker in numba.prange(workers):
        lines, scratch = np.empty((4, 3)), np.empty(FLAT, f32)
        nearest = np.empty((band, width), f32)
        for task in range(worker, views * bands, workers):
            view, top = task // bands, task % bands * band
            bottom = min(top + band, height)
            nearest[:] = NOTHING
            winner[view, top:bottom] = i32(-1)
            for q in range(view * count, (view + 1) * count):
                y0, y1 = max(boxes[q, 2], top), min(boxes[q, 3], bottom)
                if y0 >= y1:
                    continue
                number = _lines(points, polygons[q], lines)
                if number == 0:
                    continue
                plane = _slope(points, depths, polygons[q])
                x = boxes[q, 0]
                while x < boxes[q, 1]:
                    columns, rows = min(1 << WIDEST, boxes[q, 1] - x), y1 - y0
                    shift = shift_of(columns)
                    _depths(lines, number, plane, x, y0, columns, rows, shift, scratch)
                    _closer(
                        nearest[y0 - top :], winner[view, y0:], i32(q - view * count), x, columns,
                        rows, shift, scratch,
                    )  # fmt: skip
                    x += columns


@jit.serial
def _depths(lines, number, plane, left, top, columns, rows, shift, scratch):
    """Depths of a block, `NOTHING` outside; pixel i lies in column i mod 2^shift."""
    low, right, columns = i32((1 << shift) - 1), i32(shift), i32(columns)
    b0, bx, by, least_depth, most_depth = plane
    first, second, third, fourth = lines[0], lines[1], lines[2], lines[number - 1]
    for i in range(i32(rows << shift)):
        column = i & low
        x, y = left + column + 0.5, top + (i >> right) + 0.5
        least = min(
            first[0] + first[1] * x + first[2] * y, second[0] + second[1] * x + second[2] * y
        )
        least = min(least, third[0] + third[1] * x + third[2] * y)
        if number == 4:
            least = min(least, fourth[0] + fourth[1] * x + fourth[2] * y)
        depth = min(max(1 / (b0 + bx * x + by * y), least_depth), most_depth)
        scratch[i] = f32(depth) if least >= 0 and column < columns else NOTHING


@jit.serial
def _closer(nearest, winner, face, x, columns, rows, shift, scratch):
    narrow = shift == 3 and x + 8 <= winner.shape[1]
    for row in range(rows):
        at = row << shift
        near, who = nearest[row], winner[row]
        if narrow:  # a loop of known length is vectorised; columns past the box hold `NOTHING`
            for column in range(8):
                closer = scratch[at + column] < near[x + column]
                near[x + column] = scratch[at + column] if closer else near[x + column]
                who[x + column] = face if closer else who[x + column]
        else:
            for column in range(columns):
                closer = scratch[at + column] < near[x + column]
                near[x + column] = scratch[at + column] if closer else near[x + column]
                who[x + column] = face if closer else who[x + column]


@jit.serial
def _lines(points, polygon, lines):
    """Edge functions c + a x + b y, not negative inside; 0 of them for a polygon without area.
    Both neighbours of an edge compute it from the same end, so that no pixel falls between."""
    p0, p1, p2, p3 = polygon[0], polygon[1], polygon[2], polygon[3]
    area = (float(points[p2, 0]) - points[p0, 0]) * (float(points[p3, 1]) - points[p1, 1])
    area -= (float(points[p2, 1]) - points[p0, 1]) * (float(points[p3, 0]) - points[p1, 0])
    if area == 0:
        return 0
    number = 3 if p2 == p3 else 4
    for k in range(number):
        first, second = polygon[k], polygon[0 if k == number - 1 else k + 1]
        sign = 1.0 if area > 0 else -1.0
        if second < first:
            first, second, sign = second, first, -sign
        ax, ay = float(points[first, 0]), float(points[first, 1])
        ex, ey = float(points[second, 0]) - ax, float(points[second, 1]) - ay
        lines[k, 0] = sign * (ey * ax - ex * ay)
        lines[k, 1] = -sign * ey
        lines[k, 2] = sign * ex
    return number


@jit.serial
def _slope(points, depths, polygon):
    """1 / depth = b0 + bx x + by y, from the larger half of the polygon; least and largest depth of
    its corners, which rounding must not leave in a sliver."""
    least, most = FAR, 0.0
    for k in range(4):
        least, most = min(least, depths[polygon[k]]), max(most, depths[polygon[k]])
    p, r, s, u = polygon[0], polygon[1], polygon[2], polygon[3]
    if abs(_twice(points, p, s, u)) > abs(_twice(points, p, r, s)):
        r, s = s, u
    area = _twice(points, p, r, s)
    b0, bx, by = 0.0, 0.0, 0.0
    for _ in range(3):
        ax, ay = float(points[r, 0]), float(points[r, 1])
        ex, ey = float(points[s, 0]) - ax, float(points[s, 1]) - ay
        share = 1 / (depths[p] * area)
        b0 += share * (ey * ax - ex * ay)
        bx -= share * ey
        by += share * ex
        p, r, s = r, s, p
    return b0, bx, by, least, most


@jit.serial
def _twice(points, a, b, c):
    ax, ay = float(points[a, 0]), float(points[a, 1])
    return (float(points[b, 0]) - ax) * (float(points[c, 1]) - ay) - (float(points[b, 1]) - ay) * (
        float(points[c, 0]) - ax
    )


@jit.parallel
def interpolate(winner, seen, faces, inverse, depths, weights):
    views, height, width = winner.shape
    for task in numba.prange(views * height):
        view, row = task // height, task % height
        m = inverse[view]
        for column in range(width):
            face = winner[view, row, column]
            if face < 0:
                depths[view, row, column] = math.inf
                for k in range(3):
                    weights[view, row, column, k] = f32(0)
                continue
            x, y = column + 0.5, row + 0.5
            rx = m[0, 0] * x + m[0, 1] * y + m[0, 2]
            ry = m[1, 0] * x + m[1, 1] * y + m[1, 2]
            rz = m[2, 0] * x + m[2, 1] * y + m[2, 2]
            a, b, c = (
                seen[view, faces[face, 0]],
                seen[view, faces[face, 1]],
                seen[view, faces[face, 2]],
            )
            wa, wb, wc = (
                _triple(rx, ry, rz, b, c),
                _triple(rx, ry, rz, c, a),
                _triple(rx, ry, rz, a, b),
            )
            sign = 1.0 if wa + wb + wc > 0 else -1.0
            # on an edge rounding may leave a weight a little below 0
            wa, wb, wc = max(sign * wa, 0.0), max(sign * wb, 0.0), max(sign * wc, 0.0)
            share = 1 / max(wa + wb + wc, 1e-300)
            wa, wb, wc = wa * share, wb * share, wc * share
            weights[view, row, column, 0] = f32(wa)
            weights[view, row, column, 1] = f32(wb)
            weights[view, row, column, 2] = f32(wc)
            depths[view, row, column] = f32(wa * a[2] + wb * b[2] + wc * c[2])


@jit.inline
def _triple(x, y, z, one, other):
    """ray . one x other"""
    ax, ay, az = float(one[0]), float(one[1]), float(one[2])
    bx, by, bz = float(other[0]), float(other[1]), float(other[2])
    return x * (ay * bz - az * by) + y * (az * bx - ax * bz) + z * (ax * by - ay * bx)
