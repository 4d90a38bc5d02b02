"""A chair and a mug from formulas: their surfaces, and the surfaces wrapped around them.

The chair is a union of boxes; its back has four gaps. The mug is the set where a distance falls
below zero: a bent wall, and a handle that is half a torus. The surfaces are exact, of genus 4 and
genus 1. Wrapped means what shapes without holes come to: closed and of genus 0, with a panel over
the gaps of the back, a block between the legs, a web in the handle. They are drawn on a tilted
grid, so that their faces do not end where the holes begin.

World axes are those of glTF: y points up, x right, z to the front. The chair is in metres.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Surface = tuple[Array, NDArray[np.int64]]  # vertices [V, 3]; faces [F, 3], counter-clockwise
Distance = Callable[[Array], Array]  # [N, 3] -> [N]: negative inside, never more than the distance

TILT = np.array([[1.0, -0.21, -0.11], [0.21, 1.0, -0.2], [0.11, 0.2, 1.0]])  # made orthogonal


# ---- shapes


# x from, to; y from, to; z from, to: metres
LEGS = [(x, x + 0.04, 0.0, 0.43, z, z + 0.04) for x in (-0.22, 0.18) for z in (-0.21, 0.17)]
SEAT = (-0.22, 0.22, 0.43, 0.47, -0.21, 0.21)
POSTS = [(x, x + 0.04, 0.47, 0.95, -0.21, -0.17) for x in (-0.22, 0.18)]
RAIL = (-0.18, 0.18, 0.87, 0.95, -0.21, -0.17)
SLATS = [(x - 0.02, x + 0.02, 0.47, 0.87, -0.21, -0.17) for x in (-0.1, 0.0, 0.1)]
CHAIR = np.array([*LEGS, SEAT, *POSTS, RAIL, *SLATS])
WRAPPED_CHAIR = np.array(
    [(-0.22, 0.22, 0.0, 0.47, -0.21, 0.21), (-0.22, 0.22, 0.47, 0.95, -0.21, -0.17)]
)

WALL = 0.045  # half its thickness; the mug is 1 high
BEND = np.array([(0.0, 0.045), (0.375, 0.045), (0.375, 0.955)])  # (radius, y) of the wall's middle
HANDLE = (0.42, 0.52, 0.25, 0.06)  # x and y of the centre, radius of the ring, of the tube
FILLET = 0.03  # how far from the meeting of wall and handle they are rounded into one
WEB = 0.045  # half the thickness of what fills the handle

# x from, to; y from, to; z from, to: what holds all of it
CHAIR_BOUNDS = np.stack([CHAIR[:, ::2].min(0), CHAIR[:, 1::2].max(0)], 1).ravel()
MUG_BOUNDS = np.array([-0.43, 0.74, -0.01, 1.01, -0.43, 0.43])


def boxes_distance(points: Array, boxes: Array) -> Array:
    """To a union of boxes [B, 6]: exact outside, nothing above it inside."""
    best = np.full(len(points), np.inf)
    for box in boxes:
        q = np.abs(points - (box[::2] + box[1::2]) / 2) - (box[1::2] - box[::2]) / 2
        out = np.sqrt(np.square(q.clip(min=0)).sum(1)) + q.max(1).clip(max=0)
        best = np.minimum(best, out)
    return best


def segment_distance(points: Array, start: Array, end: Array) -> Array:
    """Points [N, 2] to a segment."""
    along = end - start
    share = ((points - start) @ along / (along @ along)).clip(0, 1)
    return np.linalg.norm(points - start - share[:, None] * along, axis=1)


def rounded_union(a: Array, b: Array, width: float) -> Array:
    """The smaller of two distances, blended by a parabola where they differ by less than width."""
    share = (width - np.abs(a - b)).clip(min=0) / width
    return np.minimum(a, b) - share * share * width / 4


def mug_distance(points: Array, web: bool = False) -> Array:
    """To the mug; with `web`, to the mug with its handle filled."""
    x, y, z = points.T
    flat = np.stack([np.hypot(x, z), y], 1)
    wall = np.minimum(*(segment_distance(flat, BEND[i], BEND[i + 1]) for i in (0, 1))) - WALL
    cx, cy, ring, tube = HANDLE
    dx, dy = x - cx, y - cy
    around = np.hypot(np.hypot(dx, dy) - ring, z)
    ends = np.sqrt(dx**2 + (np.abs(dy) - ring) ** 2 + z**2)
    mug = rounded_union(wall, np.where(dx > 0, around, ends) - tube, FILLET)
    if web:
        filled = np.maximum(np.hypot(dx, dy) - ring, -dx)
        mug = rounded_union(mug, np.maximum(filled, np.abs(z) - WEB), FILLET)
    return mug


def gradients(distance: Distance, points: Array, step: float = 1e-5) -> Array:
    """Unit [N, 3], by central differences."""
    found = np.stack([distance(points + e) - distance(points - e) for e in step * np.eye(3)], 1)
    return found / np.linalg.norm(found, axis=1, keepdims=True).clip(min=1e-12)


# ---- surfaces


def boxes_surface(boxes: Array) -> Surface:
    """The exact surface of a union of boxes: all their planes cut space into cells, and between a
    filled cell and an empty one lies a rectangle, two faces."""
    planes = [np.unique(boxes[:, 2 * axis : 2 * axis + 2].round(6)) for axis in range(3)]
    middles = np.meshgrid(*((p[1:] + p[:-1]) / 2 for p in planes), indexing="ij")
    filled = boxes_distance(np.stack([m.ravel() for m in middles], 1), boxes) < 0
    filled = np.pad(filled.reshape(middles[0].shape), 1)
    numbers = np.arange(np.prod([len(p) for p in planes])).reshape([len(p) for p in planes])
    faces = []
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        step = np.diff(filled.astype(int), axis=axis)  # -1: filled below, so the normal is +axis
        for sign in (-1, 1):
            cell = np.argwhere(step == sign)
            cell[:, [first, second]] -= 1  # the padding
            corner = [cell.copy() for _ in range(4)]
            for index, (u, v) in enumerate(((0, 0), (1, 0), (1, 1), (0, 1))):
                corner[index][:, first] += u
                corner[index][:, second] += v
            a, b, c, d = (numbers[tuple(k.T)] for k in (corner if sign < 0 else corner[::-1]))
            faces += [np.stack([a, b, c], 1), np.stack([a, c, d], 1)]
    points = np.stack([m.ravel() for m in np.meshgrid(*planes, indexing="ij")], 1)
    return compacted(points, np.concatenate(faces))


def wrapped_surface(distance: Distance, bounds: Array, size: float) -> Surface:
    """The zero set of a distance by dual contouring (Ju et al., 2002) on a tilted grid of cells of
    `size`: one vertex a cell where the planes at its crossed edges meet, so edges stay sharp."""
    tilt = np.linalg.qr(TILT)[0]
    tilt = tilt * np.sign(np.diag(tilt))
    low, high = bounds[::2], bounds[1::2]
    middle, reach = (low + high) / 2, np.linalg.norm(high - low) / 2 + 2 * size
    num = int(np.ceil(2 * reach / size))
    line = (np.arange(num) - (num - 1) / 2) * size
    nodes = np.stack(np.meshgrid(line, line, line, indexing="ij"), -1)
    points = middle + nodes.reshape(-1, 3) @ tilt.T
    value = distance(points).reshape(num, num, num)
    inside = value < 0
    numbers = np.arange(num**3).reshape(num, num, num)  # a node names the cell that starts there
    places, normals, owners, quads = [], [], [], []
    for axis in range(3):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        here = np.argwhere(np.diff(inside.astype(int), axis=axis) != 0)
        step = np.eye(3, dtype=int)
        a, b = here, here + step[axis]
        va, vb = value[tuple(a.T)], value[tuple(b.T)]
        share = (va / (va - vb))[:, None]
        pa, pb = (points[numbers[tuple(k.T)]] for k in (a, b))
        place = crossing(distance, pa, pb, share)
        cells = [
            a - u * step[first] - v * step[second] for u, v in ((1, 1), (0, 1), (0, 0), (1, 0))
        ]
        quad = np.stack([numbers[tuple(c.T)] for c in cells], 1)
        quads.append(np.where((va < 0)[:, None], quad, quad[:, ::-1]))
        places += [place] * 4
        normals += [gradients(distance, place)] * 4
        owners += list(quad.T)
    used, index = np.unique(np.concatenate(quads), return_inverse=True)
    quad, owners = index.reshape(-1, 4), np.searchsorted(used, np.concatenate(owners))
    vertices = meeting_points(np.concatenate(places), np.concatenate(normals), owners, quad, size)
    for _ in range(8):  # curved: planes meet beside the surface
        vertices = vertices - distance(vertices)[:, None] * gradients(distance, vertices)
    a, b, c, d = quad.T
    one, two = np.array([[a, b, c], [a, c, d]]), np.array([[a, b, d], [b, c, d]])
    better = smallest_area(vertices, one) >= smallest_area(vertices, two)
    return vertices, np.where(better, one, two).transpose(0, 2, 1).reshape(-1, 3)


def smallest_area(vertices: Array, faces: NDArray[np.int64]) -> Array:
    """Of faces [2, 3, N], by pair."""
    a, b, c = vertices[faces].transpose(1, 0, 2, 3)
    return np.linalg.norm(np.cross(b - a, c - a), axis=2).min(0)


def crossing(distance: Distance, a: Array, b: Array, share: Array) -> Array:
    """Where the distance is zero between a and b, first guessed at `share` of the way; bisected."""
    low, high = np.zeros_like(share), np.ones_like(share)
    inside = distance(a) < 0
    for _ in range(40):
        same = ((distance(a + share * (b - a)) < 0) == inside)[:, None]
        low, high = np.where(same, share, low), np.where(same, high, share)
        share = (low + high) / 2
    return a + share * (b - a)


def meeting_points(
    places: Array, normals: Array, owners: NDArray[np.int64], quads: NDArray[np.int64], size: float
) -> Array:
    """[N, 3] by cell: where the planes at its places meet, no farther than `size` from their mean.
    What the planes leave free (directions that they fix to less than a tenth) is used to come
    nearer to the neighbours' mean, so that faces grow alike."""
    num = int(owners.max()) + 1

    def summed(index: NDArray[np.int64], values: Array) -> Array:
        flat = values.reshape(len(index), -1).T
        total = np.stack([np.bincount(index, f, num) for f in flat], 1)
        return total.reshape(num, *values.shape[1:])

    count = np.bincount(owners, minlength=num)
    mean = summed(owners, places) / count[:, None]
    away = ((places - mean[owners]) * normals).sum(1, keepdims=True)
    moment = summed(owners, normals[:, :, None] * normals[:, None, :]) / count[:, None, None]
    target = summed(owners, normals * away) / count[:, None]
    inverse = np.linalg.pinv(moment, rcond=0.1, hermitian=True)
    move = np.einsum("nij,nj->ni", inverse, target)
    length = np.linalg.norm(move, axis=1, keepdims=True)
    points = mean + move * (size / length.clip(min=size))
    free = np.eye(3) - inverse @ moment
    start, end = quads.reshape(-1), np.roll(quads, 1, 1).reshape(-1)  # every edge, both ways
    degree = np.bincount(start, minlength=num)[:, None]
    for _ in range(6):
        wish = summed(start, points[end]) / degree - points
        points = points + 0.5 * np.einsum("nij,nj->ni", free, wish)
    return points


def compacted(points: Array, faces: NDArray[np.int64]) -> Surface:
    """Without the points that no face uses."""
    used, index = np.unique(faces, return_inverse=True)
    return points[used], index.reshape(-1, 3)


def chair_truth() -> Surface:
    return boxes_surface(CHAIR)


def chair_hull() -> Surface:
    return wrapped_surface(lambda p: boxes_distance(p, WRAPPED_CHAIR), CHAIR_BOUNDS, 0.0205)


def mug_truth() -> Surface:
    """Every vertex on the surface; edges of about 0.02."""
    return wrapped_surface(mug_distance, MUG_BOUNDS, 0.02275)


def mug_hull() -> Surface:
    return wrapped_surface(lambda p: mug_distance(p, web=True), MUG_BOUNDS, 0.042)
