"""Soft and hard triangles in readable torch: the definition of correct.

A polygon j (the part of a face before the near plane) covers the centre of a pixel with probability

    P = sigmoid(x),   x = +-d^2 / sigma^2,

d the distance in px to the nearest point of its edges, plus inside and minus outside (SoftRas, Liu
et al. 2019). Outside, beyond x = -ln(1e4 - 1), P is 0. A polygon without area has no inside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLUR = math.log(1e4 - 1)  # 9.21: P falls below 1e-4, where SoftRas stops too
STEEP = 80.0  # of the kernels, where x is held: exp(-80) is still a normal number
CHUNK = 4_000_000  # pixels of polygons held at once


def silhouettes(points: Tensor, polygons: Tensor, sigma: float, clear: Tensor) -> None:
    """Fills clear [C, H, W] with the product of 1 - P over the polygons [C * F, 4] of each view."""
    clear.fill_(1)
    for view, some in _chunks(polygons, clear):
        x = _field(points, some, sigma, clear.shape[1:])[0]
        clear[view] *= torch.sigmoid(-x).prod(0)


def silhouettes_backward(
    slopes: Tensor, clear: Tensor, points: Tensor, polygons: Tensor, sigma: float, out: Tensor
) -> None:
    """Fills out [C * F, 4, 2] with the gradient of -sum(slopes * clear) by the corners.

    Of the product of all 1 - P, the derivative by one x is -P times that very product, so nothing
    is ever divided by 1 - P.
    """
    done = 0
    for view, some in _chunks(polygons, clear):
        x, side, edge, q, t = _field(points, some, sigma, clear.shape[1:])
        by_x = slopes[view] * clear[view] * torch.sigmoid(x)
        out[done : done + len(some)] = _corners(by_x * side, edge, q, t, sigma)
        done += len(some)


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
    """Fills sums [C * F, 2] with the sums of P and of P (1 - m) over the pixels of masks [C, H, W],
    peak [C * F] with the largest P (1 - m), extent [C * F, 2] with the areas of the polygon within
    the frame and in all, px^2. With `cull` a polygon with nothing but ones of the mask in the box
    around its blur gets its area within the frame in place of the sum of P."""
    height, width = masks.shape[1:]
    extent.copy_(_extents(points, polygons, width, height))
    done = 0
    for view, some in _chunks(polygons, masks):
        here = slice(done, done + len(some))
        done += len(some)
        cover = torch.sigmoid(_field(points, some, sigma, masks.shape[1:])[0])
        outside = cover * (1 - masks[view])
        sums[here, 0], sums[here, 1] = cover.sum((1, 2)), outside.sum((1, 2))
        peak[here] = outside.amax((1, 2))
        if cull:
            within = _within(points, some, masks[view], sigma)
            sums[here, 0] = torch.where(within, extent[here, 0], sums[here, 0])


def coverage_backward(
    slopes: Tensor,
    points: Tensor,
    polygons: Tensor,
    masks: Tensor,
    sigma: float,
    cull: bool,
    out: Tensor,
) -> None:
    """Fills out [C * F, 4, 2] with the gradient of sum(slopes * sums) by the corners; 0 for what
    `cull` takes out."""
    done = 0
    for view, some in _chunks(polygons, masks):
        here = slice(done, done + len(some))
        done += len(some)
        x, side, edge, q, t = _field(points, some, sigma, masks.shape[1:])
        cover = torch.sigmoid(x)
        slope = slopes[here, 0, None, None] + slopes[here, 1, None, None] * (1 - masks[view])
        out[here] = _corners(slope * cover * (1 - cover) * side, edge, q, t, sigma)
        if cull:
            out[here][_within(points, some, masks[view], sigma)] = 0


def visible(points: Tensor, depths: Tensor, polygons: Tensor, winner: Tensor) -> None:
    """Fills winner [C, H, W], int32, with the polygon of the smallest depth at each pixel centre,
    the lower of equal ones (-1: none)."""
    winner.fill_(-1)
    height, width = winner.shape[1:]
    nearest = points.new_full(winner.shape, math.inf)
    for view, some, first in _chunks(polygons, winner, True):
        there = some[:, 0] >= 0
        index = some.clamp(min=0).long()
        corners = points[index].double()
        area = _area(corners)
        y, x = _centres(corners, height, width)
        inside = torch.ones(len(some), height, width, dtype=torch.bool, device=points.device)
        for a, b in _edges(corners):
            ex, ey = (b - a).unbind(-1)
            cross = ex[:, None, None] * (y - _at(a, 1)) - ey[:, None, None] * (x - _at(a, 0))
            inside &= cross * area.sign()[:, None, None] >= 0
        inside &= (there & (area != 0))[:, None, None]
        depth = _depths(corners, depths[index].double(), x, y)
        depth = torch.where(inside, depth.to(nearest.dtype), math.inf)
        best, index = depth.min(0)
        closer = best < nearest[view]
        nearest[view] = torch.where(closer, best, nearest[view])
        winner[view] = torch.where(closer, (index + first).to(torch.int32), winner[view])


def weigh(
    winner: Tensor, seen: Tensor, faces: Tensor, inverse: Tensor, depths: Tensor, weights: Tensor
) -> None:
    """Fills depths [C, H, W] (infinity: none) and weights [C, H, W, 3] (0: none) of the faces that
    won. seen [C, V, 3] in camera axes, inverse [C, 3, 3] of the intrinsics.

    The ray of a pixel is a sum of the corners a, b, c of its face, with the weights (ray . b x c,
    ray . c x a, ray . a x b) up to a factor.
    """
    view, row, column = (winner >= 0).nonzero(as_tuple=True)
    corner = faces[winner[view, row, column].long()]
    a, b, c = (seen[view, corner[:, k]].double() for k in range(3))
    pixel = torch.stack([column + 0.5, row + 0.5, torch.ones_like(row)], 1).double()
    ray = (inverse[view].double() @ pixel[..., None])[..., 0]
    raw = [(ray * torch.linalg.cross(*pair)).sum(1) for pair in ((b, c), (c, a), (a, b))]
    weight = torch.stack(raw, 1)
    # on an edge rounding may leave a weight a little below 0
    weight = (weight * weight.sum(1, keepdim=True).sign()).clamp(min=0)
    weight = weight / weight.sum(1, keepdim=True).clamp(min=1e-300)
    depths.fill_(math.inf)
    weights.fill_(0)
    weights[view, row, column] = weight.to(weights.dtype)
    depth = (weight * torch.stack([a[:, 2], b[:, 2], c[:, 2]], 1)).sum(1)
    depths[view, row, column] = depth.to(depths.dtype)


def _chunks(polygons: Tensor, pictures: Tensor, number: bool = False):
    """(view, some of its polygons), in order; with the place of the first in the view."""
    views, height, width = pictures.shape
    count = len(polygons) // max(views, 1)
    step = max(1, CHUNK // (height * width))
    for view in range(views):
        for first in range(0, count, step):
            some = polygons[view * count + first : view * count + min(first + step, count)]
            yield (view, some, first) if number else (view, some)


def _centres(like: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    y = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    x = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    return y[None, :, None], x[None, None, :]


def _edges(corners: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(corners[:, k], corners[:, (k + 1) % 4]) for k in range(4)]


def _at(point: Tensor, axis: int) -> Tensor:
    return point[:, axis, None, None]


def _area(corners: Tensor) -> Tensor:
    """[Q] with the sign of the winding; positive is clockwise as seen, y pointing down."""
    one, other = corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1]
    return 0.5 * (one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0])


def _field(
    points: Tensor, polygons: Tensor, sigma: float, size: torch.Size
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [Q, H, W] (-infinity where P is 0); the sign of x; the nearest edge; the way to the pixel
    from the nearest point of it [Q, H, W, 2]; and how far along the edge that point lies."""
    corners = points[polygons.clamp(min=0).long()]
    y, x = _centres(points, *size)
    orient = _area(corners).sign()[:, None, None]
    inside = (orient != 0).expand(-1, *size)
    best = torch.full(inside.shape, math.inf, dtype=points.dtype, device=points.device)
    edge = torch.zeros(inside.shape, dtype=torch.long, device=points.device)
    ways, places = torch.zeros_like(best)[..., None].repeat(1, 1, 1, 2), torch.zeros_like(best)
    for k, (a, b) in enumerate(_edges(corners)):
        ex, ey = _at(b - a, 0), _at(b - a, 1)
        length = ex * ex + ey * ey
        dx, dy = x - _at(a, 0), y - _at(a, 1)
        t = ((dx * ex + dy * ey) / length.clamp(min=1e-30)).clamp(0, 1)
        qx, qy = dx - t * ex, dy - t * ey
        d = qx * qx + qy * qy
        inside = inside & (orient * (ex * dy - ey * dx) >= 0)
        closer = d < best
        best = torch.where(closer, d, best)
        edge[closer] = k
        places = torch.where(closer, t, places)
        ways = torch.where(closer[..., None], torch.stack([qx, qy], -1), ways)
    side = torch.where(inside, 1.0, -1.0).to(points.dtype)
    value = side * best / sigma**2
    gone = (value < -BLUR) | (polygons[:, 0] < 0)[:, None, None]
    return value.masked_fill(gone, -math.inf), side, edge, ways, places


def _corners(slopes: Tensor, edge: Tensor, q: Tensor, t: Tensor, sigma: float) -> Tensor:
    """[Q, 4, 2]: d(d^2)/da = -2 (1 - t) q and d(d^2)/db = -2 t q for the nearest edge a b, as t
    either minimises d or does not move."""
    out = q.new_zeros(len(q), 4, 2)
    pull = (-2 / sigma**2) * slopes[..., None] * q
    for k in range(4):
        own = torch.where((edge == k)[..., None], pull, 0.0)
        out[:, k] += (own * (1 - t[..., None])).sum((1, 2))
        out[:, (k + 1) % 4] += (own * t[..., None]).sum((1, 2))
    return out


def _within(points: Tensor, polygons: Tensor, mask: Tensor, sigma: float) -> Tensor:
    """[Q] whether the pixels of the box around the blur are all ones of the mask."""
    corners = points[polygons.clamp(min=0).long()]
    reach = math.sqrt(BLUR) * sigma
    low, high = corners.amin(1) - reach, corners.amax(1) + reach
    y, x = _centres(points, *mask.shape)
    box = (x >= _at(low, 0)) & (x <= _at(high, 0)) & (y >= _at(low, 1)) & (y <= _at(high, 1))
    return ~(box & (mask < 1)).flatten(1).any(1)


def _extents(points: Tensor, polygons: Tensor, width: int, height: int) -> Tensor:
    """[Q, 2] areas within the frame and in all.

    By Green's theorem the area within is the integral along the edges of clamp(y, 0, H) dx over
    x in [0, W]; along a straight edge clamp(y) integrates to a difference of its primitive.
    """
    corners = points[polygons.clamp(min=0).long()].double()
    total = corners.new_zeros(len(corners))
    for a, b in _edges(corners):
        x0, x1 = a[:, 0].clamp(0, width), b[:, 0].clamp(0, width)
        rise = (b[:, 1] - a[:, 1]) / torch.where(b[:, 0] == a[:, 0], 1.0, b[:, 0] - a[:, 0])
        y0, y1 = a[:, 1] + rise * (x0 - a[:, 0]), a[:, 1] + rise * (x1 - a[:, 0])
        flat = (y1 - y0).abs() < 1e-6
        middle = (0.5 * (y0 + y1)).clamp(0, height) * (x1 - x0)
        sloped = (_primitive(y1, height) - _primitive(y0, height)) / torch.where(flat, 1.0, rise)
        total += torch.where(flat, middle, sloped)
    result = torch.stack([total.abs(), _area(corners).abs()], 1)
    return result.masked_fill((polygons[:, :1] < 0), 0).to(points.dtype)


def _primitive(y: Tensor, height: int) -> Tensor:
    inner = y.clamp(0, height)
    return 0.5 * inner**2 + height * (y - inner).clamp(min=0)


def _depths(corners: Tensor, depths: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[Q, H, W]: 1 / depth is linear in the picture; the larger half of a polygon says how."""
    first, second = corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]
    one, two = depths[:, [0, 1, 2]], depths[:, [0, 2, 3]]
    larger = _cross(second).abs() > _cross(first).abs()
    c = torch.where(larger[:, None, None], second, first)
    inverse = 1 / torch.where(larger[:, None], two, one)
    area = _cross(c)[:, None, None]
    area = torch.where(area == 0, 1.0, area)
    total = torch.zeros_like(x + y + area)
    for k in range(3):
        a, b = c[:, (k + 1) % 3], c[:, (k + 2) % 3]
        ex, ey = _at(b - a, 0), _at(b - a, 1)
        total += inverse[:, k, None, None] * (ex * (y - _at(a, 1)) - ey * (x - _at(a, 0))) / area
    # rounding must not leave the corners of a sliver
    low, high = depths.amin(1)[:, None, None], depths.amax(1)[:, None, None]
    return torch.minimum(torch.maximum(1 / total, low), high)


def _cross(c: Tensor) -> Tensor:
    one, other = c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]
    return one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]
