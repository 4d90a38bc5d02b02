"""Soft maps of polygons, block by block: their product in a picture, their sums by polygon."""

from __future__ import annotations

import math

import numba
import numpy as np

from gencompress_kernels import jit
from gencompress_kernels.rasterize_triangles import reference

f32, i32 = np.float32, np.int32
FLAT = 2048  # pixels of a block: its four planes stay in the first cache
WIDEST = 6  # log2 of the columns of a block
BLOCK = 128  # polygons a task
BLUR = f32(reference.BLUR)
STEEP = f32(reference.STEEP)
HUGE, FAR = f32(1e30), 1e300
# exp(x) = 2^n exp(r), r within ln(2) / 2 of 0, to 4e-7: ln 2 in two parts, Taylor to degree 6
LOG2_E, LN2_HIGH, LN2_LOW = f32(1.4426950408889634), f32(0.693359375), f32(-2.12194440e-4)
E6, E5, E4, E3, HALF, ONE = f32(1 / 720), f32(1 / 120), f32(1 / 24), f32(1 / 6), f32(0.5), f32(1)
BIAS, MANTISSA = i32(127), i32(23)
ZERO, TWO, THREE = f32(0), f32(2), f32(3)
# planes of the scratch: x; P or what comes of it; nearest edge; what is open
EXPONENT, COVER, EDGE, OPEN = 0, FLAT, 2 * FLAT, 3 * FLAT


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


@jit.inline
def shift_of(columns):
    """log2 of the columns of a block that holds so many, 3 at least."""
    shift = 3
    while (1 << shift) < columns and shift < WIDEST:
        shift += 1
    return shift


@jit.parallel
def bound(points, polygons, reach, width, height, boxes):
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
def load(points, polygon, corners):
    """Corners x0 y0 x1 y1 ...; returns how many there are, and the sign of the area."""
    for k in range(4):
        corners[2 * k] = points[polygon[k], 0]
        corners[2 * k + 1] = points[polygon[k], 1]
    area = (corners[4] - corners[0]) * (corners[7] - corners[3])
    area -= (corners[5] - corners[1]) * (corners[6] - corners[2])
    number = 3 if polygon[2] == polygon[3] else 4
    return number, ONE if area > 0 else (-ONE if area < 0 else ZERO)


@jit.serial
def _prepare(corners, number, orient, left, top, columns, rows, edges):
    """Edges as seen from the first pixel centre of a block, and the least of the signed distances
    from the middle of the block to their lines, positive inside (0 without area).

    An edge starts where it passes the middle of the block, so that float32 holds the pixels of the
    block to a millionth though a corner lies far outside the picture.
    """
    middle_x, middle_y = 0.5 * (columns - 1), 0.5 * (rows - 1)
    least = FAR if orient != 0 else 0.0
    for k in range(number):
        after = 0 if k == number - 1 else k + 1
        ax, ay = corners[2 * k] - left - 0.5, corners[2 * k + 1] - top - 0.5
        ux, uy = corners[2 * after] - corners[2 * k], corners[2 * after + 1] - corners[2 * k + 1]
        length = math.sqrt(ux * ux + uy * uy)
        inverse = 1 / length if length > 1e-30 else 0.0
        ux, uy = ux * inverse, uy * inverse
        start = _clamp((middle_x - ax) * ux + (middle_y - ay) * uy, 0.0, length)
        ax, ay = ax + start * ux, ay + start * uy
        least = min(least, orient * (ux * (middle_y - ay) - uy * (middle_x - ax)))
        edge = edges[k]
        edge[0], edge[1], edge[2], edge[3] = f32(ax), f32(ay), f32(ux), f32(uy)
        edge[4], edge[5] = f32(-start), f32(length - start)
        edge[6], edge[7] = f32(start * inverse), f32(inverse)
    return least


@jit.inline
def _six(edge):
    return edge[0], edge[1], edge[2], edge[3], edge[4], edge[5]


@jit.inline
def _step(dx, dy, ux, uy, start, end):
    """Squared distance to an edge, and the signed one to its line."""
    along = min(max(dx * ux + dy * uy, start), end)
    qx, qy = dx - along * ux, dy - along * uy
    return qx * qx + qy * qy, ux * dy - uy * dx


@jit.serial
def field(corners, number, orient, left, top, columns, rows, inverse, edges, scratch):
    """x of a block and the nearest edges; pixel i lies in column i mod 2^shift and row i >> shift.
    Returns the shift, or -1 where all of the block lies beyond the blur. Columns past the box get
    an x of -STEEP."""
    shift = shift_of(columns)
    least = _prepare(corners, number, orient, left, top, columns, rows, edges)
    around = 0.5 * math.sqrt(float(columns * columns + rows * rows))
    if least < -around - math.sqrt(BLUR / inverse):
        return -1
    low, right, count = i32((1 << shift) - 1), i32(shift), i32(rows << shift)
    columns = i32(columns)
    nought = ZERO if orient != ZERO else HUGE  # what has no area has no inside
    # in registers: behind an array the compiler would have to read them anew for each pixel
    ax, ay, au, av, as_, at = _six(edges[0])
    bx, by, bu, bv, bs, bt = _six(edges[1])
    cx, cy, cu, cv, cs, ct = _six(edges[2])
    dx, dy, du, dv, ds, dt = _six(edges[number - 1])
    for i in range(count):
        column = i & low
        x, y = f32(column), f32(i >> right)
        best, margin = _step(x - ax, y - ay, au, av, as_, at)
        margin *= orient
        own = ZERO
        d, m = _step(x - bx, y - by, bu, bv, bs, bt)
        own = ONE if d < best else own
        best, margin = min(best, d), min(margin, orient * m)
        d, m = _step(x - cx, y - cy, cu, cv, cs, ct)
        own = TWO if d < best else own
        best, margin = min(best, d), min(margin, orient * m)
        if number == 4:
            d, m = _step(x - dx, y - dy, du, dv, ds, dt)
            own = THREE if d < best else own
            best, margin = min(best, d), min(margin, orient * m)
        value = min(best * inverse, STEEP)
        value = value if margin >= nought else -value
        scratch[EXPONENT + i] = value if column < columns else -STEEP
        scratch[EDGE + i] = own
    return shift


@jit.serial
def probabilities(count, missing, scratch):
    """x to P, or to 1 - P if `missing`."""
    nothing = ONE if missing else ZERO
    for i in range(i32(count)):
        x = scratch[EXPONENT + i]
        e = _exp(-abs(x))
        large = ONE / (ONE + e)
        value = large if (x >= ZERO) != missing else e * large
        scratch[COVER + i] = nothing if x < -BLUR else value


@jit.inline
def band_of(height):
    """Rows a task draws: by the picture alone, as the blocks, and so the last bits, follow it."""
    return 16 if height <= 512 else 32


@jit.parallel
def cover(points, polygons, boxes, inverse, workers, clear):
    views, height, width = clear.shape
    count = len(polygons) // max(views, 1)
    band = band_of(height)
    bands = (height + band - 1) // band
    for worker in numba.prange(workers):
        scratch, corners, edges = np.empty(4 * FLAT, f32), np.empty(8), np.empty((4, 8), f32)
        for task in range(worker, views * bands, workers):
            view, top = task // bands, task % bands * band
            bottom = min(top + band, height)
            for q in range(view * count, (view + 1) * count):
                y0, y1 = max(boxes[q, 2], top), min(boxes[q, 3], bottom)
                if y0 >= y1:
                    continue
                number, orient = load(points, polygons[q], corners)
                x = boxes[q, 0]
                while x < boxes[q, 1]:
                    columns = min(1 << WIDEST, boxes[q, 1] - x)
                    shift = field(
                        corners, number, orient, x, y0, columns, y1 - y0, inverse, edges, scratch
                    )
                    if shift >= 0:
                        probabilities((y1 - y0) << shift, True, scratch)
                        _multiply(clear[view], x, y0, columns, y1 - y0, shift, scratch)
                    x += columns


@jit.serial
def _multiply(picture, x, y, columns, rows, shift, scratch):
    """A block of `scratch` into a picture."""
    narrow = shift == 3 and x + 8 <= picture.shape[1]
    for row in range(rows):
        at = COVER + (row << shift)
        line = picture[y + row]
        if narrow:  # a loop of known length is one instruction; columns past the box hold 1
            for column in range(8):
                line[x + column] *= scratch[at + column]
        else:
            for column in range(columns):
                line[x + column] *= scratch[at + column]


@jit.inline
def full(holes, view, box):
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
def measure(points, polygons, boxes, inverse, outer, holes, workers, sums, peak, extent):
    views, height, width = outer.shape
    count = len(polygons) // max(views, 1)
    blocks = (len(polygons) + BLOCK - 1) // BLOCK
    for worker in numba.prange(workers):
        scratch, corners, edges = np.empty(4 * FLAT, f32), np.empty(8), np.empty((4, 8), f32)
        for block in range(worker, blocks, workers):
            for q in range(block * BLOCK, min((block + 1) * BLOCK, len(polygons))):
                sums[q, 0], sums[q, 1], peak[q] = ZERO, ZERO, ZERO
                extent[q, 0], extent[q, 1] = ZERO, ZERO
                if polygons[q, 0] < 0:
                    continue
                number, orient = load(points, polygons[q], corners)
                extent[q, 0], extent[q, 1] = _areas(corners, number, width, height)
                box = boxes[q]
                if box[0] == box[1]:
                    continue
                view = q // count
                if full(holes, view, box):
                    sums[q, 0] = extent[q, 0]
                    continue
                _add(
                    corners, number, orient, box, inverse, outer[view], edges, scratch, sums[q],
                    peak, q,
                )  # fmt: skip


@jit.serial
def _add(corners, number, orient, box, inverse, outer, edges, scratch, sums, peak, q):
    area, outside, highest = 0.0, 0.0, ZERO
    x = box[0]
    while x < box[1]:
        columns = min(1 << WIDEST, box[1] - x)
        step = FLAT >> shift_of(columns)
        y = box[2]
        while y < box[3]:
            rows = min(step, box[3] - y)
            shift = field(corners, number, orient, x, y, columns, rows, inverse, edges, scratch)
            if shift >= 0:
                probabilities(rows << shift, False, scratch)
                laid_out(outer, x, y, columns, rows, shift, scratch)
                one, two, most = ZERO, ZERO, ZERO
                for i in range(rows << shift):
                    cover = scratch[COVER + i]
                    out = cover * scratch[OPEN + i]
                    one += cover
                    two += out
                    most = max(most, out)
                area, outside, highest = area + one, outside + two, max(highest, most)
            y += rows
        x += columns
    sums[0], sums[1], peak[q] = f32(area), f32(outside), highest


@jit.serial
def laid_out(picture, x, y, columns, rows, shift, scratch):
    """What a picture holds in a block, laid out like it; past the columns anything finite."""
    narrow = shift == 3 and x + 8 <= picture.shape[1]
    for row in range(rows):
        at = OPEN + (row << shift)
        line = picture[y + row]
        if narrow:
            for column in range(8):
                scratch[at + column] = line[x + column]
        else:
            for column in range(columns):
                scratch[at + column] = line[x + column]
            for column in range(columns, 1 << shift):
                scratch[at + column] = ZERO


@jit.serial
def _areas(corners, number, width, height):
    """Area within the frame and in all, px^2. See the reference for the first."""
    within, total, out = 0.0, 0.0, False
    for k in range(number):
        after = 0 if k == number - 1 else k + 1
        ax, ay, bx, by = (
            corners[2 * k],
            corners[2 * k + 1],
            corners[2 * after],
            corners[2 * after + 1],
        )
        total += (ax - corners[0]) * (by - corners[1]) - (ay - corners[1]) * (bx - corners[0])
        out |= min(ax, ay) < 0 or ax > width or ay > height
    if not out:
        return f32(0.5 * abs(total)), f32(0.5 * abs(total))
    for k in range(number):
        after = 0 if k == number - 1 else k + 1
        ax, ay, bx, by = (
            corners[2 * k],
            corners[2 * k + 1],
            corners[2 * after],
            corners[2 * after + 1],
        )
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
