"""The polygon in front at each pixel, and where in it a pixel lies, in Triton; float64 throughout.

Neighbours compute their edge from the same end, and without fused operations, which a compiler may
place differently: no pixel falls between. Depths are compared as whole numbers of 64 bits, the
polygon's number below: the same bits at every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gencompress_kernels.rasterize_triangles.triton_soft import (
    box_of,
    corner_of,
    has_four,
    is_there,
    sign_of,
)


@triton.jit
def _line(i, ax, ay, j, bx, by, orient):
    """Edge function c + a x + b y, not negative inside, from the corner of the lower number."""
    turned = j < i
    x, y = tl.where(turned, bx, ax), tl.where(turned, by, ay)
    ex, ey = tl.where(turned, ax, bx) - x, tl.where(turned, ay, by) - y
    sign = tl.where(turned, -orient, orient)
    return sign * (ey * x - ex * y), -sign * ey, sign * ex


@triton.jit
def _twice(ax, ay, bx, by, cx, cy):
    """Twice the area of three points."""
    return (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)


@triton.jit
def _share(depth, area, ax, ay, bx, by):
    """What a corner adds to 1 / depth = c + a x + b y; nothing on the edge across from it."""
    ex, ey = bx - ax, by - ay
    share = 1 / (depth * area)
    return share * (ey * ax - ex * ay), -share * ey, share * ex


@triton.jit
def _plane(ax, ay, az, bx, by, bz, cx, cy, cz, dx, dy, dz):
    """1 / depth = c + a x + b y, from the larger half of the polygon."""
    other, area = _twice(ax, ay, cx, cy, dx, dy), _twice(ax, ay, bx, by, cx, cy)
    larger = tl.abs(other) > tl.abs(area)
    area = tl.where(larger, other, area)
    area = tl.where(area == 0, 1.0, area)
    x, y, z = tl.where(larger, dx, cx), tl.where(larger, dy, cy), tl.where(larger, dz, cz)
    bx, by, bz = tl.where(larger, cx, bx), tl.where(larger, cy, by), tl.where(larger, cz, bz)
    a, b, c = (
        _share(az, area, bx, by, x, y),
        _share(bz, area, x, y, ax, ay),
        _share(z, area, ax, ay, bx, by),
    )
    return a[0] + b[0] + c[0], a[1] + b[1] + c[1], a[2] + b[2] + c[2]


@triton.jit
def find_front(points, depths, polygons, nearest, each, width, height, BLOCK: tl.constexpr):
    """The nearest polygon at each pixel centre, as its depth's bits above its number."""
    q = tl.program_id(0).to(tl.int64)
    i, ax, ay = corner_of(points, polygons, q, 0)
    j, bx, by = corner_of(points, polygons, q, 1)
    k, cx, cy = corner_of(points, polygons, q, 2)
    n, dx, dy = corner_of(points, polygons, q, 3)
    corners = ax, ay, bx, by, cx, cy, dx, dy
    ax, ay, bx, by = ax.to(tl.float64), ay.to(tl.float64), bx.to(tl.float64), by.to(tl.float64)
    cx, cy, dx, dy = cx.to(tl.float64), cy.to(tl.float64), dx.to(tl.float64), dy.to(tl.float64)
    orient = sign_of((cx - ax) * (dy - by) - (cy - ay) * (dx - bx))
    there = is_there(polygons, q) & (orient != 0)
    x0, x1, y0, y1 = box_of(corners, there, width, height, 0.0)
    one = _line(i, ax, ay, j, bx, by, orient)
    two = _line(j, bx, by, k, cx, cy, orient)
    three = _line(k, cx, cy, n, dx, dy, orient)
    last = _line(n, dx, dy, i, ax, ay, orient)
    az, bz = tl.load(depths + i).to(tl.float64), tl.load(depths + j).to(tl.float64)
    cz, dz = tl.load(depths + k).to(tl.float64), tl.load(depths + n).to(tl.float64)
    least = tl.minimum(tl.minimum(az, bz), tl.minimum(cz, dz))
    most = tl.maximum(tl.maximum(az, bz), tl.maximum(cz, dz))
    plane = _plane(ax, ay, az, bx, by, bz, cx, cy, cz, dx, dy, dz)
    four = has_four(polygons, q)
    picture, number = nearest + q // each * width * height, q % each
    columns = x1 - x0
    pixels = columns * (y1 - y0)
    for first in range(0, pixels, BLOCK):
        at = first + tl.arange(0, BLOCK)
        row, column = y0 + at // columns, x0 + at % columns
        x, y = column.to(tl.float64) + 0.5, row.to(tl.float64) + 0.5
        inside = tl.minimum(one[0] + one[1] * x + one[2] * y, two[0] + two[1] * x + two[2] * y)
        inside = tl.minimum(inside, last[0] + last[1] * x + last[2] * y)
        if four:
            inside = tl.minimum(inside, three[0] + three[1] * x + three[2] * y)
        # rounding must not leave the corners of a sliver
        depth = 1 / (plane[0] + plane[1] * x + plane[2] * y)
        depth = tl.minimum(tl.maximum(depth, least), most).to(tl.float32)
        key = depth.to(tl.int32, bitcast=True).to(tl.int64) << 32 | number
        place = picture + row.to(tl.int64) * width + column
        tl.atomic_min(place, key, (at < pixels) & (inside >= 0), sem="relaxed")


@triton.jit
def _vertex(seen, faces, view, face, k: tl.constexpr, vertices, some):
    v = tl.load(faces + 3 * face + k, mask=some, other=0)
    place = seen + 3 * (view * vertices + v)
    x = tl.load(place, mask=some, other=1.0).to(tl.float64)
    y = tl.load(place + 1, mask=some, other=1.0).to(tl.float64)
    return x, y, tl.load(place + 2, mask=some, other=1.0).to(tl.float64)


@triton.jit
def _ray(inverse, view, row: tl.constexpr, x, y, some):
    m = inverse + 9 * view + 3 * row
    a, b = tl.load(m, mask=some, other=0.0), tl.load(m + 1, mask=some, other=0.0)
    return a * x + b * y + tl.load(m + 2, mask=some, other=0.0)


@triton.jit
def _triple(x, y, z, a, b):
    """ray . a x b"""
    total = x * (a[1] * b[2] - a[2] * b[1]) + y * (a[2] * b[0] - a[0] * b[2])
    return total + z * (a[0] * b[1] - a[1] * b[0])


@triton.jit
def weigh_corners(
    winner, seen, faces, inverse, depths, weights, count, vertices, width, height,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Depth and weights of the three vertices at each pixel; infinity and 0 where there is none."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    face = tl.load(winner + i, mask=i < count, other=-1).to(tl.int64)
    some = face >= 0
    view, place = i // width // height, i // width % height
    x, y = (i % width).to(tl.float64) + 0.5, place.to(tl.float64) + 0.5
    rx, ry = _ray(inverse, view, 0, x, y, some), _ray(inverse, view, 1, x, y, some)
    rz = _ray(inverse, view, 2, x, y, some)
    a = _vertex(seen, faces, view, face, 0, vertices, some)
    b = _vertex(seen, faces, view, face, 1, vertices, some)
    c = _vertex(seen, faces, view, face, 2, vertices, some)
    wa, wb, wc = (
        _triple(rx, ry, rz, b, c),
        _triple(rx, ry, rz, c, a),
        _triple(rx, ry, rz, a, b),
    )
    sign = tl.where(wa + wb + wc > 0, 1.0, -1.0)
    # on an edge rounding may leave a weight a little below 0
    wa, wb = tl.maximum(sign * wa, 0.0), tl.maximum(sign * wb, 0.0)
    wc = tl.maximum(sign * wc, 0.0)
    total = wa + wb + wc
    total = tl.where(total > 0, total, 1.0)
    wa, wb, wc = wa / total, wb / total, wc / total
    depth = wa * a[2] + wb * b[2] + wc * c[2]
    tl.store(depths + i, tl.where(some, depth, float("inf")).to(tl.float32), mask=i < count)
    tl.store(weights + 3 * i, tl.where(some, wa, 0.0), mask=i < count)
    tl.store(weights + 3 * i + 1, tl.where(some, wb, 0.0), mask=i < count)
    tl.store(weights + 3 * i + 2, tl.where(some, wc, 0.0), mask=i < count)
