"""How far pixels lie from the edges of a polygon, in Triton: the arithmetic of `soft.cuh`.

A program takes a polygon. What describes it is scalars, which every lane holds alike; an edge is a
tuple: x, y, direction, start and end along it, share of the edge before the start, 1 / length, and
the signed distance from the tile's middle to its line.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gencompress_kernels.rasterize_triangles import reference
from gencompress_kernels.rasterize_triangles.walk import TILE_COLUMNS, TILE_ROWS

BLUR, STEEP = tl.constexpr(reference.BLUR), tl.constexpr(reference.STEEP)
COLUMNS, ROWS = tl.constexpr(TILE_COLUMNS), tl.constexpr(TILE_ROWS)


@triton.jit
def corner_of(points, polygons, q, k: tl.constexpr):
    """Row of a corner, and its place; any row's of a polygon that is not there."""
    i = tl.maximum(tl.load(polygons + 4 * q + k), 0).to(tl.int64)
    return i, tl.load(points + 2 * i), tl.load(points + 2 * i + 1)


@triton.jit
def corners_of(points, polygons, q):
    """x0 y0 x1 y1 ...; of a triangle the third stands twice."""
    _, ax, ay = corner_of(points, polygons, q, 0)
    _, bx, by = corner_of(points, polygons, q, 1)
    _, cx, cy = corner_of(points, polygons, q, 2)
    _, dx, dy = corner_of(points, polygons, q, 3)
    return ax, ay, bx, by, cx, cy, dx, dy


@triton.jit
def is_there(polygons, q):
    return tl.load(polygons + 4 * q) >= 0


@triton.jit
def has_four(polygons, q):
    return tl.load(polygons + 4 * q + 2) != tl.load(polygons + 4 * q + 3)


@triton.jit
def area_of(c):
    """Twice the area of corners, float64, with the sign of the winding."""
    one = (c[4].to(tl.float64) - c[0]) * (c[7].to(tl.float64) - c[3])
    return one - (c[5].to(tl.float64) - c[1]) * (c[6].to(tl.float64) - c[2])


@triton.jit
def sign_of(value):
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))


@triton.jit
def _span(a, b, c, d, reach, most):
    """First and past the last k with low - reach <= k + 0.5 <= high + reach."""
    low = tl.minimum(tl.minimum(a, b), tl.minimum(c, d))
    high = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    first, last = tl.ceil(low - reach - 0.5), tl.floor(high + reach + 0.5)
    first = tl.minimum(tl.maximum(first, 0.0), most).to(tl.int32)
    return first, tl.minimum(tl.maximum(last, 0.0), most).to(tl.int32)


@triton.jit
def box_of(c, there, width, height, reach):
    """Pixels of the box around the blur: x0, x1, y0, y1; no columns where there are none."""
    x0, x1 = _span(c[0], c[2], c[4], c[6], reach, width)
    y0, y1 = _span(c[1], c[3], c[5], c[7], reach, height)
    return x0, tl.where(there & (x0 < x1) & (y0 < y1), x1, x0), y0, y1


@triton.jit
def _edge(ax, ay, bx, by, orient, left, top, middle_x, middle_y):
    """As seen from the first pixel centre of a tile. It starts where it passes the middle of the
    tile, so that a corner far outside of the picture costs no precision."""
    ux, uy = bx.to(tl.float64) - ax, by.to(tl.float64) - ay
    square = ux * ux + uy * uy
    inverse = tl.rsqrt(tl.maximum(square, 1e-30))
    ux, uy, length = ux * inverse, uy * inverse, square * inverse
    x, y = ax.to(tl.float64) - left - 0.5, ay.to(tl.float64) - top - 0.5
    start = (middle_x - x) * ux + (middle_y - y) * uy
    start = tl.minimum(tl.maximum(start, 0.0), length)
    x += start * ux
    y += start * uy
    distance = orient * (ux * (middle_y - y) - uy * (middle_x - x))
    return (
        x.to(tl.float32),
        y.to(tl.float32),
        ux.to(tl.float32),
        uy.to(tl.float32),
        (-start).to(tl.float32),
        (length - start).to(tl.float32),
        (start * inverse).to(tl.float32),
        inverse.to(tl.float32),
        distance.to(tl.float32),
    )


@triton.jit
def tile_of(c, orient, left, top, x1, y1, reach):
    """Edges for a tile of a box, its columns, and its pixels: 0 where all lie beyond the blur."""
    columns, rows = tl.minimum(x1 - left, COLUMNS), tl.minimum(y1 - top, ROWS)
    x, y = 0.5 * (columns - 1), 0.5 * (rows - 1)
    one = _edge(c[0], c[1], c[2], c[3], orient, left, top, x, y)
    two = _edge(c[2], c[3], c[4], c[5], orient, left, top, x, y)
    three = _edge(c[4], c[5], c[6], c[7], orient, left, top, x, y)
    four = _edge(c[6], c[7], c[0], c[1], orient, left, top, x, y)
    # of what has no area, and of a triangle's third edge, 0
    least = tl.minimum(tl.minimum(one[8], two[8]), tl.minimum(three[8], four[8]))
    around = 0.5 * tl.sqrt((columns * columns + rows * rows).to(tl.float32))
    pixels = tl.where(least < -around - reach, 0, columns * rows)
    return (one, two, three, four), columns, pixels


@triton.jit
def _step(e, k: tl.constexpr, px, py, orient, best, margin, own, wx, wy, t):
    dx, dy = px - e[0], py - e[1]
    along = tl.minimum(tl.maximum(dx * e[2] + dy * e[3], e[4]), e[5])
    qx, qy = dx - along * e[2], dy - along * e[3]
    square = qx * qx + qy * qy
    closer = square < best
    return (
        tl.where(closer, square, best),
        tl.minimum(margin, orient * (e[2] * dy - e[3] * dx)),
        tl.where(closer, k, own),
        tl.where(closer, qx, wx),
        tl.where(closer, qy, wy),
        tl.where(closer, e[6] + along * e[7], t),
    )


@triton.jit
def field(edges, four, orient, px, py, inverse):
    """x of pixels counted from the tile's first; the nearest edge, the way to the pixel from the
    nearest point of it, and how far along the edge that point lies."""
    wx, own = tl.zeros(px.shape, tl.float32), tl.zeros(px.shape, tl.int32)
    best, wy, t = wx + 3e38, wx, wx
    margin = wx + tl.where(orient != 0, 3e38, -1.0)  # what has no area has no inside
    best, margin, own, wx, wy, t = _step(edges[0], 0, px, py, orient, best, margin, own, wx, wy, t)
    best, margin, own, wx, wy, t = _step(edges[1], 1, px, py, orient, best, margin, own, wx, wy, t)
    if four:
        best, margin, own, wx, wy, t = _step(
            edges[2], 2, px, py, orient, best, margin, own, wx, wy, t
        )
    best, margin, own, wx, wy, t = _step(edges[3], 3, px, py, orient, best, margin, own, wx, wy, t)
    value = tl.minimum(best * inverse, STEEP)
    return tl.where(margin >= 0, value, -value), own, wx, wy, t


@triton.jit
def covered(x):
    """P"""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < -BLUR, 0.0, tl.where(x >= 0, 1.0, e) / (1 + e))


@triton.jit
def lost(x):
    """-log(1 - P)"""
    e = tl.exp(-tl.abs(x))
    # log(1 + e), times what rounding 1 + e did to e
    u = 1 + e
    same = u == 1
    log = tl.where(same, e, tl.log(u) * (e / tl.where(same, 1.0, u - 1)))
    return tl.maximum(x, 0.0) + log


@triton.jit
def is_full(holes, view, x0, x1, y0, y1, width, height):
    """Whether a box shows ones of the mask and nothing else; holes are counted above and left."""
    line = width + 1
    upper = holes + (view * (height + 1) + y0) * line
    lower = holes + (view * (height + 1) + y1) * line
    below = tl.load(lower + x1) - tl.load(lower + x0)
    return (x0 < x1) & (below == tl.load(upper + x1) - tl.load(upper + x0))
