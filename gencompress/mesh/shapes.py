"""Closed surfaces to start from: a sphere, an even convex hull, and both about what masks show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gencompress.mesh.masks import MaskViews, seen_at
from gencompress.mesh.surface import TriMesh
from gencompress.mesh.topology import edge_table

MOST_LEVEL = 8  # 1.3 million faces
GRID = 48  # cells of the visual hull along each axis
ROOM = 1.2  # of the first box around the object, by what the masks say of its size
TOLERATED = 10  # one view in so many may be wrong about a place
ROUNDS = 20  # of evening out; more change the spread of the edges by less than 1%

Floats = NDArray[np.float64]


def icosphere(level: int) -> TriMesh:
    """The unit sphere in 20 * 4**level triangles, float64: 5,120 at level 4 (as TMN has it)."""
    if not 0 <= level <= MOST_LEVEL:
        raise ValueError(f"level {level}: expected 0 to {MOST_LEVEL}")
    golden = (1 + math.sqrt(5)) / 2
    corners = np.array([(0.0, a, b * golden) for a in (-1, 1) for b in (-1, 1)])
    vertices = np.concatenate([np.roll(corners, k, 1) for k in range(3)])
    vertices /= math.hypot(1, golden)
    faces = _around(vertices)
    for _ in range(level):
        ends = np.sort(np.stack([faces, np.roll(faces, -1, 1)], 2).reshape(-1, 2))
        pairs, place = np.unique(ends, axis=0, return_inverse=True)
        middles = vertices[pairs].sum(1)
        d, e, f = place.reshape(-1, 3).T + len(vertices)
        a, b, c = faces.T
        vertices = np.concatenate([vertices, middles / np.linalg.norm(middles, axis=1)[:, None]])
        quarters = [(a, d, f), (d, b, e), (f, e, c), (d, e, f)]
        faces = np.stack([np.stack(quarter, 1) for quarter in quarters], 1).reshape(-1, 3)
    return TriMesh(torch.from_numpy(vertices), torch.from_numpy(faces))


def hull(points: Tensor, level: int = 4) -> TriMesh:
    """The convex hull of points [N, 3] in 20 * 4**level triangles of nearly even size.

    An icosphere, moved out along rays from the middle of the hull until it lies on it, and evened
    out there; where the hull has a sharp edge, triangles cut across it. float64.

    Raises ValueError for points that are not finite or lie in a plane.
    """
    from scipy.spatial import ConvexHull, QhullError

    given = points.detach().double().numpy()
    if given.ndim != 2 or given.shape[1:] != (3,) or not np.isfinite(given).all():
        raise ValueError(f"points {given.shape}: expected finite ones, [N, 3]")
    try:
        found = ConvexHull(given)
    except (QhullError, ValueError) as problem:
        raise ValueError(f"{len(given)} points have no hull with a volume") from problem
    corners = given[found.vertices]
    low, high = corners.min(0), corners.max(0)
    middle = corners.mean(0)
    normals = found.equations[:, :3]
    planes = (
        normals / -(normals @ middle + found.equations[:, 3])[:, None]
    )  # d on it: 1 = plane . d
    mesh = icosphere(level)
    first, second = edge_table(mesh.faces)[0].numpy().T
    degree = np.bincount(np.concatenate([first, second]))[:, None]
    rays = _onto(mesh.vertices.numpy() * (high - low), planes)
    for _ in range(ROUNDS):
        total = np.zeros_like(rays)
        np.add.at(total, first, rays[second])
        np.add.at(total, second, rays[first])
        rays = _onto(total / degree, planes)
    return replace(mesh, vertices=torch.from_numpy(rays + middle))


def sphere_about(views: MaskViews, level: int = 4) -> TriMesh:
    """An icosphere stretched to the box, along the axes, of what the masks allow.

    Raises ValueError as `visual_hull`.
    """
    places, cell = visual_hull(views)
    low, high = places.amin(0) - cell / 2, places.amax(0) + cell / 2
    mesh = icosphere(level)
    return replace(mesh, vertices=(low + high) / 2 + mesh.vertices * (high - low) / 2)


def hull_about(views: MaskViews, level: int = 4) -> TriMesh:
    """The convex hull of what the masks allow.

    Raises ValueError as `visual_hull`.
    """
    places, cell = visual_hull(views)
    corner = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    return hull((places[:, None] + corner * cell / 2).reshape(-1, 3), level)


def visual_hull(views: MaskViews) -> tuple[Tensor, Tensor]:
    """Places that project into the masks of all views but a tenth, on a grid that they fill.

    Views with an empty mask say nothing. Beyond its frame a view allows everything if its mask
    reaches the frame's border, else nothing. With a single view, or several along one line, the
    depth is that of the place nearest to the origin.

    Returns:
        Centres [N, 3] of the cells, float64, world, and the size [3] of a cell.

    Raises:
        ValueError: all masks are empty, or the views agree on no place.
    """
    inside = views.masks > 0.5
    used = inside.flatten(1).any(1)
    if not bool(used.any()):
        raise ValueError("all masks are empty: no object to fit")
    inside, viewmats, lenses = inside[used], views.viewmats[used], views.intrinsics[used]
    middle, radius = _ball(inside, viewmats, lenses)
    low, high = middle - ROOM * radius, middle + ROOM * radius
    for _ in range(2):  # the second time in the box of what the first left
        cell = (high - low) / GRID
        steps = torch.arange(GRID, dtype=torch.float64) + 0.5
        axes = [low[k] + cell[k] * steps for k in range(3)]
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        votes = sum(map(_allows, inside, viewmats, lenses, [grid] * len(inside)))
        places = grid[votes >= len(inside) - len(inside) // TOLERATED]
        if not len(places):
            raise ValueError("the masks agree on no place: do the cameras belong to them?")
        low, high = places.amin(0) - cell, places.amax(0) + cell
    return places, cell


def _ball(inside: Tensor, viewmats: Tensor, lenses: Tensor) -> tuple[Tensor, float]:
    """The place nearest to the rays through the masks' centres, and how far masks reach from it."""
    height, width = inside.shape[1:]
    y, x = (torch.arange(size, dtype=torch.float64) + 0.5 for size in (height, width))
    area = inside.sum((1, 2)).double()
    x_mean = (inside.sum(1) * x).sum(1) / area
    y_mean = (inside.sum(2) * y).sum(1) / area
    centre = torch.stack([x_mean, y_mean, torch.ones_like(area)], 1)
    rays = (torch.linalg.inv(lenses @ viewmats[:, :3, :3]) @ centre[..., None])[..., 0]
    rays = torch.nn.functional.normalize(rays, dim=1)
    eyes = -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:])
    across = torch.eye(3, dtype=torch.float64) - rays[:, :, None] * rays[:, None]
    pull = (across @ eyes).sum(0)[:, 0]
    middle = torch.linalg.pinv(across.sum(0), rtol=1e-6, hermitian=True) @ pull
    depths = (viewmats[:, :3, :3] @ middle + viewmats[:, :3, 3])[:, 2]
    if not bool((depths > 0).any()):
        raise ValueError("the masks agree on no place before the cameras")
    apart = torch.hypot(x - x_mean[:, None, None], y[:, None] - y_mean[:, None, None])
    reach = torch.where(inside, apart, 0).amax((1, 2))
    return middle, float((reach.clamp(min=1) * depths / lenses[:, 0, 0]).max())


def _allows(inside: Tensor, viewmat: Tensor, lens: Tensor, places: Tensor) -> Tensor:
    """int64 [N]: 1 where a view lets a place belong to the object."""
    row, column, _, framed = seen_at(places, viewmat, lens, *inside.shape)
    cut = bool(inside[[0, -1]].any() | inside[:, [0, -1]].any())
    return torch.where(framed, inside[row, column], torch.tensor(cut)).long()


def _onto(rays: Floats, planes: Floats) -> Floats:
    """Rays [V, 3] from inside a hull, as long as it lets them be."""
    reach = np.concatenate([(some @ planes.T).max(1) for some in np.array_split(rays, 32)])
    return rays / reach[:, None]


def _around(points: Floats) -> NDArray[np.int64]:
    """The faces of a convex solid around the origin, counter-clockwise from outside."""
    from scipy.spatial import ConvexHull

    faces = ConvexHull(points).simplices.astype(np.int64)
    faces = faces[np.lexsort(np.sort(faces).T)]
    a, b, c = points[faces].transpose(1, 0, 2)
    inward = (np.cross(b - a, c - a) * a).sum(1) < 0
    faces[inward] = faces[inward][:, ::-1]
    return faces
