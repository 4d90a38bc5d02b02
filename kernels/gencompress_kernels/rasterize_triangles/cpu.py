"""Soft and hard triangles on the CPU with numba.

A polygon is evaluated over the box around its blur, in blocks of at most `FLAT` pixels that lie
one after the other in a scratch plane whatever their rows, so that the loops over them are long
and vectorise though boxes are small. Sums and gradients go by polygon; pictures by bands of rows,
each drawn by one worker in the order of the faces. No atomics: the same at any number of threads.

Floor: a pixel of a box takes about 14 operations an edge and 20 for the sigmoid, 62 in all, and
nothing of it goes to memory. 5,120 faces of a sphere at 256 px have boxes of 70 px: 22 MFLOP a
picture, and backward once more with 30 on top.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from gencompress_kernels import jit
from gencompress_kernels.rasterize_triangles import reference

f32, i32 = np.float32, np.int32
FLAT = 2048  # pixels of a block: its four planes stay in the first cache
WIDEST = 6  # log2 of the columns of a block
BAND = 16  # rows
BLOCK = 128  # polygons a task
BLUR = f32(reference.BLUR)
STEEP = f32(80)  # exp(-80) is still a normal number
HUGE = f32(1e30)
# exp(x) = 2^n exp(r), r within ln(2) / 2 of 0, to 4e-7: ln 2 in two parts, Taylor to degree 6
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)
E6, E5, E4, E3, HALF, ONE = f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(0.5), f32(1)
BIAS, MANTISSA = i32(127), i32(23)
TWO, ZERO = f32(2), f32(0)
# planes of the scratch: squared distance, later P; margin to the edges; nearest edge; what is open
NEAREST, MARGIN, EDGE, OPEN = 0, FLAT, 2 * FLAT, 3 * FLAT


def silhouettes(points: Tensor, polygons: Tensor, sigma: float, clear: Tensor) -> None:
    """float32. Fills clear [C, H, W] as the reference."""
    boxes = _boxes(points, polygons, sigma, clear.shape)
    clear.fill_(1)
    workers = numba.get_num_threads()
    _cover(_numpy(points), polygons.numpy(), boxes, f32(sigma**-2), workers, clear.numpy())


def silhouettes_backward(
    slopes: Tensor, clear: Tensor, points: Tensor, polygons: Tensor, sigma: float, out: Tensor
) -> None:
    """float32. Fills out [C * F, 4, 2] as the reference."""
    boxes = _boxes(points, polygons, sigma, clear.shape)
    ahead = (slopes * clear)[None].numpy()
    _pull(
        _numpy(points), polygons.numpy(), boxes, f32(sigma**-2), ahead, ahead[0, :, :0, :0],
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
    boxes = _boxes(points, polygons, sigma, masks.shape)
    workers = numba.get_num_threads()
    _measure(
        _numpy(points), polygons.numpy(), boxes, f32(sigma**-2), (1 - masks).numpy(),
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
    boxes = _boxes(points, polygons, sigma, masks.shape)
    _pull(
        _numpy(points), polygons.numpy(), boxes, f32(sigma**-2), (1 - masks)[None].numpy(),
        _holes(masks, cull), slopes.numpy(), numba.get_num_threads(), out.numpy(),
    )  # fmt: skip


def visible(
    points: Tensor, depths: Tensor, polygons: Tensor, nearest: Tensor, winner: Tensor
) -> None:
    """float32. Fills nearest and winner [C, H, W] as the reference."""
    boxes = _boxes(points, polygons, 0.0, nearest.shape)
    nearest.fill_(math.inf)
    winner.fill_(-1)
    _front(
        _numpy(points), depths.numpy(), polygons.numpy(), boxes, numba.get_num_threads(),
        nearest.numpy(), winner.numpy(),
    )  # fmt: skip


def _numpy(points: Tensor) -> np.ndarray:
    if points.dtype != torch.float32:
        raise ValueError(f"the cpu backend takes float32, got {points.dtype}")
    return points.detach().numpy()


def _boxes(points: Tensor, polygons: Tensor, sigma: float, shape: torch.Size) -> np.ndarray:
    """int32 [Q, 4]: first column, past the last, first row, past the last; empty as zeros."""
    boxes = np.zeros((len(polygons), 4), i32)
    reach = f32(math.sqrt(reference.BLUR) * sigma)
    _bound(_numpy(points), polygons.numpy(), reach, shape[2], shape[1], boxes)
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


@jit.inline
def _exp(x):
    """For x in [-STEEP, 0]."""
    n = np.floor(x * LOG2_E + HALF)
    r = x - n * LN2_HIGH - n * LN2_LOW
    p = (((((E6 * r + E5) * r + E4) * r + E3) * r + HALF) * r + ONE) * r + ONE
    return p * i32((i32(n) + BIAS) << MANTISSA).view(f32)


@jit.inline
def _clamp(value, low, high):
    return min(max(value, low), high)


@jit.parallel
def _bound(points, polygons, reach, width, height, boxes):
    count = len(polygons)
    for block in numba.prange((count + BLOCK - 1) // BLOCK):
        for q in range(block * BLOCK, min((block + 1) * BLOCK, count)):
            if polygons[q, 0] < 0:
                continue
            low_x, low_y, high_x, high_y = HUGE, HUGE, -HUGE, -HUGE
            for k in range(4):
                x, y = points[polygons[q, k], 0], points[polygons[q, k], 1]
                low_x, high_x = min(low_x, x), max(high_x, x)
                low_y, high_y = min(low_y, y), max(high_y, y)
            # centres c + 0.5 with low - reach <= c + 0.5 <= high + reach
            x0 = i32(_clamp(np.ceil(low_x - reach - HALF), ZERO, f32(width)))
            x1 = i32(_clamp(np.floor(high_x + reach + HALF), ZERO, f32(width)))
            y0 = i32(_clamp(np.ceil(low_y - reach - HALF), ZERO, f32(height)))
            y1 = i32(_clamp(np.floor(high_y + reach + HALF), ZERO, f32(height)))
            if x0 < x1 and y0 < y1:
                boxes[q, 0], boxes[q, 1], boxes[q, 2], boxes[q, 3] = x0, x1, y0, y1


@jit.serial
def _load(points, polygon, corners):
    """Corners x0 y0 x1 y1 ...; returns how many there are, and the sign of the area."""
    for k in range(4):
        corners[2 * k] = points[polygon[k], 0]
        corners[2 * k + 1] = points[polygon[k], 1]
    area = (corners[4] - corners[0]) * (corners[7] - corners[3])
    area -= (corners[5] - corners[1]) * (corners[6] - corners[2])
    number = 3 if polygon[2] == polygon[3] else 4
    return number, f32(1) if area > 0 else (f32(-1) if area < 0 else ZERO)


@jit.serial
def _field(corners, number, orient, left, top, shift, count, scratch):
    """Squared distances, margins (negative outside) and nearest edges of a block: pixel i lies in
    column i mod 2^shift and row i >> shift of it."""
    low = i32((1 << shift) - 1)
    right = i32(shift)
    for i in range(count):
        scratch[NEAREST + i] = HUGE
    start = HUGE if orient != 0 else -HUGE
    for i in range(count):
        scratch[MARGIN + i] = start
    for k in range(number):
        after = 0 if k == number - 1 else k + 1
        ax, ay = corners[2 * k] - left - HALF, corners[2 * k + 1] - top - HALF
        ex, ey = corners[2 * after] - corners[2 * k], corners[2 * after + 1] - corners[2 * k + 1]
        length = ex * ex + ey * ey
        inverse = ONE / length if length > f32(1e-30) else ZERO
        own = f32(k)
        sx, sy = orient * ex, orient * ey
        for i in range(i32(count)):
            dx, dy = f32(i & low) - ax, f32(i >> right) - ay
            t = min(max((dx * ex + dy * ey) * inverse, ZERO), ONE)
            qx, qy = dx - t * ex, dy - t * ey
            d = qx * qx + qy * qy
            closer = d < scratch[NEAREST + i]
            scratch[NEAREST + i] = d if closer else scratch[NEAREST + i]
            scratch[EDGE + i] = own if closer else scratch[EDGE + i]
            scratch[MARGIN + i] = min(scratch[MARGIN + i], sx * dy - sy * dx)


@jit.serial
def _probabilities(inverse, shift, columns, count, missing, scratch):
    """Squared distances to P, or 1 - P if `missing`; columns past the box get 0, or 1."""
    low, columns = i32((1 << shift) - 1), i32(columns)
    nothing = ONE if missing else ZERO
    flip = ONE if missing else -ONE
    for i in range(i32(count)):
        x = min(scratch[NEAREST + i] * inverse, STEEP)
        e = _exp(-x)
        large = ONE / (ONE + e)
        inner = scratch[MARGIN + i] >= ZERO
        # P is large inside, 1 - P is large outside
        value = large if inner == (flip < ZERO) else e * large
        gone = (not inner and x > BLUR) or (i & low) >= columns
        scratch[NEAREST + i] = nothing if gone else value


@jit.inline
def _shift(columns):
    """log2 of the columns of a block that holds so many, 3 at least."""
    shift = 3
    while (1 << shift) < columns and shift < WIDEST:
        shift += 1
    return shift


@jit.parallel
def _cover(points, polygons, boxes, inverse, workers, clear):
    views, height, width = clear.shape
    count = len(polygons) // max(views, 1)
    bands = (height + BAND - 1) // BAND
    for worker in numba.prange(workers):
        scratch, corners = np.empty(4 * FLAT, f32), np.empty(8, f32)
        for task in range(worker, views * bands, workers):
            view, top = task // bands, task % bands * BAND
            bottom = min(top + BAND, height)
            for q in range(view * count, (view + 1) * count):
                y0, y1 = max(boxes[q, 2], top), min(boxes[q, 3], bottom)
                if y0 >= y1:
                    continue
                number, orient = _load(points, polygons[q], corners)
                x = boxes[q, 0]
                while x < boxes[q, 1]:
                    shift = _shift(boxes[q, 1] - x)
                    columns = min(1 << shift, boxes[q, 1] - x)
                    pixels = (y1 - y0) << shift
                    _field(corners, number, orient, f32(x), f32(y0), shift, pixels, scratch)
                    _probabilities(inverse, shift, columns, pixels, True, scratch)
                    for row in range(y0, y1):
                        at = (row - y0) << shift
                        line = clear[view, row]
                        for column in range(columns):
                            line[x + column] *= scratch[at + column]
                    x += columns


@jit.inline
def _full(holes, view, box):
    """Whether a box shows ones of the mask and nothing else."""
    if holes.shape[1] == 0:
        return False
    return (
        holes[view, box[3], box[1]]
        - holes[view, box[2], box[1]]
        - holes[view, box[3], box[0]]
        + holes[view, box[2], box[0]]
        == 0
    )


@jit.parallel
def _measure(points, polygons, boxes, inverse, outer, holes, workers, sums, peak, extent):
    views, height, width = outer.shape
    count = len(polygons) // max(views, 1)
    blocks = (len(polygons) + BLOCK - 1) // BLOCK
    for worker in numba.prange(workers):
        scratch, corners = np.empty(4 * FLAT, f32), np.empty(8, f32)
        for block in range(worker, blocks, workers):
            for q in range(block * BLOCK, min((block + 1) * BLOCK, len(polygons))):
                sums[q, 0], sums[q, 1], peak[q] = ZERO, ZERO, ZERO
                extent[q, 0], extent[q, 1] = ZERO, ZERO
                if polygons[q, 0] < 0:
                    continue
                number, orient = _load(points, polygons[q], corners)
                extent[q, 0], extent[q, 1] = _areas(corners, number, width, height)
                box = boxes[q]
                if box[0] == box[1]:
                    continue
                view = q // count
                if _full(holes, view, box):
                    sums[q, 0] = extent[q, 0]
                    continue
                _add(corners, number, orient, box, inverse, outer[view], scratch, sums[q], peak, q)


@jit.serial
def _add(corners, number, orient, box, inverse, outer, scratch, sums, peak, q):
    area, outside, highest = 0.0, 0.0, ZERO
    x = box[0]
    while x < box[1]:
        shift = _shift(box[1] - x)
        columns = min(1 << shift, box[1] - x)
        step = FLAT >> shift
        y = box[2]
        while y < box[3]:
            rows = min(step, box[3] - y)
            pixels = rows << shift
            _field(corners, number, orient, f32(x), f32(y), shift, pixels, scratch)
            _probabilities(inverse, shift, columns, pixels, False, scratch)
            _open(outer, x, y, rows, columns, shift, scratch)
            one, two, most = ZERO, ZERO, ZERO
            for i in range(pixels):
                cover = scratch[i]
                out = cover * scratch[OPEN + i]
                one += cover
                two += out
                most = max(most, out)
            area, outside, highest = area + one, outside + two, max(highest, most)
            y += rows
        x += columns
    sums[0], sums[1], peak[q] = f32(area), f32(outside), highest


@jit.serial
def _open(outer, x, y, rows, columns, shift, scratch):
    """What a picture holds in a block, laid out like it; 0 past the columns."""
    for row in range(rows):
        at = OPEN + (row << shift)
        line = outer[y + row]
        for column in range(columns):
            scratch[at + column] = line[x + column]
        for column in range(columns, 1 << shift):
            scratch[at + column] = ZERO


@jit.serial
def _areas(corners, number, width, height):
    """Area within the frame and in all, px^2; float64. See the reference for the first."""
    within, total = 0.0, 0.0
    for k in range(number):
        after = 0 if k == number - 1 else k + 1
        ax, ay = float(corners[2 * k]), float(corners[2 * k + 1])
        bx, by = float(corners[2 * after]), float(corners[2 * after + 1])
        total += (ax - float(corners[0])) * (by - float(corners[1]))
        total -= (ay - float(corners[1])) * (bx - float(corners[0]))
        x0, x1 = _clamp(ax, 0.0, float(width)), _clamp(bx, 0.0, float(width))
        if x0 == x1:
            continue
        rise = (by - ay) / (bx - ax)
        y0, y1 = ay + rise * (x0 - ax), ay + rise * (x1 - ax)
        if abs(y1 - y0) < 1e-6:
            within += _clamp(0.5 * (y0 + y1), 0.0, float(height)) * (x1 - x0)
        else:
            within += (_primitive(y1, float(height)) - _primitive(y0, float(height))) / rise
    return f32(abs(within)), f32(0.5 * abs(total))


@jit.inline
def _primitive(y, height):
    inner = _clamp(y, 0.0, height)
    return 0.5 * inner * inner + height * max(y - inner, 0.0)


@jit.parallel
def _pull(points, polygons, boxes, inverse, pictures, holes, slopes, workers, out):
    """Gradients by the corners. With slopes [Q, 2] those of the sums, pictures[0] = 1 - masks; with
    slopes [0, 2] those of the silhouettes, pictures[0] = slopes * clear."""
    views = pictures.shape[1]
    count = len(polygons) // max(views, 1)
    blocks = (len(polygons) + BLOCK - 1) // BLOCK
    for worker in numba.prange(workers):
        scratch, corners = np.empty(4 * FLAT, f32), np.empty(8, f32)
        for block in range(worker, blocks, workers):
            for q in range(block * BLOCK, min((block + 1) * BLOCK, len(polygons))):
                out[q] = ZERO
                box = boxes[q]
                if polygons[q, 0] < 0 or box[0] == box[1]:
                    continue
                view = q // count
                if _full(holes, view, box):
                    continue
                number, orient = _load(points, polygons[q], corners)
                summed = len(slopes) > 0
                by_area, by_outside = ZERO, ONE
                if summed:
                    by_area, by_outside = slopes[q, 0], slopes[q, 1]
                _turn(
                    corners, number, orient, box, inverse, pictures[0, view], summed, by_area,
                    by_outside, scratch, out[q],
                )  # fmt: skip


@jit.serial
def _turn(
    corners, number, orient, box, inverse, picture, summed, by_area, by_outside, scratch, out
):
    x = box[0]
    while x < box[1]:
        shift = _shift(box[1] - x)
        columns = min(1 << shift, box[1] - x)
        step = FLAT >> shift
        y = box[2]
        while y < box[3]:
            rows = min(step, box[3] - y)
            pixels = rows << shift
            _field(corners, number, orient, f32(x), f32(y), shift, pixels, scratch)
            _probabilities(inverse, shift, columns, pixels, False, scratch)
            _open(picture, x, y, rows, columns, shift, scratch)
            # d loss / d (squared distance), in place of P
            bent = ONE if summed else ZERO
            for i in range(pixels):
                cover = scratch[NEAREST + i]
                sign = inverse if scratch[MARGIN + i] >= ZERO else -inverse
                slope = by_area + by_outside * scratch[OPEN + i]
                scratch[NEAREST + i] = sign * slope * cover * (ONE - bent * cover)
            for k in range(number):
                _edge(corners, number, k, f32(x), f32(y), shift, pixels, scratch, out)
            y += rows
        x += columns


@jit.serial
def _edge(corners, number, k, left, top, shift, count, scratch, out):
    after = 0 if k == number - 1 else k + 1
    low, right, own = i32((1 << shift) - 1), i32(shift), f32(k)
    ax, ay = corners[2 * k] - left - HALF, corners[2 * k + 1] - top - HALF
    ex, ey = corners[2 * after] - corners[2 * k], corners[2 * after + 1] - corners[2 * k + 1]
    length = ex * ex + ey * ey
    inverse = ONE / length if length > f32(1e-30) else ZERO
    first_x, first_y, second_x, second_y = ZERO, ZERO, ZERO, ZERO
    for i in range(i32(count)):
        dx, dy = f32(i & low) - ax, f32(i >> right) - ay
        t = min(max((dx * ex + dy * ey) * inverse, ZERO), ONE)
        weight = scratch[NEAREST + i] if scratch[EDGE + i] == own else ZERO
        wx, wy = weight * (dx - t * ex), weight * (dy - t * ey)
        first_x += wx - t * wx
        first_y += wy - t * wy
        second_x += t * wx
        second_y += t * wy
    out[k, 0] -= TWO * first_x
    out[k, 1] -= TWO * first_y
    out[after, 0] -= TWO * second_x
    out[after, 1] -= TWO * second_y


@jit.parallel
def _front(points, depths, polygons, boxes, workers, nearest, winner):
    views, height, width = nearest.shape
    count = len(polygons) // max(views, 1)
    bands = (height + BAND - 1) // BAND
    for worker in numba.prange(workers):
        lines = np.empty((4, 3))
        for task in range(worker, views * bands, workers):
            view, top = task // bands, task % bands * BAND
            bottom = min(top + BAND, height)
            for q in range(view * count, (view + 1) * count):
                y0, y1 = max(boxes[q, 2], top), min(boxes[q, 3], bottom)
                if y0 >= y1:
                    continue
                polygon = polygons[q]
                number = _lines(points, polygon, lines)
                if number == 0:
                    continue
                b0, bx, by = _slope(points, depths, polygon)
                for row in range(y0, y1):
                    y = row + 0.5
                    for column in range(boxes[q, 0], boxes[q, 1]):
                        x = column + 0.5
                        least = lines[0, 0] + lines[0, 1] * x + lines[0, 2] * y
                        for k in range(1, number):
                            least = min(least, lines[k, 0] + lines[k, 1] * x + lines[k, 2] * y)
                        if least >= 0:
                            depth = f32(1 / (b0 + bx * x + by * y))
                            if depth < nearest[view, row, column]:
                                nearest[view, row, column] = depth
                                winner[view, row, column] = i32(q - view * count)


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
    """1 / depth = b0 + bx x + by y, from the larger half of the polygon."""
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
    return b0, bx, by


@jit.serial
def _twice(points, a, b, c):
    ax, ay = float(points[a, 0]), float(points[a, 1])
    return (float(points[b, 0]) - ax) * (float(points[c, 1]) - ay) - (float(points[b, 1]) - ay) * (
        float(points[c, 0]) - ax
    )
